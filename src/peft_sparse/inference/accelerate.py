"""Make a pruned model run faster, in place: each layer computes in the way that was measured to be the fastest.

The weights stay what they are, and so does all that is done with them: state dict, `save_pretrained`, tied weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_sparse.inference.choose import Decision, Group, choose_ways, clear_counts, slower_than_dense
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
    in_out_features,
    install,
    is_linear,
    is_packed,
    linears_inside,
    num_zeros,
    packable_linears,
    plain_class,
    refuse_save_pretrained,
    refuses_acceleration,
    replace_module,
    select_linears,
    uninstall,
    weight_parameter,
)

# Token by token, a few sequences at once, and prompts.
TOKENS = (1, 2, 8, 32, 128, 512)
MIN_SPARSITY = 0.3  # below, nothing was faster anywhere that we measured
MIN_NUMEL = 1 << 16  # in smaller layers, the time to decide is as much as there is to gain


def accelerate_sparse(
    model: nn.Module,
    tokens: int | Iterable[int] = TOKENS,
    target_modules: Names | None = None,
    exclude_modules: Names | None = None,
    *,
    keep_dense: bool = True,
    kernel: str | None = None,
) -> AccelerationReport:
    """Let each linear of a pruned model compute in the fastest way there is for it, in place.

    Every way that is possible on the layer's device and in its dtype is timed on the layers themselves, beside the
    dense one, for each number of tokens, with the weights from memory as in a model and from a cache. What does not
    save a tenth from memory, or loses from a cache, in any of two measurements, is not taken:

    - `csr`: lists of the non-zeros; on a CPU, in float32 and half precision by C kernels that are compiled at their
      first use where there is a compiler (`native.use_native`), else in float32 and float64 by MKL. With few non-zeros
      the fastest.
    - `semi_structured`: torch's 2:4 matmul on NVIDIA GPUs, in half precision.
    - `bitmask`: values and a bit for each place, read as they lie: the packed format. On a CPU by such kernels: pays
      from about half zeros for a few tokens, and takes less memory than `csr`. On an NVIDIA GPU a Triton kernel for
      one token, in half precision; only inside of `ops.use_triton`.

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
            neighbours got, if it took 0.6 or less of the time for both; above the largest they are computed densely.
        target_modules: names of linears or the ends of names, or one regex that matches full names, as in PEFT. None:
            all linears inside the repeated transformer blocks; of a model without such blocks, all linears.
        exclude_modules: what to leave out of them, given in the same way.
        keep_dense: False packs the layers for which that is no slower with any of `tokens`, and so gives up their
            dense weights: at 90% in float32 they take 0.23 of the dense bytes instead of 1.2. `save_sparse` saves such
            a model; `save_pretrained` refuses, as for any packed one.
        kernel: one of the above to use wherever it can be used, without timing anything.

    Returns:
        What was chosen for each layer and why, with the bytes that it takes. [`remove_acceleration`] is the way back.

    Raises:
        ValueError: if there is no such linear, if the model has adapters, or a layer no memory (the meta device). The
            model is as it was then.

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
    decisions = _decide(linears, to_pack, counts, kernel)
    made = _apply(model, linears, decisions, to_pack or set())
    rows = [layer_choice(name, made[id(linear)], decisions[id(linear)]) for name, linear in targets.items()]
    return AccelerationReport(rows, torch.get_num_threads(), notes(rows, list(made.values())))


def remove_acceleration(model: nn.Module) -> nn.Module:
    """The inverse of [`accelerate_sparse`], in place: every linear is the one that it was, with the weights of now.

    Layers that `keep_dense=False` packed get their dense weights back.

    Returns:
        `model`.

    Raises:
        ValueError: if something has replaced an accelerated linear's forward. Nothing is changed then.
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


# What is decided


def _decide(
    linears: Sequence[nn.Module], to_pack: set[int] | None, counts: tuple[int, ...], kernel: str | None
) -> dict[int, Decision]:
    """By the id of each linear.

    Args:
        to_pack: ids of the dense linears that are to give up their weights, of which those are taken out that would
            lose by it; None: all keep them.
    """
    giving_up, to_pack = to_pack is not None, set() if to_pack is None else to_pack
    found: dict[int, Decision] = {}
    groups: dict[tuple[Any, ...], Group] = {}
    for place, linear in enumerate(linears):
        refused = refuses_acceleration(linear) or (_too_little(linear) if kernel is None else None)
        if refused is None and giving_up and not isinstance(linear, PackedLinear) and id(linear) not in to_pack:
            refused = "kept dense: its weight is shared, hooks are attached, or it is the whole model"
        refusals = {} if refused else {k: k.refusal(linear) for k in OPERANDS.values() if kernel in (None, k.name)}
        kinds = tuple(kind for kind, reason in refusals.items() if reason is None)
        weight, (in_features, out_features) = weight_parameter(linear), in_out_features(linear)
        if not kinds:
            device = weight.device.type
            relevant = [r for kind, r in refusals.items() if r and (device in kind.device_types or kernel)]
            found[id(linear)] = Decision([], [refused] if refused else relevant or [f"there is nothing for {device}"])
            continue
        form = "packed" if isinstance(linear, PackedLinear) or id(linear) in to_pack else "dense"
        share = round(num_zeros(linear) / (in_features * out_features), 2)
        key = (plain_class(linear), form, linear.bias is None, out_features, in_features, weight.dtype, share, kinds)
        group = groups.setdefault((weight.device, *key), Group([], kinds, form, []))
        group.linears.append(linear)
        group.places.append(place)
    for group, decision in _decided(list(groups.values()), counts, kernel):
        giving = id(group.linears[0]) in to_pack and kernel is None
        slower = slower_than_dense(decision.choices) if giving else None
        if slower is not None:
            to_pack.difference_update(map(id, group.linears))
            decision = Decision([], [slower])
        found.update((id(linear), decision) for linear in group.linears)
    return found


def _decided(groups: Sequence[Group], counts: tuple[int, ...], kernel: str | None) -> Iterator[tuple[Group, Decision]]:
    """Each group with what is to be done with it; those of one device are timed together."""
    if kernel is not None:
        for group in groups:
            yield group, Decision([TokenChoice(count, kernel, {}, None, "as `kernel` says") for count in counts])
        return
    devices = {weight_parameter(group.linears[0]).device for group in groups}
    for device in sorted(devices, key=str):
        together = [group for group in groups if weight_parameter(group.linears[0]).device == device]
        yield from zip(together, choose_ways(together, counts), strict=True)


def _too_little(linear: nn.Module) -> str | None:
    """Why there is nothing to gain in a layer; None if there may be."""
    in_features, out_features = in_out_features(linear)
    if in_features * out_features < MIN_NUMEL:
        return f"nothing is tried below {MIN_NUMEL:,} weights"
    if num_zeros(linear) < MIN_SPARSITY * in_features * out_features:
        return f"nothing is tried below {MIN_SPARSITY:.0%} zeros"
    return None


# What is done


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
