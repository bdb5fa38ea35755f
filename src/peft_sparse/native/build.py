"""Compile the C kernels, once, with the C compiler of the machine.

What is compiled lies in the user's cache folder, under a name made from the source and the command: another version
or another kind of processor gets a file of its own, and several processes may come at once. No Python headers, no
OpenMP and no build tool are needed; without a compiler there are no kernels, and nothing else changes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import torch

SOURCES = ("bitmask.c", "csr.c", "lanes.h")
COMPILERS = ("cc", "gcc", "clang")
TIMEOUT = 120  # seconds; it takes one or two
_ALWAYS = ("-O3", "-std=gnu11", "-shared", "-fPIC")
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mpopcnt")
FLAGS = {"AVX2": _AVX2, "AVX512": (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")}


class Unavailable(Exception):
    """Why there are no kernels here, in words that follow "native kernels"."""


class Broken(Unavailable):
    """The same where one would expect some, since there is a compiler."""


def load_library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        Unavailable: if this machine cannot have them.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.system() != "Linux" or platform.machine() != "x86_64" or capability not in FLAGS:
        here = f"{platform.system()} on {platform.machine()}, {capability}"
        raise Unavailable(f"are for Linux on x86-64 with AVX2 or AVX-512, got {here}")
    compiler = os.environ.get("CC") or next((name for name in COMPILERS if shutil.which(name)), None)
    if compiler is None:
        raise Unavailable(f"need a C compiler ({', '.join(COMPILERS)}), and none is installed")
    command = (*compiler.split(), *_ALWAYS, *FLAGS[capability])
    name = f"kernels-{_digest(command)}.so"
    cache = cache_folder()
    kept = None if cache is None else cache / name
    if kept is not None and os.path.isfile(kept):  # `Path.is_file` raises where one may not look
        with suppress(OSError):  # damaged, or on a disk that nothing may be run from: compiled again
            return ctypes.CDLL(str(kept))
    try:
        temporary = tempfile.TemporaryDirectory(prefix="peft-sparse-")
    except OSError as error:
        raise Broken(f"cannot be compiled: nothing can be written to a temporary folder ({error})") from error
    with temporary as folder:
        made = Path(folder) / name
        _compile((*command, *(str(path) for path in sources() if path.suffix == ".c")), made)
        if kept is not None:
            with suppress(OSError):  # a cache that cannot be written to; the next process compiles again
                _keep(made, kept)
        try:
            return ctypes.CDLL(str(made))  # outlives its file
        except OSError as error:
            raise Broken(f"were compiled but cannot be loaded ({error})") from error


def cache_folder() -> Path | None:
    """Where compiled kernels are kept: `$XDG_CACHE_HOME/peft_sparse`, by default `~/.cache/peft_sparse`; None for a
    user without a home, as in some containers."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_sparse"
    except RuntimeError:
        return None


def sources() -> list[Path]:
    """The C files."""
    return [Path(__file__).with_name(name) for name in SOURCES]


def _digest(command: tuple[str, ...]) -> str:
    """Of what the kernels are made from: the sources and the command."""
    try:
        made_from = b"".join(path.read_bytes() for path in sources()) + repr(command).encode()
    except OSError as error:
        raise Broken(f"cannot be compiled: their sources are not there ({error})") from error
    return hashlib.sha256(made_from).hexdigest()[:16]


def _compile(command: tuple[str, ...], made: Path) -> None:
    try:
        done = subprocess.run([*command, "-o", made], capture_output=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Broken(f"cannot be compiled: {' '.join(command)!r} does not run ({error})") from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        raise Broken(f"cannot be compiled: {' '.join(command)!r} says {said[0][:200]!r}")


def _keep(made: Path, path: Path) -> None:
    """Put a copy of a file in its place at once, whole."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent)
    os.close(descriptor)
    shutil.copyfile(made, unfinished)
    os.chmod(unfinished, 0o700)
    os.replace(unfinished, path)
