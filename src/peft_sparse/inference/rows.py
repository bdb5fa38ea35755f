"""The rows of a report, made from the linears that they are about."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from peft_sparse.inference.choose import Decision
from peft_sparse.inference.report import LayerChoice
from peft_sparse.linears import PackedLinear, acceleration_of, in_out_features, num_zeros, weight_parameter


def layer_choice(name: str, linear: nn.Module, decision: Decision) -> LayerChoice:
    """The row of a linear, as it is after `decision` was carried out."""
    in_features, out_features = in_out_features(linear)
    weight = weight_parameter(linear)
    form, nbytes = "dense", weight.nbytes
    if isinstance(linear, PackedLinear):
        packed = linear.packed_weight
        form, nbytes = "packed", packed.values.nbytes + packed.bitmask.nbytes + packed.starts.nbytes
    acceleration = acceleration_of(linear)
    idle = all(choice.chosen == form for choice in decision.choices)
    problems = decision.problems or ["nothing is faster"] if idle else decision.problems
    return LayerChoice(
        name=name,
        shape=(out_features, in_features),
        dtype=str(weight.dtype).removeprefix("torch."),
        device=str(weight.device),
        sparsity=num_zeros(linear) / max(1, in_features * out_features),
        form=form,
        choices=tuple(decision.choices),
        weight_bytes=nbytes,
        added_bytes=0 if acceleration is None else acceleration.nbytes,
        reason="; ".join(problems),
    )


def notes(rows: Sequence[LayerChoice], linears: Sequence[nn.Module]) -> list[str]:
    """What a reader of the rows has to know."""
    found = []
    if any(p.requires_grad for x in linears if acceleration_of(x) is not None for p in x.parameters(recurse=False)):
        found.append("The choices are used where autograd does not record: in generate(), or under torch.no_grad().")
    slow = [row for row in rows if row.form == "packed" and any((c.speed_up or 1) < 1 for c in row.choices)]
    if slow:
        found.append(
            f"{len(slow)} packed layers are slower than dense ones for some numbers of tokens; `unpack_model(model)` "
            "before this, if there is memory for it."
        )
    return found
