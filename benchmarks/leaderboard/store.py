"""Results on disk: a JSON line for each run, and claims, so that several processes never make the same run.

A line is appended in one write under a lock, so a process that is killed leaves at most one torn line, which the next
reader drops. A claim is a locked file: the system lets go of it when its process ends, however that ends, so no claim
is ever stale.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Store:
    """A folder with `trials.jsonl`, `claims/` and `checkpoints/`, made when it is not there.

    Examples:
        >>> import tempfile
        >>> store = Store(Path(tempfile.mkdtemp()))
        >>> store.add({"key": "a", "score": 1.0})
        >>> store.records()["a"]["score"]
        1.0
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "trials.jsonl"
        self.checkpoints = folder / "checkpoints"
        for path in (folder / "claims", self.checkpoints):
            path.mkdir(parents=True, exist_ok=True)

    def records(self) -> dict[str, Record]:
        """All records by key, in the order in which they were added."""
        if not self.path.exists():
            return {}
        lines = self.path.read_bytes().split(b"\n")
        torn = lines.pop()  # empty, unless a write was cut off
        found = [json.loads(line) for line in lines if line and _is_whole(line)]
        if torn and _is_whole(torn):
            found.append(json.loads(torn))
        return {record["key"]: record for record in found}

    def add(self, record: Record) -> None:
        """Append a record; it is on disk when this returns."""
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            line = json.dumps(record).encode() + b"\n"
            if end:
                file.seek(end - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def claim(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Whether this process alone may do what `name` stands for, as long as the context lasts.

        Args:
            wait: until another process is done with it; then it is always True.
        """
        with (self.folder / "claims" / name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True


def save_complete(model: Any, folder: Path) -> None:
    """Save a model; only a complete folder gets the name that is looked for."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    model.save_pretrained(unfinished)
    unfinished.rename(folder)


def _is_whole(line: bytes) -> bool:
    """Whether a line is a record and not the torn half of one, which only a killed process leaves."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
