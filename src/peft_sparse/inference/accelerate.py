"""Make a pruned model run faster, in place: each layer computes in the way that was measured to be the fastest.

The weights stay what they are, and so does all that is done with them: state dict, `save_pretrained`, tied weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_sparse.inference.choose import Decision, clear_counts
from peft_sparse.inference.decide import decide
from peft_sparse.inference.report import AccelerationReport, TokenChoice
from peft_sparse.inference.rows import layer_choice, notes
from peft_sparse.linears import (
    OPERANDS,
    Acceleration,
    Names,
    Operand,
    PackedLinear,
    acceleration_of,
    allow_save_pretrained,
    block_linears,
    check_model,
    forward_replaced,
    install,
    is_linear,
    is_packed,
    linears_inside,
    packable_linears,
    refuse_save_pretrained,
    replace_module,
    select_linears,
    uninstall,
    weight_parameter,
)

# Token by token, a few sequences at once, and prompts.
TOKENS = (1, 2, 8, 32, 128, 512)


def accelerate_sparse(
    model: nn.Module,
    tokens: int | Iterable[int] = TOKENS,
    target_modules: Names | None = None,
    exclude_modules: Names | None = None,
    *,
    keep_dense: bool = True,
    kernel: str | None = None,
) -> AccelerationReport:
    """Let each linear layer of a pruned model compute in the fastest way that it has, in place.

    Every way that is possible on the layer's device and in its dtype is timed on the layers themselves, beside the
    dense one, for each number of tokens, with the weights from memory as in a model and from a cache. A way is taken
    only if, in both of two measurements, it saves a tenth from memory and loses nothing from a cache:

    - `csr`: lists of the non-zeros; on a CPU, in float32 and half precision by C kernels that are compiled at their
      first use where there is a compiler (`native.use_native`), else in float32 and float64 by MKL. With few non-zeros
      the fastest.
    - `semi_structured`: torch's 2:4 matmul on NVIDIA GPUs, in half precision.
    - `bitmask`: values and a bit for each place, read as they lie: the packed format. On a CPU it too has C kernels:
      it pays from about half zeros for a few tokens, and takes less memory than `csr`. On an NVIDIA GPU a Triton
      kernel for one token, in half precision; only inside of `ops.use_triton`.

    The result is that of the dense layer up to the order of sums; where a weight is zero, infinities and NaNs in the
    input may be ignored. A layer computes in its own way as before wherever autograd records, in autocast and in
    compiled graphs: the choices are for `generate()` and other work under `torch.no_grad()`. It also does so, and
    warns, once its weight was changed, moved or cast; call this function again then. A change of a few entries
    through `.data`, which torch does not count as one, may go unnoticed. A copy of the model starts without the
    choices. They hold for the number of threads with which they were made.

    Args:
        model: without adapters; dense with zeros, or packed. A packed layer stays packed, and is compared with
            unpacking it at each forward: call `unpack_model` before if there is memory for the dense weights.
        tokens: for how many tokens at a time (batch size times length) to choose. Numbers in between get what both
            neighbours got, if it took 0.6 or less of the time for both. Above the largest a dense layer computes
            densely, and a packed one, whose own way is to unpack, as for the largest, if that took 0.6 or less.
        target_modules: names of linear layers or the ends of names, or one regex that matches full names, as in PEFT.
            None: all linear layers inside the repeated transformer blocks; of a model without such blocks, all linear
            layers.
        exclude_modules: what to leave out of them, given in the same way.
        keep_dense: False packs the layers for which that is no slower with any of `tokens`, and so gives up their
            dense weights: at 90% in float32 they take 0.23 of the dense bytes instead of 1.2. `save_sparse` saves such
            a model; `save_pretrained` refuses, as for any packed one.
        kernel: one of the above to use wherever it can be used, without timing anything.

    Returns:
        What was chosen for each layer and why, with the bytes that it takes. [`remove_acceleration`] is the way back.

    Raises:
        ValueError: if there is no such linear layer, if the model has adapters, or a layer no memory (the meta
            device). The model is as it was then.

    Examples:
        >>> from peft_sparse.pruning import prune_magnitude
        >>> model = nn.Sequential(nn.Linear(64, 32))
        >>> report = accelerate_sparse(prune_magnitude(model, sparsity=0.9, target_modules=["0"]), kernel="csr")
        >>> [choice.chosen for choice in report.layers[0].choices]
        ['csr', 'csr', 'csr', 'csr', 'csr', 'csr']
        >>> with torch.no_grad():
        ...     model(torch.ones(1, 64)).shape  # computed with the tenth of the weights that is left
        torch.Size([1, 32])
        >>> remove_acceleration(model)
        Sequential(
          (0): Linear(in_features=64, out_features=32, bias=True)
        )
    """
    counts = _check_tokens(tokens)
    _check(model, kernel)
    targets = select_linears(model, target_modules, exclude_modules, "Accelerating", default=_default_linears)
    for name, linear in targets.items():
        if weight_parameter(linear).is_meta:
            raise ValueError(
                f"Accelerating needs weights in memory, got `{name}`, which is on the meta device (offloaded, or "
                "never loaded); load the model without offloading."
            )
    linears = list({id(linear): linear for linear in targets.values()}.values())
    to_pack = None if keep_dense else packable_linears(model, linears)
    decisions = decide(linears, to_pack, counts, kernel)
    made = _apply(model, linears, decisions, to_pack or set())
    rows = [layer_choice(name, made[id(linear)], decisions[id(linear)]) for name, linear in targets.items()]
    return AccelerationReport(rows, torch.get_num_threads(), notes(rows, list(made.values())))


def remove_acceleration(model: nn.Module) -> nn.Module:
    """The inverse of [`accelerate_sparse`], in place: each linear layer is what it was, with its present weights.

    Layers that `keep_dense=False` packed get their dense weights back.

    Returns:
        `model`.

    Raises:
        ValueError: if something has replaced an accelerated linear layer's forward. Nothing is changed then.
    """
    check_model(model)
    for name, module in model.named_modules():
        if acceleration_of(module) is not None and forward_replaced(module):
            raise ValueError(
                f"Acceleration is removed from linears that have their own forward, got `{name}`, whose forward was "
                "replaced, as offloading does it; undo that first, for example with "
                "`accelerate.hooks.remove_hook_from_submodules(model)`."
            )
    for module in list(model.modules()):
        acceleration = acceleration_of(module)
        if acceleration is None:
            continue
        uninstall(module)
        if acceleration.packed and isinstance(module, PackedLinear):
            replace_module(model, module, module.to_linear())
    if not is_packed(model):
        allow_save_pretrained(model)
    return model


def _default_linears(model: nn.Module) -> dict[str, nn.Module]:
    return block_linears(model) or linears_inside(model) or ({"": model} if is_linear(model) else {})


def _check_tokens(tokens: int | Iterable[int]) -> tuple[int, ...]:
    several = isinstance(tokens, Iterable) and not isinstance(tokens, torch.Tensor)
    counts: tuple[Any, ...] = tuple(tokens) if several else (tokens,)  # type: ignore[arg-type]
    if not counts or any(isinstance(c, bool) or not isinstance(c, int) or c < 1 for c in counts):
        raise ValueError(f"`tokens` is a positive number of tokens or some of them, such as (1, 128), got {tokens!r}.")
    return tuple(sorted(set(counts)))


def _check(model: nn.Module, kernel: str | None) -> None:
    check_model(model)
    if kernel is not None and kernel not in list(OPERANDS):
        raise ValueError(f"`kernel` is one of {sorted(OPERANDS)}, or None to have them timed, got {kernel!r}.")
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise ValueError(
                f"Accelerating needs the final weights, got `{name}`, which carries an adapter "
                f"({type(module).__name__}); call `model = model.merge_and_unload()` first."
            )


def _apply(
    model: nn.Module, linears: Sequence[nn.Module], decisions: dict[int, Decision], to_pack: set[int]
) -> dict[int, nn.Module]:
    """The linears as they are afterwards, by the id of those before. One after the other, so that a packed layer's
    dense weight is gone before the next one is packed."""
    made: dict[int, nn.Module] = {}
    operands: dict[int, Acceleration | None] = {}
    for linear in linears:  # all that may fail for want of memory, before anything is changed
        if id(linear) not in to_pack:
            operands[id(linear)] = _acceleration(linear, decisions[id(linear)].choices, packed=_was_packed(linear))
    for linear in linears:
        if id(linear) in to_pack and decisions[id(linear)].choices:
            packed = PackedLinear.from_linear(linear)
            acceleration = _acceleration(packed, decisions[id(linear)].choices, packed=True)
            replace_module(model, linear, packed)
            install(packed, acceleration or Acceleration(packed, {}, packed=True))
            made[id(linear)] = packed
            continue
        acceleration = operands.get(id(linear))
        if acceleration is not None:
            install(linear, acceleration)
        elif not _was_packed(linear) and not forward_replaced(linear):  # which may call the accelerated one
            uninstall(linear)
        made[id(linear)] = linear
    refuse_save_pretrained(model)
    return made


def _was_packed(linear: nn.Module) -> bool:
    """Whether an earlier call packed it."""
    acceleration = acceleration_of(linear)
    return acceleration is not None and acceleration.packed


@torch.no_grad()
def _acceleration(linear: nn.Module, choices: Sequence[TokenChoice], packed: bool) -> Acceleration | None:
    """With one operand for each way that is used; None if none is, and nothing is to be remembered."""
    names = {choice.chosen for choice in choices} & set(OPERANDS)
    if not names and not packed:
        return None
    with torch.inference_mode(False):
        made: dict[str, Operand] = {name: OPERANDS[name].of(linear) for name in sorted(names)}
    clear = clear_counts(choices, "packed" if isinstance(linear, PackedLinear) else "dense")
    return Acceleration(linear, {choice.tokens: made.get(choice.chosen) for choice in choices}, packed, clear)
