"""Save a model without its zeros, in the packed format v1 of `storage/format.py`.

What is saved under which name, tied weights once and converted ones in their original form, is transformers' own
business: `save_pretrained` writes the dense model into a temporary folder, and its files are packed one by one. That
takes disk space for both for a while, and no more memory than one shard.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from peft_sparse.checkpoint.card import check_method, may_replace, write_model_card
from peft_sparse.checkpoint.commit import new_files
from peft_sparse.checkpoint.labels import keep_labels
from peft_sparse.checkpoint.packed import packed_linears, packed_weights, transposed_weights, unpacked_state
from peft_sparse.checkpoint.shards import pack_folder
from peft_sparse.linears import check_own_weight, linears_inside, not_read, stored_state
from peft_sparse.storage.origin import BASE_MODEL, CONFIG_KEY, METHOD, facts_of, hub_name

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_DENSE_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "model.safetensors.index.json")


def save_sparse(
    model: PreTrainedModel,
    folder: str | Path,
    max_shard_size: int | str = "5GB",
    tokenizer: Any = None,
    base_model: str | None = None,
    method: str | None = None,
) -> None:
    """Save a model so that zeros take one bit each. [`load_sparse`] gives it back, bit for bit.

    There is one exception, with a warning: where more than a sixteenth of a weight's entries are negative zeros, as
    `weight * mask` leaves them, they come back without their sign.

    A tensor that would not become smaller is stored as it is. The folder gets what `save_pretrained` writes (config,
    generation config, code of custom models), but `sparse_model*.safetensors` in place of `model*.safetensors`, so
    that plain transformers raises instead of loading random weights. All of it is written beside the folder's old
    contents, and replaces them once it is complete.

    Args:
        model: of transformers, with adapters merged; dense or packed.
        folder: where to save; made if it is not there. An older packed checkpoint in it is replaced.
        max_shard_size: of one file, in bytes or as "200MB"; a larger tensor gets a file of its own.
        tokenizer: a tokenizer or processor to save with it.
        base_model: for the model card, what it was made from; None: what the model's config says, or else the name on
            the Hub that it was loaded by, if any.
        method: for the model card, `"pst"` or `"spp"`; None: the one that was merged, if any.

    Raises:
        ValueError: if the model has adapters, is quantised, wrapped by `torch.compile` or not a transformers model, if
            torch.nn.utils.prune or a parametrization is on a linear layer, or if the folder holds dense weights, which
            plain transformers would load in place of these. Nothing is written then.

    Examples:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_sparse.pruning import prune_magnitude
        >>> config = LlamaConfig(
        ...     vocab_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = prune_magnitude(LlamaForCausalLM(config), sparsity=0.75)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_sparse(model, folder)
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['README.md', 'config.json', 'generation_config.json', 'sparse_model.safetensors']
    """
    folder, limit = Path(folder), shard_size(max_shard_size)
    check_method(method)
    _check_model(model)
    _check_folder(folder)
    known = {BASE_MODEL: hub_name(model.name_or_path)} | facts_of(getattr(model.config, CONFIG_KEY, None))
    facts = {BASE_MODEL: base_model or known[BASE_MODEL], METHOD: method or known.get(METHOD)}
    with new_files(folder) as temporary:
        state = _state(model)
        type(model).save_pretrained(model, temporary, max_shard_size=limit, state_dict=state)
        keep_labels(model, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        pack_folder(temporary, limit, transposed_weights(model), packed_weights(model), facts)
        if may_replace(folder / "README.md"):
            write_model_card(temporary)


def _state(model: PreTrainedModel) -> dict[str, Any] | None:
    """What to hand to `save_pretrained`; None where it finds the tensors itself, as it does with a device_map."""
    if packed_linears(model):
        return unpacked_state(model)
    offloaded = getattr(model, "hf_device_map", None) is None and any(p.is_meta for p in model.parameters())
    return dict(stored_state(model)) if offloaded else None


def _check_model(model: Any) -> None:
    adapters = (PeftModel, BaseTunerLayer, AuxiliaryTrainingWrapper)
    if isinstance(model, nn.Module) and any(isinstance(module, adapters) for module in model.modules()):
        raise ValueError(
            f"`save_sparse` saves a whole model, got adapters in {type(model).__name__}; merge them with "
            "`model = model.merge_and_unload()`, or save them alone with `save_pretrained`."
        )
    _check_not_compiled(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"`save_sparse` saves models of transformers, got {type(model).__name__}; wrap it in one.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"`save_sparse` packs floating point weights, got a quantized {type(model).__name__}; load it without "
            "quantization, or dequantize it with `model.dequantize()`."
        )
    if unread := not_read(model):
        raise ValueError(f"`save_sparse` packs floating point weights, got {type(model).__name__}{unread}.")
    for name, linear in linears_inside(model).items():
        check_own_weight(name, linear)


def _check_not_compiled(model: Any) -> None:
    """The wrapper of `torch.compile` is in the names of all tensors below it, which no model that is loaded has."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    compiled = next((name for name, module in modules if hasattr(module, "_orig_mod")), None)
    if compiled is not None:
        what, way_out = f"`{compiled}`", "put its `_orig_mod` back in its place"
        if not compiled:
            what, way_out = "all of it", "save `model._orig_mod`"
        raise ValueError(
            f"`save_sparse` saves a model under its own names, got {what} wrapped by `torch.compile`; {way_out}, or "
            "compile with `module.compile()`, which wraps nothing."
        )


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`save_sparse` writes into a folder, got {str(folder)!r}, which is a file.")
    dense = sorted(path.name for pattern in _DENSE_WEIGHTS for path in folder.glob(pattern))
    if dense:
        raise ValueError(
            f"A packed checkpoint has no dense weights beside it, which plain transformers would load in its place, "
            f"got {dense[0]!r} in {str(folder)!r}; choose another folder, or remove them first."
        )


def shard_size(size: int | str) -> int:
    """Bytes, of such a number or a text as "200MB".

    Raises:
        ValueError: for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", str(size), re.IGNORECASE)
    number = float(match[1]) * _UNITS[(match[2] or "").upper()] if match else 0
    if number < 1 or isinstance(size, bool):
        raise ValueError(f"`max_shard_size` is a number of bytes from 1 up, such as 10**9 or '200MB', got {size!r}.")
    return int(number)
