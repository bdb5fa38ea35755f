"""New files take the place of old ones in one moment: whenever a save ends, the folder holds the old model or the new.

The new files are written into a folder of their own inside the target. When they are complete, that folder gets the
name that belongs to the new config.json, and config.json is replaced, which is the moment: from then on readers find
its files in that folder (`storage/folders.py`) until they are in their places too.

Several saves may write into one target at a time, as those of all ranks of a training run do: each holds a lock on
its own new folder, so that none takes it for what a save that was killed has left, and files are put in their places
by one after the other. The last one is what the target holds then.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from peft_sparse.storage.folders import pending, read_config

try:
    import fcntl
except ImportError:  # Windows, where saves into one folder have to wait for each other by themselves
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = ".sparse_model-"

# What `checkpoint/shards.py` calls its files. Others that begin alike are the user's.
_OURS = re.compile(r"sparse_model(-\d{5,}-of-\d{5,})?\.safetensors|sparse_model\.safetensors\.index\.json")


@contextmanager
def new_files(folder: Path) -> Iterator[Path]:
    """A temporary folder to write a packed checkpoint into; what it holds when the block ends replaces what is in
    `folder`. After an error it is removed, and nothing has changed."""
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with locked(folder):  # nobody tidies up between the two
            temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY + "new-", dir=folder))
            held.enter_context(locked(temporary))
        try:
            yield temporary
            for path in temporary.iterdir():
                flush(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if created and not any(folder.iterdir()):
                folder.rmdir()
            raise
        with locked(folder):
            _replace(folder, temporary)


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """A folder that no other process or thread has locked meanwhile, where the system can lock folders.

    Args:
        wait: until another one has let go of it; False: the result is False then.
    """
    descriptor = None if fcntl is None else os.open(folder, os.O_RDONLY)
    try:
        yield descriptor is None or _lock(descriptor, wait)
    finally:
        if descriptor is not None:
            _unlock(descriptor)
            os.close(descriptor)


def _lock(descriptor: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _unlock(descriptor: int) -> None:
    """Not by closing alone: a process that was forked meanwhile has the file open too."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _replace(folder: Path, temporary: Path) -> None:
    config = read_config(temporary)
    assert config is not None
    moving, names = pending(folder, config), {path.name for path in temporary.iterdir()}
    shutil.rmtree(moving, ignore_errors=True)  # of a save of the same that ended here
    temporary.rename(moving)
    os.replace(moving / "config.json", folder / "config.json")
    flush(folder)
    for path in sorted(moving.iterdir()):
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        os.replace(path, folder / path.name)
    flush(folder)
    moving.rmdir()
    _tidy_up(folder, names)


def _tidy_up(folder: Path, names: set[str]) -> None:
    """Remove what other saves have left in a folder that holds files of these names now."""
    for path in folder.iterdir():
        if path.name.startswith(_TEMPORARY) and path.is_dir():
            with locked(path, wait=False) as left:
                if left:  # by a save that was killed
                    shutil.rmtree(path, ignore_errors=True)
        elif _OURS.fullmatch(path.name) and path.is_file() and path.name not in names:
            path.unlink()  # of an earlier save with other shards


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
