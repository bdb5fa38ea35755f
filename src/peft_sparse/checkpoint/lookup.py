"""What a model's name tells before its weights are read: the base of an adapter, and a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from transformers import AutoTokenizer

from peft_sparse.storage import may_be_on_the_hub
from peft_sparse.storage.folders import read_json

# Any of these tells that a folder has a tokenizer.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.spm", "*.codes")
PRUNED = "pruned"  # the folder in which `finetune` keeps a base that it pruned, beside adapters and checkpoints


def check_source(source: str | Path) -> Path:
    """Raises:
    ValueError: unless it is a folder or may be a name on the Hub."""
    folder = Path(source)
    if not folder.is_dir() and (folder.exists() or not may_be_on_the_hub(source)):
        raise ValueError(f"A model is a folder or a name on the Hub, got {str(source)!r}, which is no folder here.")
    return folder


def is_adapter(source: str | Path) -> bool:
    """Whether it is a folder with an adapter."""
    return (Path(source) / "adapter_config.json").is_file()


def adapter_settings(folder: str | Path) -> dict[str, Any]:
    """What the adapter_config.json of a folder has.

    Raises:
        ValueError: if that is no JSON object."""
    settings = read_json(Path(folder) / "adapter_config.json")
    if isinstance(settings, dict):
        return settings
    raise ValueError(
        f"An adapter_config.json is a JSON object, got {type(settings).__name__} in {str(folder)!r}; save or download "
        "the adapter again."
    )


def check_method(folder: str | Path) -> None:
    """Before an adapter's base is loaded.

    Raises:
        ValueError: if the adapter is of a method that the installed PEFT does not have."""
    method = adapter_settings(folder).get("peft_type")
    if method not in list(PeftType):
        raise ValueError(
            f"An adapter_config.json has a method of PEFT's as `peft_type`, got {method!r} in {str(folder)!r}; update "
            "PEFT if it is a newer one, else save or download the adapter again."
        )


def check_merges(folder: str | Path) -> None:
    """Before an adapter's base is loaded.

    Raises:
        ValueError: if the adapter has no place in the base's weights, as a prompt that is learned has none."""
    check_method(folder)
    method = adapter_settings(folder)["peft_type"]
    if not hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(method), "merge_and_unload"):
        raise ValueError(
            f"Merging adds an adapter to its base's weights, got one of {method} in {str(folder)!r}, which changes "
            "none of them; use it beside its base, with `PeftModel.from_pretrained(base, adapter)`."
        )


def base_of_adapter(folder: str | Path) -> str | Path:
    """The base model that an adapter names, or the folder beside the adapter that it was when the adapter was saved:
    a run is evaluated from other working directories, and moved.

    Raises:
        ValueError: if it names none, or a revision of one on the Hub, where another would be read."""
    settings = adapter_settings(folder)
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not base or not isinstance(base, str):
        got = repr(base) if base else "none"
        raise ValueError(f"An adapter names its base model, got {got} in {str(folder)!r}; pass it as `base`.")
    named = Path(base)
    beside = Path(folder).absolute().parent / named.name
    # "owner/model" may be a name on the Hub, whatever a folder here is called; but not if that is the place it had.
    moved = not named.is_dir() and (len(named.parts) > 2 or named.name == PRUNED)
    kept = len(named.parts) > 1 and beside.parts[-len(named.parts) :] == named.parts
    if beside.is_dir() and (moved or kept):
        return beside
    if revision not in (None, "main") and not named.is_dir():
        raise ValueError(
            f"The base of an adapter is read as it is on the Hub's main branch, got revision {revision!r} of {base!r} "
            f"in {str(folder)!r}; get that one (`hf download {base} --revision {revision} --local-dir FOLDER`), and "
            "pass the folder as `base`."
        )
    return base


def has_tokenizer(source: str | Path) -> bool:
    """Whether there is a tokenizer in a folder."""
    return any(any(Path(source).glob(pattern)) for pattern in TOKENIZER_FILES)


def load_tokenizer(source: str | Path, *, gguf_file: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model.

    Args:
        source: a folder or a name on the Hub; an adapter without one has that of its base.
        gguf_file: a file in that folder that holds it.
        trust_remote_code: run code that comes with the model.

    Raises:
        ValueError: if there is none.
    """
    folder = check_source(source)
    if gguf_file is None and folder.is_dir() and not has_tokenizer(folder):
        if is_adapter(folder):
            return load_tokenizer(base_of_adapter(folder), trust_remote_code=trust_remote_code)
        if not (folder / "config.json").is_file() and not any(folder.glob("*.gguf")):
            raise ValueError(
                f"A model's folder has a config.json, a tokenizer's a tokenizer.json, got {str(source)!r} with "
                "neither; check the path."
            )
        raise ValueError(
            f"A tokenizer lies beside its model, got none in {str(source)!r}; name the model that it came with, by "
            "`--tokenizer` or a recipe's `model.tokenizer`."
        )
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **extra)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(
            f"A tokenizer is loaded from a folder or a name on the Hub, got {str(source)!r}: "
            f"{' '.join(str(error).split())}"
        ) from error
