"""The folder that a result goes into, and what is in it beside the weights.

It is new or empty, since what is in the way may be somebody's only copy. A new one is written beside its place and
gets its name when it is complete; one that is there stays, and gets its files, config.json last. So an error or an
interruption leaves nothing behind that looks like a model.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft_sparse.checkpoint.generation import generation_config_as_it_is
from peft_sparse.checkpoint.lookup import has_tokenizer
from peft_sparse.checkpoint.merged import save_with_card
from peft_sparse.checkpoint.save import save_sparse
from peft_sparse.linears import unpack_model
from peft_sparse.storage import belongs_to_tokenizer, companions

_TEMPORARY = ".peft-sparse-"


def check_new_folder(folder: str | Path) -> Path:
    """Raises:
    ValueError: if the folder is a file, there is something in it, or it cannot be made here."""
    folder = Path(folder)
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if there or (folder.exists() and not folder.is_dir()):
        kind = f"which is not empty ({there[0]!r} is in it)" if there else "which is a file"
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
        with _temporary_folder(there):
            pass
    except OSError as error:
        raise ValueError(
            f"A result goes into a folder that can be written, got {str(folder)!r} ({error.strerror} in "
            f"{str(there)!r}); choose another place."
        ) from error


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into. What it holds when the block ends is then in `folder`; it is removed after an error."""
    place = Path(os.path.realpath(check_new_folder(folder)))  # which a link points to
    is_there = place.is_dir()
    beside = place if is_there else place.parent
    beside.mkdir(parents=True, exist_ok=True)
    with _temporary_folder(beside) as temporary:
        yield temporary
        if is_there or place.is_dir():  # made meanwhile, as by another run
            _move_up(temporary, place)
        else:
            temporary.rename(place)


@contextmanager
def _temporary_folder(inside: Path) -> Iterator[Path]:
    """A new folder, gone when the block ends. Its name is known before it is made, so that no interruption, at
    whatever moment, leaves it behind."""
    temporary = inside / f"{_TEMPORARY}{secrets.token_hex(8)}"
    try:
        temporary.mkdir()
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_up(temporary: Path, folder: Path) -> None:
    """Move what is in a folder to another one, which is empty but for it, if it is in there. That one is not replaced:
    it may be where a disk is mounted, the working directory, or in a place where nothing can be made."""
    others = [path.name for path in folder.iterdir() if path != temporary]
    if others:
        raise ValueError(
            f"A result goes into an empty folder, got {others[0]!r} in {str(folder)!r} since it began; choose another "
            "name."
        )
    moved: list[Path] = []
    try:
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
            moved.append(folder / path.name)
            path.rename(moved[-1])
        temporary.rmdir()
    except BaseException:
        for path in moved:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise


def copy_tokenizer(source: str | Path, folder: Path) -> None:
    """Copy what belongs to a tokenizer or processor from one folder to another, where it is not there yet. A tokenizer
    that is there is whole: a file of another one, such as a special_tokens_map.json, would be read with it."""
    has_its_own = has_tokenizer(folder)
    for path in companions(Path(source)):
        if not (folder / path).exists() and not (has_its_own and belongs_to_tokenizer(path)):
            (folder / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(Path(source, path), folder / path)


def save_model(model: Any, folder: Path, packed: bool, tokenizer_from: str | Path) -> None:
    """Save a whole model, dense or packed, with a model card and the tokenizer files of a folder. One that is packed
    in memory is unpacked in place to be saved dense."""
    with generation_config_as_it_is(model):
        if packed:
            save_sparse(model, folder)
        else:
            save_with_card(unpack_model(model), folder)
    copy_tokenizer(tokenizer_from, folder)
