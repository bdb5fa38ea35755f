"""Where a model's files are: a folder here or a repository on the Hub, and which of its files hold the weights."""

from __future__ import annotations

import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from peft_sparse.storage.companions import SUBFOLDERS, UNWANTED
from peft_sparse.storage.files import SafetensorsFile, crc32
from peft_sparse.storage.format import INDEX_NAME, WEIGHTS_NAME, check_config
from peft_sparse.storage.origin import CONFIG_KEY

_WAY_OUT = "pass a folder that `save_pretrained` wrote with safetensors, or the model itself"


def locate(source: str | Path, **download: Any) -> Path:
    """The folder of a model: `source` itself, or where the Hub's repository of this name is once it is downloaded.

    Args:
        source: a folder, or a repository such as "owner/name".
        **download: `revision`, `token`, `cache_dir` and others for huggingface_hub's `snapshot_download`.

    Raises:
        ValueError: if it is neither, or the Hub cannot be reached.
        TypeError: for another argument.
    """
    if unknown := sorted(download.keys() - _download_arguments()):
        raise TypeError(
            f"Arguments beyond those that are documented are for the download, {sorted(_download_arguments())}, got "
            f"`{unknown[0]}`; a model's `torch_dtype` and `device_map` are `dtype` and `device` here."
        )
    return _locate(source, [], download)


def locate_companions(source: str | Path) -> Path:
    """[`locate`] for what lies beside the weights of a model."""
    return _locate(source, ["*.safetensors"], {})


def _locate(source: str | Path, unwanted: list[str], download: dict[str, Any]) -> Path:
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"A stored model is a folder, got {type(source).__name__}, which names none; {_WAY_OUT}.")
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or not may_be_on_the_hub(source):
        raise ValueError(f"A stored model is a folder, got {str(path)!r}, which is none; {_WAY_OUT}.")
    try:
        return Path(snapshot_download(str(source), ignore_patterns=[*SUBFOLDERS, *UNWANTED, *unwanted], **download))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(
            f"A stored model is a folder or a repository on the Hub, got {str(source)!r}, which is no folder here and "
            f"could not be downloaded ({type(error).__name__}: {str(error).strip().splitlines()[0]}); check the "
            f"name and the connection, or {_WAY_OUT}."
        ) from error


def may_be_on_the_hub(source: str | Path) -> bool:
    """Whether this has the form of a repository's name."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)) is not None and not str(source).startswith(".")


def _download_arguments() -> set[str]:
    """What `snapshot_download` takes and we do not decide."""
    ours = {"repo_id", "repo_type", "allow_patterns", "ignore_patterns", "dry_run"}
    return inspect.signature(snapshot_download).parameters.keys() - ours


def read_json(path: Path) -> Any:
    """Raises:
    ValueError: if the file is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # nested deeper than Python goes
        raise ValueError(f"{str(path)!r} is JSON, got something else ({error}); save or download it again.") from error


def read_config(folder: Path) -> dict[str, Any] | None:
    """What config.json says; None where there is none."""
    if not (folder / "config.json").is_file():
        return None
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"config.json is a JSON object, got {type(config).__name__} in {str(folder)!r}.")
    return config


def pending(folder: Path, config: dict[str, Any]) -> Path:
    """Where `save_sparse` has a folder's new files until they are moved to their places, after config.json.

    The name belongs to one config.json, so whatever moment a save ended at, config.json tells which files are its.
    """
    return folder / f".sparse_model-{config[CONFIG_KEY].get('crc32')}"


def packed_files(folder: Path, config: dict[str, Any], verify: bool) -> list[SafetensorsFile]:
    """The files of a folder in packed format, each known to be the one that was saved.

    Raises:
        ValueError: if one is missing or is another one.
    """
    files = []
    for name, checksum in check_config(config, folder / "config.json", verify).items():
        path = packed_path(folder, config, name)
        if path.suffix == ".safetensors":
            files.append(_open(path, _packed_keys(folder, config, name)))
            found = files[-1].header_crc32
        elif path.is_file():
            found = crc32(path.read_bytes())
        else:
            raise ValueError(f"config.json lists {name!r}, got no such file in {str(folder)!r}; download it again.")
        if verify and found != checksum:
            raise ValueError(
                f"{name!r} is as it was saved (CRC-32 {checksum}), got {found} in {str(folder)!r}: it is damaged, or "
                "of another save; save or download it again, or pass `verify_checksums=False` if you changed it on "
                f"purpose.{_holds(_packed_keys(folder, config, name))}"
            )
    if not files:
        raise ValueError(f"A packed folder has files sparse_model*.safetensors, got none listed in {str(folder)!r}.")
    if INDEX_NAME in config[CONFIG_KEY]["files"]:
        _check_index(files, packed_path(folder, config, INDEX_NAME))
    return files


def _open(path: Path, keys: list[str]) -> SafetensorsFile:
    """A file that holds some tensors, whose error names them."""
    try:
        return SafetensorsFile(path)
    except ValueError as error:
        raise ValueError(f"{error}{_holds(keys)}") from error


def _holds(keys: list[str]) -> str:
    rest = f" and {len(keys) - 3} more tensors" if len(keys) > 3 else ""
    return f" It holds {', '.join(f'`{key}`' for key in keys[:3])}{rest}." if keys else ""


def _packed_keys(folder: Path, config: dict[str, Any], name: str) -> list[str]:
    """The tensors that a file has to have: the index tells, or config.json if there is no other file."""
    if not name.endswith(".safetensors"):
        return []
    if INDEX_NAME in config[CONFIG_KEY]["files"]:
        index = packed_path(folder, config, INDEX_NAME)
        return sorted(key for key, file in _weight_map(index).items() if file == name) if index.is_file() else []
    return [f"{module}.weight" for module in config[CONFIG_KEY].get("modules", {})]


def packed_path(folder: Path, config: dict[str, Any], name: str) -> Path:
    """Where a file of a packed folder is, see [`pending`]."""
    if Path(name).name != name:
        raise ValueError(f"config.json lists files of its own folder, got {name!r} in {str(folder)!r}.")
    moving = pending(folder, config) / name
    return moving if moving.is_file() else folder / name


def plain_files(folder: Path) -> list[SafetensorsFile]:
    """The files of a folder that `save_pretrained` wrote, or something like it: never those of pickled weights.

    Raises:
        ValueError: if there are none, or some are missing.
    """
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    # A save in shards may have been here before one in a single file, which is what transformers takes too.
    weight_map = _weight_map(index) if index.is_file() and not whole.is_file() else {}
    paths = [whole] if whole.is_file() else sorted(folder.glob("model*.safetensors"))
    if weight_map:
        paths = [folder / name for name in sorted(set(weight_map.values()))]
    elif not paths:  # by another name, as some of those who publish models do
        others = sorted(folder.glob("*.safetensors"))
        paths = [path for path in others if not path.name.startswith(("adapter_model", "sparse_model"))]
    if not paths:
        raise ValueError(_nothing_to_read(folder))
    files = [_open(path, sorted(key for key, name in weight_map.items() if name == path.name)) for path in paths]
    if weight_map:
        _check_index(files, index)
    return files


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or any(Path(str(name)).name != name for name in weight_map.values()):
        raise ValueError(f"{str(index)!r} maps tensors to files beside it, got something else; download it again.")
    return weight_map


def _check_index(files: list[SafetensorsFile], index: Path) -> None:
    """Raises:
    ValueError: if the index does not list the tensors of the files."""
    weight_map = _weight_map(index)
    for file in files:
        listed = {key for key, name in weight_map.items() if name == file.path.name}
        odd = sorted(listed ^ file.header.keys())
        if odd:
            raise ValueError(
                f"The index lists what is in each file, got `{odd[0]}` in only one of {index.name} and "
                f"{file.path.name} in {str(index.parent)!r}; save or download them again."
            )
    missing = sorted(set(weight_map.values()) - {file.path.name for file in files})
    if missing:
        raise ValueError(
            f"The index lists {missing[0]!r}, got no such file in {str(index.parent)!r}; download it again."
        )


def _nothing_to_read(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return (
            f"A stored model has all of its weights, got an adapter in {str(folder)!r}; merge it first with "
            "`peft-sparse merge`, or load it with `AutoPeftModelForCausalLM` (or its sibling for your task) and pass "
            "that model."
        )
    if any(folder.glob("sparse_model*.safetensors")):
        return (
            f"A packed model has a config.json with an entry {CONFIG_KEY!r}, got {WEIGHTS_NAME} or its shards without "
            f"one in {str(folder)!r}: config.json is missing, or another save replaced it; save or download it again."
        )
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        return (
            f"A stored model has safetensors files, got only pickled ones in {str(folder)!r}, which run code when "
            "they are read and are not opened here; load them with transformers, and save the model again."
        )
    return f"A stored model has files model*.safetensors, got none in {str(folder)!r}; {_WAY_OUT}."
