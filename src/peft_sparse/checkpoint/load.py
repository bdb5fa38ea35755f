"""Load a packed checkpoint, ours or one in an old layout of compressed-tensors, as the model it was saved from.

transformers builds the model, exactly as for a dense checkpoint (dtype, tied weights, non-persistent buffers, keys of
older versions): what it gets in place of tensors are `StoredTensor`s, each of which is read, checked and unpacked at
the moment at which transformers wants it. So no second copy of the model ever exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from peft_sparse.checkpoint.complete import check_complete, check_shapes
from peft_sparse.checkpoint.lazy import LazyTensor
from peft_sparse.checkpoint.model_class import class_for, saved_class
from peft_sparse.checkpoint.packed import packed_targets, put_packed_linears
from peft_sparse.storage import CONFIG_KEY, StoredModel, StoredTensor, facts_of, locate, open_model
from peft_sparse.storage.folders import packed_path

_LEGACY_CONFIG_KEYS = ("quantization_config", "compression_config")


def load_sparse(
    dir_or_repo: str | Path,
    packed: bool = False,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    *,
    verify_checksums: bool = True,
    model_cls: type[PreTrainedModel] | None = None,
    config: Mapping[str, Any] | None = None,
    ignore_mismatched_sizes: bool = False,
    trust_remote_code: bool = False,
    on_missing: Callable[[list[str]], Any] | None = None,
    **download: Any,
) -> PreTrainedModel:
    """Load what [`save_sparse`] saved.

    Also reads the layouts `sparse-bitmask` and `sparse-24-bitmask` of compressed-tensors up to 0.14, which today's
    transformers loads with random weights.

    Args:
        dir_or_repo: a folder, or a repository on the Hub.
        packed: leave the linear layers of the transformer blocks packed, as `PackedLinear`s, which take the memory of
            what is stored and can be trained on. False: an ordinary dense model, like that of `from_pretrained`.
        dtype: of the model; None: of each tensor the one in which it was saved, unless transformers keeps it in
            float32.
        device: where to put the model; None: the CPU.
        verify_checksums: False skips the comparison with the checksums, to save its time or to load files that were
            changed on purpose. Shapes, bits and values are compared with each other in any case.
        model_cls: the class of the model, or one of transformers' Auto classes; None: the one that config.json names.
            What another class has beyond the transformer blocks, such as a new head, is random, with a warning.
        config: fields of the model's config to change before it is made, such as `num_labels`.
        ignore_mismatched_sizes: initialise anew, with a warning, what has another shape in the files, such as a head
            with another number of labels. A linear layer of the transformer blocks has the shape that was saved in any
            case.
        trust_remote_code: run the code that a repository brings along, for models whose class is defined there.
        on_missing: called, in place of those warnings, with the full names of what is random.
        **download: `revision`, `token`, `cache_dir` and others for huggingface_hub's `snapshot_download`; no others.

    Returns:
        The model, in evaluation mode. It can be saved again, by [`save_sparse`] or densely by `save_pretrained`.

    Raises:
        ValueError: if there is no such checkpoint, or if any of it is damaged; the message names the tensor, and the
            file where that is missing or unreadable; or for a field that the config does not have.
        TypeError: for an argument that is none of these.

    Examples:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_sparse import prune_magnitude, save_sparse
        >>> config = LlamaConfig(
        ...     vocab_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_sparse(prune_magnitude(LlamaForCausalLM(config), sparsity=0.75), folder)
        ...     model = load_sparse(folder, packed=True)
        >>> model.model.layers[0].mlp.up_proj
        PackedLinear(in_features=32, out_features=64, bias=False, kept=25.0%)
    """
    folder = locate(dir_or_repo, **download)
    stored = open_model(folder, verify_checksums)
    if stored.layout == "dense":
        raise ValueError(
            f"`load_sparse` reads packed checkpoints, got a dense one in {str(folder)!r}; load it with "
            "`from_pretrained`."
        )
    model = load_stored(
        stored,
        packed=packed,
        dtype=dtype,
        device=device,
        check_first=not verify_checksums,
        model_cls=model_cls,
        changes=config,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
        trust_remote_code=trust_remote_code,
        on_missing=on_missing,
    )
    model.config.name_or_path = model.name_or_path = str(dir_or_repo)
    return model


def load_stored(
    stored: StoredModel,
    *,
    packed: bool = False,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    exact: bool = False,
    check_first: bool = False,
    model_cls: type[PreTrainedModel] | None = None,
    changes: Mapping[str, Any] | None = None,
    ignore_mismatched_sizes: bool = False,
    trust_remote_code: bool = False,
    on_missing: Callable[[list[str]], Any] | None = None,
) -> PreTrainedModel:
    """[`load_sparse`] of a folder that was looked at, which may be dense.

    Args:
        exact: each tensor has the dtype in which it was saved, with no exception: to be written to files again.
        check_first: whether a config.json that nobody has verified is compared with the shapes before memory is asked
            for.
        changes: `config` of [`load_sparse`].
    """
    config = _config(stored, trust_remote_code, changes or {})
    if model_cls is None:
        model_cls = saved_class(stored, trust_remote_code)
    model_cls = class_for(model_cls, config, stored, trust_remote_code)
    if check_first:
        check_shapes(model_cls, config, stored, ignore_mismatched_sizes)
    targets = packed_targets(model_cls, config, stored.tensors) if packed else {}
    model, info = _build(model_cls, config, stored, targets, dtype, None if packed else device, exact)
    check_complete(model, stored, info, ignore_mismatched_sizes, on_missing, stacklevel=3)
    _load_generation_config(model, stored)
    model.config.name_or_path = model.name_or_path = str(stored.folder)
    put_packed_linears(model, targets)
    return model.to(device) if packed and device is not None else model


def _config(stored: StoredModel, trust_remote_code: bool, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """The model's config, some fields changed, without what says how it is stored: once it is loaded, it is not so."""
    config, unknown = AutoConfig.from_pretrained(
        stored.folder, trust_remote_code=trust_remote_code, return_unused_kwargs=True, **changes
    )
    if unknown:
        raise ValueError(
            f"`config` changes fields that a {type(config).__name__} has, got {sorted(unknown)[0]!r}; leave it out, "
            "or write its name as config.json does."
        )
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


def _build(
    model_cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    stored: StoredModel,
    packed: dict[str, StoredTensor],
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    exact: bool,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, with a stand-in for the weight of each linear in `packed`, and what transformers tells about it."""
    as_saved = dtype is None or dtype == "auto"
    if as_saved:
        dtype = config.dtype or next((x.dtype for x in stored.tensors.values() if x.dtype.is_floating_point), None)
    dtype = _dtype(dtype)
    stand_ins = {tensor.name for tensor in packed.values()}
    tensors = {
        name: LazyTensor(tensor, dtype if as_saved else None, exact=exact, stand_in=name in stand_ins)
        for name, tensor in stored.tensors.items()
    }
    try:
        with _one_thread_each():
            return model_cls.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                device_map=None if device is None else {"": device},
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `check_complete` names them
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


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.get_default_dtype()
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"`dtype` of a model is a floating one, such as torch.bfloat16 or 'bfloat16', got {dtype!r}.")
    return found


def _load_generation_config(model: PreTrainedModel, stored: StoredModel) -> None:
    """As transformers does for a folder. One that is handed to its `from_pretrained` is taken for a changed one, and
    refused when it is saved if it is not strictly valid, which published ones are not."""
    path = stored.folder / "generation_config.json"
    if stored.layout == "packed":
        path = packed_path(stored.folder, stored.config, path.name)
    if model.can_generate() and path.is_file():
        model.generation_config = type(model.generation_config).from_pretrained(path.parent)
