"""Which of a Trainer's checkpoints are complete: what a run that was killed can go on from.

`Trainer` writes a checkpoint file by file into its own folder, `trainer_state.json` last, and `resume_from_checkpoint=
True` takes the folder with the highest number, finished or not. A folder counts as complete here if that file is there
and everything beside it can be read to its end. [`CheckpointCallback`] also leaves a manifest of all files with size
and CRC-32, written when all processes are done; where there is one, it is what counts, unless the
checkpoint was saved again since.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
import zlib
from pathlib import Path

from peft_sparse.checkpoint.commit import flush
from peft_sparse.storage.files import SafetensorsFile
from peft_sparse.tuners.adapter_files import PICKLED, WEIGHTS, pickled_weights

logger = logging.getLogger(__name__)

MANIFEST = "peft_sparse_manifest.json"
STATE = "trainer_state.json"
_UNFINISHED = "checkpoint-is-incomplete.txt"  # there while transformers' `enable_jit_checkpoint` saves
SET_ASIDE = "incomplete-"
_NAME = re.compile(r"checkpoint-(\d+)")
_RNG_STATES = "rng_state_*.pth"
_WEIGHTS = ("adapter_model.*", "*/adapter_model.*", "model*.safetensors", "pytorch_model*")


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint of a Trainer that is complete, for `trainer.train(resume_from_checkpoint=...)`.

    Newer ones that a killed run left unfinished, or whose files were damaged since, are skipped with a warning that
    says what is wrong with them.

    Args:
        output_dir: as in `TrainingArguments`.

    Returns:
        Its path; None if there is none, with which `train` starts from the beginning.

    Examples:
        >>> last_complete_checkpoint("a folder that is not there") is None
        True
    """
    for folder in checkpoints(output_dir):
        fault = checkpoint_fault(folder)
        if fault is None:
            return str(folder)
        logger.warning(f"Skipping the checkpoint {str(folder)!r}: {fault}.")
    return None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders `checkpoint-<step>` in `output_dir`, the newest first."""
    folders = Path(output_dir).iterdir() if Path(output_dir).is_dir() else iter(())
    return sorted((path for path in folders if _NAME.fullmatch(path.name) and path.is_dir()), key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def checkpoint_fault(folder: str | Path) -> str | None:
    """What keeps a checkpoint from being complete; None if nothing does."""
    folder = Path(folder)
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {STATE}, which is written last"
    except (OSError, ValueError) as error:
        return f"{STATE} cannot be read ({error})"
    if _NAME.fullmatch(folder.name) and (not isinstance(state, dict) or state.get("global_step") != _step(folder)):
        return f"{STATE} is of another step"
    if (pickled := pickled_weights(folder)) is not None:
        return f"it has {PICKLED} and no {WEIGHTS} in {pickled.name}"
    if (folder / _UNFINISHED).exists():
        return f"it has {_UNFINISHED}, which is there while it is saved"
    if (folder / MANIFEST).exists() and not saved_again(folder):
        return _manifest_fault(folder)
    return _rng_fault(folder) or _content_fault(folder)


def write_manifest(folder: str | Path) -> None:
    """Note size and CRC-32 of each file in a checkpoint, after seeing them to the disk."""
    folder = Path(folder)
    files = {path.relative_to(folder).as_posix(): _size_and_crc32(path) for path in _files(folder)}
    for path in (*_files(folder), *(path for path in folder.rglob("*") if path.is_dir()), folder):
        flush(path)
    new = folder / f"{MANIFEST}.new"
    new.write_text(json.dumps({"format": 1, "files": files}, indent=1), encoding="utf-8")
    flush(new)
    os.replace(new, folder / MANIFEST)
    flush(folder)


def saved_again(folder: str | Path) -> bool:
    """Whether a checkpoint was saved since its manifest was written, which tells of the files before: so does
    transformers' `enable_jit_checkpoint`, in the folder of the last save, and tells no callback."""
    manifest, state = Path(folder) / MANIFEST, Path(folder) / STATE
    try:
        noted = json.loads(manifest.read_text(encoding="utf-8"))["files"][STATE]
        newer = state.stat().st_mtime_ns > manifest.stat().st_mtime_ns
        return newer and tuple(noted) != _size_and_crc32(state)
    except (OSError, ValueError, TypeError, KeyError):
        return False  # for [`checkpoint_fault`] to tell of


def manifest_size(folder: str | Path) -> int:
    """The bytes of a checkpoint that has a manifest."""
    files = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))["files"]
    return sum(size for size, _ in files.values())


def _files(folder: Path) -> list[Path]:
    own = (MANIFEST, f"{MANIFEST}.new")
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in own)


def _size_and_crc32(path: Path) -> tuple[int, str]:
    size, checksum = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return size, f"{checksum:08x}"


def _manifest_fault(folder: Path) -> str | None:
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, (size, checksum) in files.items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if _size_and_crc32(folder / name)[1] != checksum:
                return f"{name} is not what was saved (its CRC-32 differs)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error!r})"
    return None


def _rng_fault(folder: Path) -> str | None:
    """The first process does not wait for the others' last files. How many there are, an older manifest tells."""
    found = len(list(folder.glob(_RNG_STATES)))
    for older in checkpoints(folder.parent):
        if _step(older) < _step(folder) and (older / MANIFEST).exists():
            expected = len(list(older.glob(_RNG_STATES)))
            return f"it has {found} of {expected} {_RNG_STATES}" if found < expected else None
    return None


def _content_fault(folder: Path) -> str | None:
    if not any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        return "it has no weights"
    for path in _files(folder):
        fault = _file_fault(path)
        if fault is not None:
            return f"{path.relative_to(folder).as_posix()} {fault}"
    for shards in {path.parent for path in folder.rglob("*.distcp")}:
        if not (shards / ".metadata").exists():
            return f"{shards.name} has no .metadata, which is written last"  # torch.distributed.checkpoint
    if any(folder.glob("global_step*")):  # DeepSpeed
        latest = folder / "latest"
        if not latest.exists() or not (folder / latest.read_text(encoding="utf-8").strip()).is_dir():
            return "the file `latest` does not name the folder of DeepSpeed's shards"
    return None


def _file_fault(path: Path) -> str | None:
    try:
        if path.suffix == ".safetensors":
            SafetensorsFile(path)
        elif path.suffix in (".pt", ".pth", ".bin"):  # torch.save writes zip files
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                return f"is damaged at {damaged}"
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        return f"cannot be read to its end ({error})"
    return None


def set_aside_incomplete(output_dir: str | Path) -> list[Path]:
    """Rename the unfinished checkpoints after the last complete one, so that nothing resumes from them.

    Returns:
        Their new paths, `incomplete-checkpoint-<step>`.
    """
    moved = []
    for folder in checkpoints(output_dir):
        fault = checkpoint_fault(folder)
        if fault is None:
            break
        target = folder.with_name(SET_ASIDE + folder.name)
        number = 1
        while target.exists():
            number += 1
            target = folder.with_name(f"{SET_ASIDE}{folder.name}.{number}")
        folder.rename(target)
        moved.append(target)
        logger.warning(f"{folder.name} is not complete ({fault}); renamed to {target.name!r}.")
    return moved
