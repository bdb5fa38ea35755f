"""Load a packed checkpoint, ours or one in an old layout of compressed-tensors, as the model it was saved from.

transformers builds the model, exactly as for a dense checkpoint (dtype, tied weights, non-persistent buffers, keys of
older versions): what it gets in place of tensors are `StoredTensor`s, each of which is read, checked and unpacked at
the moment at which transformers wants it. So no second copy of the model ever exists.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from peft_sparse.checkpoint.packed import StandIn, packed_targets, put_packed_linears
from peft_sparse.linears import block_linears
from peft_sparse.storage import CONFIG_KEY, StoredModel, StoredTensor, facts_of, locate, open_model
from peft_sparse.storage.folders import packed_path
from peft_sparse.storage.model import transformers_class
from peft_sparse.storage.names import names_in_model

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
    on_missing: Callable[[list[str]], Any] | None = None,
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
        model_cls: the class of the model, or one of transformers' Auto classes; None: the one that config.json names.
            What another class has beyond the transformer blocks, such as a new head, is random, and you are warned.
        trust_remote_code: run the code that a repository brings along, for models whose class is there.
        on_missing: called, in place of that warning, with the full names of what is random.
        **download: `revision`, `token`, `cache_dir` and others for huggingface_hub's `snapshot_download`; no others.

    Returns:
        The model, in evaluation mode. It can be saved again, by [`save_sparse`] or densely by `save_pretrained`.

    Raises:
        ValueError: if there is no such checkpoint, or if any of it is damaged; the message names the tensor, and the
            file where that is missing or unreadable.
        TypeError: for an argument that is none of these.
    """
    folder = locate(dir_or_repo, **download)
    stored = open_model(folder, verify_checksums)
    if stored.layout == "dense":
        raise ValueError(
            f"`load_sparse` reads packed checkpoints, got a dense one in {str(folder)!r}; load it with "
            "`from_pretrained`."
        )
    config = _config(stored, trust_remote_code)
    saved_cls = None if model_cls is not None else _saved_cls(stored, trust_remote_code)
    model_cls = _of_auto_class(saved_cls or model_cls, config)
    if not verify_checksums:
        _check_shapes(model_cls, config, stored)
    targets = packed_targets(model_cls, config, stored.tensors) if packed else {}
    model, info = _build(model_cls, config, stored, targets, dtype, None if packed else device)
    _check_complete(model, stored, info, on_missing)
    model.config.name_or_path = model.name_or_path = str(dir_or_repo)
    put_packed_linears(model, targets)
    return model.to(device) if packed and device is not None else model


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
        facts = facts_of(getattr(config, CONFIG_KEY))
        delattr(config, CONFIG_KEY)
        if facts:
            setattr(config, CONFIG_KEY, facts)
    return config


def _saved_cls(stored: StoredModel, trust_remote_code: bool) -> type[PreTrainedModel]:
    name = stored.architecture
    found = transformers_class(name)
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


def _of_auto_class(model_cls: Any, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that an Auto class of transformers stands for; any other is itself."""
    mapping = getattr(model_cls, "_model_mapping", None)
    if mapping is not None and type(config) in mapping:
        found = mapping[type(config)]
        return found[0] if isinstance(found, tuple) else found
    wanted = getattr(model_cls, "config_class", None)
    if mapping is not None or (wanted is not None and not isinstance(config, wanted)):
        raise ValueError(
            f"`model_cls` is a class for the stored model, whose config is a {type(config).__name__}, got "
            f"{model_cls.__name__}; pass another one, or None for the one that was saved."
        )
    return model_cls


def _build(
    model_cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    stored: StoredModel,
    packed: dict[str, StoredTensor],
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, with a stand-in for the weight of each linear in `packed`, and what transformers tells about it."""
    tensors = {name: _Watched(tensor) for name, tensor in stored.tensors.items()}
    generation = _generation_config(stored)
    if dtype is None or dtype == "auto":
        dtype = config.dtype or next((x.dtype for x in stored.tensors.values() if x.dtype.is_floating_point), None)
    dtype = _dtype(dtype)
    try:
        with _one_thread_each():
            return model_cls.from_pretrained(
                None,
                config=config,
                state_dict=tensors | {tensor.name: StandIn(tensor, dtype) for tensor in packed.values()},
                dtype=dtype,
                device_map=None if device is None else {"": device},
                generation_config=generation,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `_check_complete` names them
            )
    except Exception as error:
        # transformers wraps what happens while it reads: hand on our own word for it
        own = next((tensor.error for tensor in tensors.values() if tensor.error is not None), None)
        if own is not None:
            raise own from error
        raise


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """transformers reads several tensors at a time, each in a thread of its own, which would get in each other's way
    if each of them used all cores for one tensor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread, and of those that it starts
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_shapes(model_cls: type[PreTrainedModel], config: PreTrainedConfig, stored: StoredModel) -> None:
    """Before memory is asked for: a config.json that nobody has verified may describe a model of any size.

    Raises:
        ValueError: if a tensor has another shape in the files than in the model."""
    with torch.device("meta"):
        model = model_cls(config)
    state = model.state_dict()
    for key, (name, converted) in names_in_model(model, stored.tensors).items():
        shape, expected = stored.tensors[key].shape, tuple(state[name].shape)
        if not converted and shape != expected:
            raise ValueError(
                f"A packed checkpoint has the tensors of its model, got `{key}` of {shape}, which is {expected} by "
                f"config.json, in {str(stored.folder)!r}; put the config.json back that was saved with it."
            )


def _check_complete(
    model: PreTrainedModel,
    stored: StoredModel,
    info: dict[str, Any],
    on_missing: Callable[[list[str]], Any] | None,
) -> None:
    """Raises:
    ValueError: if the checkpoint is not that of this model. A class other than the one that was saved may have a new
        head, of which the user is warned, and no use for the old one."""
    cls, wrong = type(model).__name__, {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if cls != stored.architecture:
        inside = tuple(f"{name}." for name in block_linears(model))
        wrong.pop("unexpected_keys", None)
        missing = wrong.get("missing_keys", [])
        if missing and not any(name.startswith(inside) for name in missing):
            if on_missing is not None:
                on_missing(missing)
            else:
                warnings.warn(
                    f"{str(stored.folder)!r} holds a {stored.architecture or 'model'}, got `model_cls` {cls}: what "
                    f"only this has is new and random, and has to be trained: {missing[:3]} ({len(missing)} in all).",
                    stacklevel=3,
                )
            del wrong["missing_keys"]
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := wrong.get(kind):
            raise ValueError(
                f"A packed checkpoint has exactly the tensors of its model, got {kind.replace('_', ' ')} {names[:3]} "
                f"({len(names)} in all) for {cls} in {str(stored.folder)!r}; it is damaged, or config.json is that of "
                "another model."
            )


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.get_default_dtype()
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"`dtype` of a model is a floating one, such as torch.bfloat16 or 'bfloat16', got {dtype!r}.")
    return found


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
