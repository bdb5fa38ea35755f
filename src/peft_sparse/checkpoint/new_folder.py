"""The folder that a result goes into, and what is in it beside the weights.

It is new or empty, since what is in the way may be somebody's only copy. It is written beside its place and gets its
name when it is complete, so that an error or an interruption leaves nothing behind.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft_sparse.checkpoint.merged import save_with_card
from peft_sparse.checkpoint.save import save_sparse
from peft_sparse.linears import unpack_model
from peft_sparse.storage import companions


def check_new_folder(folder: str | Path) -> Path:
    """Raises:
    ValueError: if the folder is a file, there is something in it, or it cannot be made here."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        kind = "which is a file" if not folder.is_dir() else "which is not empty"
        raise ValueError(f"A result goes into a new folder, got {str(folder)!r}, {kind}; choose another name.")
    check_writable(folder)
    return folder


def check_writable(folder: str | Path) -> None:
    """Before work that takes long.

    Raises:
        ValueError: if nothing can be written in the folder, or the folder cannot be made where it is not there yet.
    """
    folder = Path(folder).absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    try:  # what permissions say is not all: a file system may be read-only
        Path(tempfile.mkdtemp(prefix=".peft-sparse-", dir=there)).rmdir()
    except OSError as error:
        raise ValueError(
            f"A result goes into a folder that can be written, got {str(folder)!r} ({error.strerror} in "
            f"{str(there)!r}); choose another place."
        ) from error


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, which gets the name `folder` when the block ends, and is removed after an error."""
    folder = check_new_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # a temporary folder is its owner's alone
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def copy_tokenizer(source: str | Path, folder: Path) -> None:
    """Copy what belongs to a tokenizer or processor from one folder to another, where it is not there yet."""
    for path in companions(Path(source)):
        if not (folder / path).exists():
            (folder / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(Path(source, path), folder / path)


def save_model(model: Any, folder: Path, packed: bool, tokenizer_from: str | Path) -> None:
    """Save a whole model, dense or packed, with a model card and the tokenizer files of a folder. One that is packed
    in memory is unpacked in place to be saved dense."""
    if packed:
        save_sparse(model, folder)
    else:
        save_with_card(unpack_model(model), folder)
    copy_tokenizer(tokenizer_from, folder)
