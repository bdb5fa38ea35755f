"""A model on disk, its tensors read one at a time, without building the model in memory.

Which of the stored tensors are linears of the transformer blocks, and which ones are stored transposed (GPT-2), only
the model knows. So it is built from its config.json on the meta device, where it has names and shapes but no memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from peft_sparse.linears import block_experts, block_linears, linears_inside
from peft_sparse.storage.folders import packed_files, plain_files, read_config
from peft_sparse.storage.format import says_packed
from peft_sparse.storage.names import names_in_model
from peft_sparse.storage.tensors import StoredTensor, is_legacy, legacy_tensors, packed_tensors, plain_tensors


class StoredLinear(NamedTuple):
    """A linear on disk.

    Attributes:
        key: of its weight, in the model's files.
        module: what it is in the model, on the meta device; None for one that is a part of something there, such as an
            expert: its weight is then (out, in) in the files, as far as anyone can tell.
    """

    key: str
    module: nn.Module | None


@dataclass
class StoredModel:
    """What a folder holds. No tensor is read yet.

    Attributes:
        folder: where it is.
        layout: `"dense"`, `"packed"` (our format v1), or `"sparse-bitmask"` / `"sparse-24-bitmask"` of
            compressed-tensors.
        config: config.json, {} if there is none.
        tensors: by their name in the dense state dict.
    """

    folder: Path
    layout: str
    config: dict[str, Any]
    tensors: dict[str, StoredTensor] = field(repr=False)

    @property
    def architecture(self) -> str:
        """The name of the model's class, as config.json has it; "" where it says nothing."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else ""

    def linears(self) -> dict[str, StoredLinear] | None:
        """The linears of the transformer blocks by name, and the experts of fused ones; all linears for a model
        without blocks, None if the folder does not tell, or lacks one. A weight that several linears have in common,
        as those of a block that is used again do, is stored once, under the name of one of them, and is that of each.
        """
        model_cls: Any = transformers_class(self.architecture)
        if model_cls is None:
            return None
        with torch.device("meta"):
            model = model_cls(model_cls.config_class.from_pretrained(self.folder))
        linears: dict[str, nn.Module | None] = {
            f"{name}.weight": linear for name, linear in (block_linears(model) or linears_inside(model)).items()
        }
        stored = self._keys_of_weights(model)
        found: dict[str, StoredLinear] = {}
        for name, module in (linears | dict.fromkeys(block_experts(model))).items():
            if name not in stored:
                return None
            for key, converted in sorted(stored[name].items()):
                is_part = module is None or converted
                found[key if is_part else name] = StoredLinear(key, None if is_part else module)
        return {name.removesuffix(".weight"): linear for name, linear in found.items()}

    def _keys_of_weights(self, model: PreTrainedModel) -> dict[str, dict[str, bool]]:
        """By each name of a weight in the model: what is stored of it, and whether it is computed from that."""
        keys: dict[str, dict[str, bool]] = {}
        for key, (name, converted) in names_in_model(model, self.tensors).items():
            if len(self.tensors[key].shape) > 1:
                keys.setdefault(name, {})[key] = converted
        names_of: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names_of.setdefault(id(parameter), []).append(name)
        for names in names_of.values():
            stored_as = next((name for name in names if name in keys), None)
            if stored_as is not None:
                keys |= {name: keys[stored_as] for name in names if name not in keys}
        return keys


def transformers_class(name: str) -> type[PreTrainedModel] | None:
    """The model class of transformers that has this name, if any."""
    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def open_model(folder: Path, verify_checksums: bool = True) -> StoredModel:
    """Look at the headers of a model's files.

    Args:
        folder: with the safetensors files of a model, dense or in one of the layouts above.
        verify_checksums: of our format; False also takes files that were changed on purpose.

    Raises:
        ValueError: if there is no model, a file is missing or damaged, or some do not belong together.
    """
    config = read_config(folder) or {}
    if says_packed(config):
        files = packed_files(folder, config, verify_checksums)
        dense = sorted(folder.glob("model*.safetensors"))
        if dense:
            raise ValueError(
                f"A packed folder has no other weights, got {dense[0].name!r} beside them in {str(folder)!r}, and "
                "which of them is meant is not said; take one of the two away."
            )
        return StoredModel(folder, "packed", config, packed_tensors(files, verify_checksums))
    files = plain_files(folder)
    if is_legacy(files):
        return StoredModel(folder, _legacy_layout(config), config, legacy_tensors(files))
    return StoredModel(folder, "dense", config, plain_tensors(files))


def _legacy_layout(config: dict[str, Any]) -> str:
    for key in ("quantization_config", "compression_config"):
        sparsity = (config.get(key) or {}).get("sparsity_config") or {}
        if sparsity.get("format"):
            return str(sparsity["format"])
    return "sparse-bitmask"
