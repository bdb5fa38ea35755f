"""A packed checkpoint against the dense one of the same model: size on disk, time to load, and memory while loading.

    python -m benchmarks.storage                       # SmolLM2-135M of `make demo`
    python -m benchmarks.storage --dtype bfloat16 --append

Magnitude pruned at 50, 75 and 90%. Three ways to load: `packed` (load_sparse), `packed_unverified` (without checksums)
and `dense` (from_pretrained). A load counts until every weight was read once: from_pretrained only maps the file into
memory, so that until then nothing was loaded, and neither time nor memory was spent. `load_ms` is the time until the
model is returned. The files are in the page cache for `warm`; for `cold` the kernel is asked to drop them before each
load, so that they come from the disk. Nothing is reported if the models differ.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks import memory, models, runner
from benchmarks.model_step import _model
from peft_sparse import load_sparse, prune_magnitude, save_sparse
from peft_sparse.linears import block_linears

SPARSITIES = (0.5, 0.75, 0.9)
Load = Callable[[Path], nn.Module]
LOADS: dict[str, tuple[str, Load]] = {
    "dense": ("dense", AutoModelForCausalLM.from_pretrained),
    "packed": ("packed", load_sparse),
    "packed_unverified": ("packed", partial(load_sparse, verify_checksums=False)),
}


def touch(model: nn.Module) -> None:
    """Read every weight once."""
    for parameter in model.parameters():
        parameter.detach().sum()


def drop_cache(folder: Path) -> None:
    """Ask the kernel to forget what it has of a folder's files."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def load_and_touch(folder: Path, load: Load) -> None:
    touch(load(folder))
    gc.collect()  # lest the next load finds this model still there


def build(variant: str, folder: Path) -> Callable[[], None]:
    """For `memory.peak`: the step is the load."""
    sub, load = LOADS[variant]
    return partial(load_and_touch, folder / sub, load)


def sizes(folder: Path, linears: dict[str, nn.Module]) -> tuple[int, int]:
    """(bytes of the linears' weights, bytes of all files of weights) in a folder."""
    weights, files = 0, 0
    names = {f"{name}.weight{part}" for name in linears for part in ("", ".values", ".bitmask")}
    for path in folder.glob("*.safetensors"):
        files += path.stat().st_size
        with safe_open(path, "pt") as tensors:
            weights += sum(tensors.get_tensor(key).nbytes for key in tensors.keys() if key in names)  # noqa: SIM118
    return weights, files


def measure(args: argparse.Namespace) -> list[runner.Row]:
    """One row for each sparsity and way to load."""
    model = _model(args)
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        return [row for sparsity in args.sparsities for row in _rows(sparsity, model, Path(folder), args)]


def _rows(sparsity: float, model: Path | dict[str, int], parent: Path, args: argparse.Namespace) -> list[runner.Row]:
    folder = parent / str(sparsity)
    pruned = prune_magnitude(models.load(model, args.dtype, torch.device("cpu")), sparsity=sparsity)
    linears = block_linears(pruned)
    pruned.save_pretrained(folder / "dense")
    save_sparse(pruned, folder / "packed")
    found = {sub: sizes(folder / sub, linears) for sub in ("dense", "packed")}
    del pruned, linears
    _check(folder)
    warm = {name: _times(folder / sub, load, args.rounds, cold=False) for name, (sub, load) in LOADS.items()}
    cold = {name: _times(folder / sub, load, args.rounds, cold=True) for name, (sub, load) in LOADS.items()}
    tiny = models.load(models.TINY, args.dtype, torch.device("cpu"))
    tiny.save_pretrained(folder / "tiny" / "dense")
    save_sparse(prune_magnitude(tiny), folder / "tiny" / "packed")
    peaks = {name: _peak(name, folder, args) for name in LOADS}
    return [
        {
            "model": models.describe(model),
            "sparsity": sparsity,
            "variant": name,
            "linears_ratio_dense": found[sub][0] / found["dense"][0],
            "files_mb": found[sub][1] / memory.MB,
            "files_ratio_dense": found[sub][1] / found["dense"][1],
            "load_ms": 1e3 * warm[name][0],
            "warm_ms": 1e3 * warm[name][1],
            "warm_ratio_dense": warm[name][1] / warm["dense"][1],
            "cold_ms": 1e3 * cold[name][1],
            "cold_ratio_dense": cold[name][1] / cold["dense"][1],
            "peak_mb": peaks[name],
            "peak_ratio_dense": peaks[name] / peaks["dense"] if peaks[name] and peaks["dense"] else None,
        }
        for name, (sub, _) in LOADS.items()
    ]


def _peak(name: str, folder: Path, args: argparse.Namespace) -> float | None:
    """Megabytes of resident memory that a load adds at most; None if it is not measured."""
    if not args.memory:
        return None
    peak = memory.peak(partial(build, name, folder), partial(build, name, folder / "tiny"), args.device, args.threads)
    return None if peak is None else peak.step


def _times(folder: Path, load: Load, rounds: int, cold: bool) -> tuple[float, float]:
    """Medians of the seconds until the model is there, and until it was read."""
    loaded, touched = [], []
    for turn in range(rounds + 1):
        if cold:
            drop_cache(folder)
        start = time.perf_counter()
        model = load(folder)
        loaded.append(time.perf_counter() - start)
        touch(model)
        touched.append(time.perf_counter() - start)
        del model
        if turn == 0:
            loaded, touched = [], []
    return statistics.median(loaded), statistics.median(touched)


def _check(folder: Path) -> None:
    states = [load(folder / sub).state_dict() for sub, load in LOADS.values()]
    for state in states[1:]:
        if not all(torch.equal(state[name], tensor) for name, tensor in states[0].items()):
            raise SystemExit("No benchmark is reported: the loaded models differ.")


def options() -> argparse.ArgumentParser:
    found = runner.parser(__doc__, rounds=5)
    found.add_argument("--model", type=Path, default=None, help="transformers folder (default: the demo's SmolLM2)")
    found.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES, help="default: 0.5 0.75 0.9")
    found.add_argument(
        "--scratch", type=Path, default=None, help="where to put the checkpoints (default: as tempfile)"
    )
    return found


if __name__ == "__main__":
    sys.exit(runner.main("storage", options(), measure))
