"""Linears whose weight another module computes with instead of calling them: what is wrapped around such a linear has
no effect, and a calibrated pruner never sees its inputs.

It is looked up in the code of the module that holds the linear, where it is written: attention that hands the weights
of its projections to `F.multi_head_attention_forward` (WavLM), a router that casts its own (LongCat-Flash), the
kernels of Mamba and its kin. To take only pieces of a weight does not count: BLOOM and DeBERTa do that where a config
asks for it, and else call the linear.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from types import CodeType
from typing import Any

from torch import nn

from peft_sparse.linears.weights import is_linear, unwrap

# What is asked of a weight without computing with it.
_ASKED = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "requires_grad", "is_meta", "element_size"}
_PIECES = {"chunk", "split", "narrow", "unbind"}


def linears_not_called(model: nn.Module) -> dict[str, str]:
    """Linears that are not called, or not always, by full name, and the kind of the module that takes their weight."""
    found = {}
    for name, module in model.named_modules():
        for path in sorted(_weights_taken(type(module))):  # type: ignore[arg-type] # classes can be hashed
            linear: object = module
            for part in path.split("."):
                linear = getattr(linear, part, None)
            if isinstance(linear, nn.Module) and is_linear(unwrap(linear)):
                found[f"{name}.{path}".lstrip(".")] = type(module).__name__
    return found


@cache
def _weights_taken(module_class: type[nn.Module]) -> frozenset[str]:
    """Paths of the submodules whose whole `weight` the forward of a class computes with, in this method or in those
    that it calls. None where the source is not to be had."""
    to_read, read, taken = {"forward"}, set(), set()
    while to_read:
        name = to_read.pop()
        read.add(name)
        method = inspect.unwrap(getattr(module_class, name))
        used = _names_used(getattr(method, "__code__", None))
        to_read |= {name for name in used - read if _is_own_method(module_class, name)}
        if "weight" in used:
            taken |= _taken_in(_tree(method))
    return frozenset(taken)


def _is_own_method(module_class: type, name: str) -> bool:
    owner = next((cls for cls in module_class.__mro__ if name in vars(cls)), object)
    return owner.__module__.split(".")[0] not in ("torch", "builtins") and inspect.isfunction(vars(owner)[name])


def _names_used(code: CodeType | None) -> set[str]:
    """All names in a function and in those that are defined in it."""
    if code is None:
        return set()
    inner = (_names_used(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def _tree(method: Callable[..., Any]) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, SyntaxError):  # typed in, or made at run time
        return ast.Module([], [])


def _taken_in(tree: ast.AST) -> set[str]:
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    paths = {node: path for node in parents if (path := _path_from_self(node)) is not None}
    return {
        path.removesuffix(".weight")
        for node, path in paths.items()
        if path.endswith(".weight") and _is_computed_with(node, parents[node])
    }


def _path_from_self(node: ast.AST) -> str | None:
    """ "out_proj.weight" of `self.out_proj.weight`."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if parts and isinstance(node, ast.Name) and node.id == "self" else None


def _is_computed_with(weight: ast.AST, parent: ast.AST) -> bool:
    if isinstance(parent, ast.Attribute):
        return parent.attr not in _ASKED | _PIECES
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
        return parent.func.id not in ("isinstance", "hasattr", "type", "id")
    return not isinstance(parent, ast.Subscript)
