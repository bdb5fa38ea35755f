"""A packed checkpoint against the dense one of the same model: size on disk, time to load, and memory while loading.

    python -m benchmarks.storage                       # SmolLM2-135M of `make demo`
    python -m benchmarks.storage --dtype bfloat16 --append

Magnitude pruned at 50, 75 and 90%. Three ways to load: `packed` (load_sparse), `packed_unverified` (without checksums)
and `dense` (from_pretrained), each in a new process that has loaded a tiny model before, in turns. Until when a load
counts is told by the columns, since from_pretrained only maps the file into memory, and reads it when it is used:
`load_ms` until the model is returned, `read_ms` until each of its weights was read once, `token_ms` until it has
computed the logits of one token. The files are in the page cache for `warm`; for `cold` the kernel is asked to drop
them before, so that they come from the disk. `peak_mb` is the highest resident memory, mapped pages included, until
every weight was read, minus that before. Nothing is reported if the models differ.
"""

from __future__ import annotations

import argparse
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


def drop_cache(folder: Path) -> None:
    """Ask the kernel to forget what it has of a folder's files."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def load_once(folder: Path, tiny: Path, variant: str) -> runner.Row:
    """Seconds of one load, see above, and the bytes of its peak. In a process of its own."""
    sub, load = LOADS[variant]
    _token(load(tiny / sub))  # the code, and what it sets up once
    device = torch.device("cpu")
    before, start = memory.reset(device), time.perf_counter()
    model = load(folder / sub)
    found = {"load": time.perf_counter() - start}
    for parameter in model.parameters():
        parameter.detach().sum()
    found |= {"read": time.perf_counter() - start, "peak": memory.highest(device) - before}
    start = time.perf_counter() - found["load"]
    _token(model)
    return found | {"token": time.perf_counter() - start}


def _token(model: nn.Module) -> None:
    with torch.no_grad():
        model(input_ids=torch.tensor([[1]]))


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
    folder, tiny = parent / str(sparsity), parent / "tiny"
    pruned = prune_magnitude(models.load(model, args.dtype, torch.device("cpu")), sparsity=sparsity)
    linears = block_linears(pruned)
    _save(pruned, folder)
    found = {sub: sizes(folder / sub, linears) for sub in ("dense", "packed")}
    del pruned, linears
    _check(folder)
    _save(prune_magnitude(models.load(models.TINY, args.dtype, torch.device("cpu"))), tiny)
    rows: dict[str, runner.Row] = {
        name: {
            "model": models.describe(model),
            "sparsity": sparsity,
            "variant": name,
            "linears_ratio_dense": found[sub][0] / found["dense"][0],
            "files_mb": found[sub][1] / memory.MB,
            "files_ratio_dense": found[sub][1] / found["dense"][1],
        }
        for name, (sub, _) in LOADS.items()
    }
    for files in ("warm", "cold"):
        medians = _medians(folder, tiny, args, cold=files == "cold")
        for name, row in rows.items():
            for until in ("load", "read", "token"):
                row[f"{files}_{until}_ms"] = 1e3 * medians[name][until]
                row[f"{files}_{until}_ratio_dense"] = medians[name][until] / medians["dense"][until]
            row[f"{files}_peak_mb"] = medians[name]["peak"] / memory.MB
            row[f"{files}_peak_ratio_dense"] = medians[name]["peak"] / medians["dense"]["peak"]
    return list(rows.values())


def _save(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder / "dense")
    save_sparse(model, folder / "packed")


def _medians(folder: Path, tiny: Path, args: argparse.Namespace, cold: bool) -> dict[str, runner.Row]:
    """By variant, the medians over the rounds of what [`load_once`] gives."""
    runs: dict[str, list[runner.Row]] = {name: [] for name in LOADS}
    for _ in range(args.rounds):
        for name, (sub, _) in LOADS.items():
            if cold:
                drop_cache(folder / sub)
            run = memory.in_new_process(load_once, args.threads, folder, tiny, name)
            if run is None:
                raise SystemExit(f"No benchmark is reported: the process that loads {name} died (out of memory?).")
            runs[name].append(run)
    return {name: {key: statistics.median(run[key] for run in own) for key in own[0]} for name, own in runs.items()}


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
