"""The weights of a model on disk, one at a time, without building the model in memory.

Which of the stored tensors are linears of the transformer blocks, and which ones are stored transposed (GPT-2), only
the model knows. So it is built from its config.json on the meta device, where it has names and shapes but no memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import nn

from peft_sparse.linears import as_stored, block_linears, linears_inside


def stored_weights(path: Path, notes: list[str]) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """(name, tensor, whether it is the weight of a linear) for every tensor of a model on disk.

    Args:
        path: a folder with `model*.safetensors`.
        notes: gets a line if the folder does not tell which tensors are linears. Every 2-D tensor then counts as one,
            as it is stored.

    Yields:
        The weights of linears as (out, in), under the linear's name; the others under their own name, as stored.

    Raises:
        ValueError: if there are no such files.
    """
    files = _model_files(path)
    keys = {key for file in files for key in _keys(file)}
    linears = _linears_of(path, keys)
    if linears is None:
        notes.append(
            "config.json does not tell which of these are linears: every 2-D tensor is listed, embeddings included, "
            "in the orientation in which it is stored"
        )
    for file in files:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                tensor, name = tensors.get_tensor(key), key.removesuffix(".weight")
                if linears is None:
                    yield name, tensor, tensor.dim() == 2 and tensor.is_floating_point()
                elif key in linears:
                    yield name, as_stored(linears[key], tensor), True
                else:
                    yield key, tensor, False


def _model_files(path: Path) -> list[Path]:
    way_out = "pass a folder that `save_pretrained` wrote with safetensors, or the model itself"
    if not path.is_dir():
        raise ValueError(f"A stored model is a folder, got {str(path)!r}, which is none; {way_out}.")
    files = sorted(path.glob("model*.safetensors"))
    if files:
        return files
    if (path / "adapter_config.json").exists():
        raise ValueError(
            f"A stored model has all of its weights, got an adapter in {str(path)!r}; load it with "
            "`AutoPeftModelForCausalLM` (or its sibling for your task) and pass that model."
        )
    if any(path.glob("sparse_model*.safetensors")):
        raise ValueError(
            f"A stored model has plain weights, got packed ones in {str(path)!r}; load it with `load_sparse` and pass "
            "that model."
        )
    raise ValueError(f"A stored model has files model*.safetensors, got none in {str(path)!r}; {way_out}.")


def _keys(file: Path) -> list[str]:
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def _linears_of(path: Path, keys: set[str]) -> dict[str, nn.Module] | None:
    """The linears (on the meta device) by the key of their stored weight; None if the folder does not tell."""
    if not (path / "config.json").is_file():
        return None
    names = json.loads((path / "config.json").read_text()).get("architectures") or [""]
    model_cls = getattr(transformers, names[0], None)
    if model_cls is None:
        return None
    with torch.device("meta"):
        model = model_cls(model_cls.config_class.from_pretrained(path))
    linears = {f"{name}.weight": linear for name, linear in (block_linears(model) or linears_inside(model)).items()}
    return linears if linears.keys() <= keys else None
