"""Packed linears from a packed checkpoint and into one, without a dense copy of the model in between.

transformers builds the model as for a dense load, but gets for each weight that stays packed a tensor of its shape
with the memory of a single number. Then the linears that hold these are replaced.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_sparse.linears import PackedLinear, block_linears, refuse_save_pretrained, stored_state, weights_loaded
from peft_sparse.storage import StoredTensor, as_in_files, names_in_model
from peft_sparse.storage.format import pack_matrix


def packed_targets(
    model_cls: type[PreTrainedModel], config: PreTrainedConfig, tensors: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The linears that stay packed, and their weights: those inside the transformer blocks that are stored packed, and
    share their weight with no other module."""
    with torch.device("meta"):
        model = model_cls(config)
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    names = names_in_model(model, tensors)
    keys = {name: key for key, (name, converted) in names.items() if not converted}
    found = {}
    for name, linear in block_linears(model).items():
        stored = tensors.get(keys.get(f"{name}.weight", ""))
        plain = type(linear) in (nn.Linear, Conv1D) and owners[id(linear.weight)] == 1
        if stored is not None and stored.bitmask is not None and plain:
            found[name] = stored
    return found


def put_packed_linears(model: PreTrainedModel, targets: dict[str, StoredTensor]) -> None:
    """Replace the linears that hold a stand-in.

    Raises:
        ValueError: that names a tensor, if it is damaged, or not the weight of its module."""
    for name, stored in targets.items():
        linear = model.get_submodule(name)
        dtype, conv1d = linear.weight.dtype, isinstance(linear, Conv1D)
        if linear.weight.stride() != (0, 0):
            raise ValueError(
                f"A weight stays packed if it is stored as the model has it, got `{name}`, which transformers "
                f"converts on the way into {type(model).__name__}; load it without `packed=True`."
            )
        if conv1d:
            values, bitmask, _ = pack_matrix(stored.read().T.contiguous())
        else:
            values, bitmask = stored.read_packed()
        values = values.reshape(-1).to(dtype)
        in_features = stored.shape[0] if conv1d else stored.shape[1]
        packed = PackedLinear(values, bitmask, in_features, linear.bias, conv1d=conv1d)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed.train(linear.training))
    refuse_save_pretrained(model)


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed linears of a model by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def unpacked_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without the weights of packed linears; what is offloaded is in it."""
    inside = {f"{name}.{part}" for name in packed_linears(model) for part in ("values", "bitmask")}
    return {name: tensor for name, tensor in stored_state(model) if name not in inside}


def packed_weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight) of each packed linear as files have it, one after the other.

    Raises:
        ValueError: if files have a weight together with others."""
    for name, module in packed_linears(model).items():
        with weights_loaded(module):
            weight = module.dense_weight().detach()
        found = as_in_files(model, f"{name}.weight", weight.T.contiguous() if module.conv1d else weight)
        if len(found) != 1:
            raise ValueError(
                f"A packed weight is a tensor of its own in files, got `{name}`, which {type(model).__name__} stores "
                f"as {sorted(found)}; call `unpack_model(model)` first."
            )
        yield from found.items()


def transposed_weights(model: PreTrainedModel) -> set[str]:
    """Names, in files, of the weights that are stored as (in, out)."""
    meta = torch.empty(0, 0, device="meta")
    return {
        key
        for name, module in model.named_modules()
        if isinstance(module, Conv1D) or getattr(module, "conv1d", False)
        for key in as_in_files(model, f"{name}.weight", meta)
    }
