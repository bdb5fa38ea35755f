"""The repeated transformer blocks of a model and the linears inside them, found by structure and not by name.

A list of blocks is an outermost nn.ModuleList whose members hold linears without being linears themselves: `layers` of
a Llama, `encoder.layer` of a BERT, `h` of a GPT-2, both `block` lists of a T5. A list of lists, which is never called,
is none, but each of those may be one: Funnel's stages. Embeddings, pooler and heads lie outside of them. A linear is
named by its path inside the block ("attention.output.dense"), since a last name such as BERT's "dense" may also belong
to the pooler.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_sparse.linears.quantized import not_read
from peft_sparse.linears.weights import in_out_features, is_linear, unwrap

_ROUTERS = {"router", "altup"}

Names = list[str] | tuple[str, ...] | set[str] | str


@dataclass(frozen=True)
class BlockList:
    """One list of repeated blocks: its full name in the model, and the blocks in the order in which they run. One that
    is in it several times goes by its first name, as in `named_modules`: walk over `blocks.named_children()`."""

    name: str
    blocks: nn.ModuleList


def check_model(model: nn.Module) -> None:
    """Raises:
    ValueError: if this is no module."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` is a model in memory (an nn.Module), got {model!r}; load it first.")


def find_block_lists(model: nn.Module) -> list[BlockList]:
    """All outermost lists of repeated blocks, in the order of `model.named_modules()`; empty if there are none.

    Raises:
        ValueError: if `model` is no module.
    """
    check_model(model)
    found: list[BlockList] = []
    for name, module in model.named_modules():
        inside_another = any(name.startswith(other.name + ".") for other in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside_another and _are_blocks(module):
            found.append(BlockList(name, module))
    return found


def _are_blocks(modules: nn.ModuleList) -> bool:
    members = [unwrap(module) for module in modules]
    return not any(is_linear(member) or isinstance(member, nn.ModuleList) for member in members) and all(
        any(is_linear(unwrap(module)) for module in member.modules()) for member in members
    )


def linears_inside(module: nn.Module) -> dict[str, nn.Module]:
    """The linears below a module by relative name. A PEFT tuner layer counts as the linear that it wraps."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if is_linear(unwrap(child)):
            found[name] = child
        else:
            found.update({f"{name}.{path}": linear for path, linear in linears_inside(child).items()})
    return found


def block_linears(model: nn.Module, *, routers: bool = False) -> dict[str, nn.Module]:
    """The linears inside the model's repeated blocks, by full name; empty if the model has no such blocks.

    Args:
        routers: also those that choose or weigh what computes, see [`is_router`].

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> sorted(name.split(".")[-1] for name in block_linears(LlamaForCausalLM(config)))
        ['down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'up_proj', 'v_proj']
    """
    return {
        f"{block_list.name}.{index}.{path}": linear
        for block_list in find_block_lists(model)
        for index, block in block_list.blocks.named_children()
        for path, linear in _block_linears(block, routers).items()
    }


def _block_linears(block: nn.Module, routers: bool = False) -> dict[str, nn.Module]:
    return {path: linear for path, linear in linears_inside(block).items() if routers or not is_router(block, path)}


def is_router(block: nn.Module, path: str) -> bool:
    """Whether a linear, by its path inside a block, chooses or weighs what computes: the router of experts, a `gate`
    that is beside them with all that it consists of, and the gate of a shared expert, which has one output.

    Few weights on which much depends, so that they stay dense unless they are named, in all models alike: of Mixtral
    and others they are no linears at all. AltUp's (Gemma 3n), which mix a few copies of the hidden state, are of this
    kind. That of an MLP (`gate_proj`) or of attention is not.
    """
    parts = path.split(".")
    for depth, part in enumerate(parts):
        words = part.split("_")
        if not _ROUTERS.isdisjoint(words):
            return True
        if words[-1] == "gate" and hasattr(block.get_submodule(".".join(parts[:depth])), "experts"):
            return part == "gate" or in_out_features(unwrap(block.get_submodule(path)))[1] == 1
    return False


def block_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters inside the model's repeated blocks that hold the weights of several experts, (experts, ., .), by full
    name: no linears, and most of a model that has them. Of those of several heads, as in the mixers of Zamba or the
    gates of RecurrentGemma, nothing in their shape tells them apart: they, or the class of their module, are called
    experts."""
    return {
        f"{block_list.name}.{index}.{name}": parameter
        for block_list in find_block_lists(model)
        for index, block in block_list.blocks.named_children()
        for name, parameter in _outside_of_layers(block)
        if parameter.dim() == 3 and min(parameter.shape) > 1 and parameter.is_floating_point()
        if _is_of_experts(block, name)
    }


def _is_of_experts(block: nn.Module, name: str) -> bool:
    module = block.get_submodule(name.rpartition(".")[0])
    return "expert" in f"{type(module).__name__}.{name}".lower()


def _outside_of_layers(block: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that belong to no convolution and no adapter."""
    layers = (nn.modules.conv._ConvNd, BaseTunerLayer)
    inside = tuple(f"{name}." for name, module in block.named_modules() if isinstance(module, layers))
    return ((name, parameter) for name, parameter in block.named_parameters() if not name.startswith(inside))


def block_linear_names(model: nn.Module) -> set[str]:
    """What to write into PEFT's `target_modules` to match the linears of [`block_linears`] and no others.

    Returns:
        Paths inside the block, such as `{"attention.output.dense", "intermediate.dense", ...}`, which fit any number
        of blocks and any model that wraps them; full names where such a path would match another module.

    Raises:
        ValueError: if the model has no repeated blocks.
    """
    inside = block_linears(model)
    if not inside:
        raise ValueError(
            "The default targets are the linears inside a model's repeated transformer blocks, but "
            f"{type(model).__name__} has no list of such blocks; name the linears to adapt in `target_modules`"
            f"{not_read(model)}."
        )
    paths = {
        path for block_list in find_block_lists(model) for block in block_list.blocks for path in _block_linears(block)
    }
    outside = [name for name, _ in model.named_modules() if name not in inside]
    if any(f".{name}".endswith(f".{path}") for name in outside for path in paths):
        return set(inside)
    return paths


def names_in_blocks(full_names: Iterable[str]) -> str:
    """For messages: each name once for all blocks, whose number is a `*`.

    Examples:
        >>> names_in_blocks(["layers.0.mlp.router", "layers.1.mlp.router"])
        '`layers.*.mlp.router`'
    """
    return ", ".join(f"`{name}`" for name in dict.fromkeys(re.sub(r"\.\d+\.", ".*.", full) for full in full_names))


def matches(names: Names, name: str) -> bool:
    """Whether a module's full name is meant, by PEFT's rule: a string is a regex for the whole name, a list holds full
    names or their last parts.

    Raises:
        ValueError: for a string that is no regex.

    Examples:
        >>> matches(["q_proj"], "layers.0.q_proj"), matches("q_proj", "layers.0.q_proj")
        (True, False)
    """
    if isinstance(names, str):
        try:
            return re.fullmatch(names, name) is not None
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"Modules are named in a list, or by one regex for full names, got {names!r}, which is no valid regex "
                f"({error})."
            ) from error
    return any(name == end or name.endswith(f".{end}") for end in names)


def select_linears(
    model: nn.Module,
    wanted: Names | None,
    excluded: Names | None,
    doing: str,
    *,
    default: Callable[[nn.Module], dict[str, nn.Module]] = block_linears,
) -> dict[str, nn.Module]:
    """The linears that `target_modules` and `exclude_modules` mean, by full name.

    Args:
        wanted: None: those of `default`.
        doing: what is done with them, to begin the message of an error with.

    Raises:
        ValueError: if there is none, or `model` is no module.
    """
    check_model(model)
    candidates = default(model) if wanted is None else linears_inside(model)
    targets = {
        name: linear
        for name, linear in candidates.items()
        if (wanted is None or matches(wanted, name)) and (excluded is None or not matches(excluded, name))
    }
    if not targets:
        raise ValueError(
            f"{doing} needs at least one linear, got none in {type(model).__name__} for target_modules={wanted!r}, "
            f"exclude_modules={excluded!r}; its linears have names such as {list(linears_inside(model))[:3]}"
            f"{not_read(model)}."
        )
    return targets
