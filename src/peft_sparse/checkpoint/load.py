"""Load a packed checkpoint, ours or one in an old layout of compressed-tensors, as the model it was saved from.

transformers builds the model, exactly as for a dense checkpoint (dtype, tied weights, non-persistent buffers, keys of
older versions): what it gets in place of tensors are `StoredTensor`s, each of which is read, checked and unpacked at
the moment at which transformers wants it. So no second copy of the model ever exists.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from peft_sparse.checkpoint.packed import StandIn, packed_targets, put_packed_linears
from peft_sparse.storage import StoredModel, StoredTensor, locate, open_model
from peft_sparse.storage.folders import packed_path
from peft_sparse.storage.format import CONFIG_KEY, PRUNING

_LEGACY_CONFIG_KEYS = ("quantization_config", "compression_config")


def load_sparse(
    dir_or_repo: str | Path,
    packed: bool = False,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    *,
    verify_checksums: bool = True,
    model_cls: type[PreTrainedModel] | None = None,
    trust_remote_code: bool = False,
    **download: Any,
) -> PreTrainedModel:
    """Load what [`save_sparse`] saved.

    Also reads the layouts `sparse-bitmask` and `sparse-24-bitmask` of compressed-tensors up to 0.14, which today's
    transformers loads with random weights.

    Args:
        dir_or_repo: a folder, or a repository on the Hub.
        packed: leave the linears of the transformer blocks packed, as `PackedLinear`s, which take the memory of what
            is stored and can be trained on. False: an ordinary dense model, like that of `from_pretrained`.
        dtype: of the model; None: the one in which it was saved.
        device: where to; None: the CPU.
        verify_checksums: False skips the comparison with the checksums, to save its time or to load files that were
            changed on purpose. Shapes, bits and values are compared with each other in any case.
        model_cls: the class of the model; None: the one that config.json names.
        trust_remote_code: run the code that a repository brings along, for models whose class is there.
        **download: `revision`, `token`, `cache_dir` and others for huggingface_hub's `snapshot_download`.

    Returns:
        The model, in evaluation mode. It can be saved again, by [`save_sparse`] or densely by `save_pretrained`.

    Raises:
        ValueError: if there is no such checkpoint, or if any of it is damaged; the message names the tensor or file.
    """
    folder = locate(dir_or_repo, **download)
    stored = open_model(folder, verify_checksums)
    if stored.layout == "dense":
        raise ValueError(
            f"`load_sparse` reads packed checkpoints, got a dense one in {str(folder)!r}; load it with "
            "`from_pretrained`."
        )
    config = _config(stored, trust_remote_code)
    model_cls = model_cls or _model_cls(stored, trust_remote_code)
    if not packed:
        return _build(model_cls, config, stored, {}, dtype, device)
    targets = packed_targets(model_cls, config, stored.tensors)
    model = _build(model_cls, config, stored, targets, dtype, None)
    put_packed_linears(model, targets)
    return model if device is None else model.to(device)


def _config(stored: StoredModel, trust_remote_code: bool) -> PreTrainedConfig:
    """The model's config without what says how it is stored, which is no longer so once it is loaded."""
    config = AutoConfig.from_pretrained(stored.folder, trust_remote_code=trust_remote_code)
    for key in _LEGACY_CONFIG_KEYS:
        if hasattr(config, key):
            if (stored.config.get(key) or {}).get("config_groups"):
                raise ValueError(
                    f"`load_sparse` reads sparse floating point weights, got quantized ones in "
                    f"{str(stored.folder)!r}; load it with the versions of transformers and compressed-tensors that "
                    "wrote it."
                )
            delattr(config, key)
    if hasattr(config, CONFIG_KEY):
        facts = getattr(config, CONFIG_KEY).get(PRUNING)
        delattr(config, CONFIG_KEY)
        if facts:
            setattr(config, CONFIG_KEY, {PRUNING: facts})
    return config


def _model_cls(stored: StoredModel, trust_remote_code: bool) -> type[PreTrainedModel]:
    name = (stored.config.get("architectures") or [""])[0]
    found = getattr(transformers, name, None)
    if found is not None:
        return found
    code = stored.config.get("auto_map") or {}
    places = [place for place in code.values() if isinstance(place, str) and place.split(".")[-1] == name]
    if places and trust_remote_code:
        return get_class_from_dynamic_module(places[0], str(stored.folder))
    raise ValueError(
        f"config.json names the class of the model, one of transformers', got {name!r} in {str(stored.folder)!r}; "
        "pass the class as `model_cls`" + (", or `trust_remote_code=True`." if places else ".")
    )


def _build(
    model_cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    stored: StoredModel,
    packed: dict[str, StoredTensor],
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
) -> PreTrainedModel:
    """The model, with a stand-in for the weight of each linear in `packed`."""
    tensors = {name: _Watched(tensor) for name, tensor in stored.tensors.items()}
    generation = _generation_config(stored)
    if dtype is None or dtype == "auto":
        dtype = config.dtype or next((x.dtype for x in stored.tensors.values() if x.dtype.is_floating_point), None)
    try:
        model, info = model_cls.from_pretrained(
            None,
            config=config,
            state_dict=tensors | {f"{name}.weight": StandIn(tensor, _dtype(dtype)) for name, tensor in packed.items()},
            dtype=dtype,
            device_map=None if device is None else {"": device},
            generation_config=generation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # we name them below
        )
    except Exception as error:
        # transformers wraps what happens while it reads: hand on our own word for it
        own = next((tensor.error for tensor in tensors.values() if tensor.error is not None), None)
        if own is not None:
            raise own from error
        raise
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    for kind, names in wrong.items():
        if names:
            raise ValueError(
                f"A packed checkpoint has exactly the tensors of its model, got {kind.replace('_', ' ')} {names[:3]} "
                f"({len(names)} in all) for {model_cls.__name__} in {str(stored.folder)!r}; it is damaged, or "
                "config.json is that of another model."
            )
    model.config.name_or_path = model.name_or_path = str(stored.folder)
    return model


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.get_default_dtype()


class _Watched:
    """A stored tensor that remembers why it could not be read."""

    def __init__(self, tensor: StoredTensor) -> None:
        self.tensor = tensor
        self.error: Exception | None = None

    def __getitem__(self, index: Any) -> torch.Tensor:
        try:
            return self.tensor[index]
        except Exception as error:
            self.error = error
            raise


def _generation_config(stored: StoredModel) -> GenerationConfig | None:
    path = stored.folder / "generation_config.json"
    if stored.layout == "packed":
        path = packed_path(stored.folder, stored.config, path.name)
    return GenerationConfig.from_pretrained(path.parent) if path.is_file() else None
