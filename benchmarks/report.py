"""What goes with a number (hardware, threads, dtype, versions, commit), the CSV, and the table in the terminal."""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
METADATA = (
    "rounds", "device", "dtype", "threads", "hardware", "cores", "load_before", "torch", "transformers", "peft",
    "peft_sparse", "commit", "date",
)  # fmt: skip


def metadata(args: argparse.Namespace) -> dict[str, Any]:
    """The columns [`METADATA`], the same in every row of a run."""
    found = {
        "rounds": args.rounds,
        "device": args.device.type,
        "dtype": str(args.dtype).removeprefix("torch."),
        "threads": args.threads,
        "hardware": hardware(args.device),
        "cores": os.cpu_count(),
        # Above about 0.5 something else ran, and times are not to be trusted. (Our own check adds some.)
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        **{name: version(name.replace("_", "-")) for name in ("torch", "transformers", "peft", "peft_sparse")},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    return {name: found[name] for name in METADATA}


def hardware(device: torch.device) -> str:
    """Name of the GPU or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def commit() -> str:
    """Short hash, with "-changed" if the code that was measured is not that of the commit; "unknown" without git."""
    try:
        short = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{short}-changed" if changed else short


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def write(rows: Sequence[dict[str, Any]], path: Path, append: bool = False) -> None:
    """Write rows as CSV; a number has six significant digits, and what was not measured is empty.

    Raises:
        SystemExit: on appending to a file with other columns.
    """
    columns = list(rows[0])
    append = append and path.exists()
    if append:
        with path.open(newline="", encoding="utf-8") as file:
            present = next(csv.reader(file), [])
        if present != columns:
            raise SystemExit(f"--append needs a CSV with the same columns; {path} has others. Write to another --out.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if append else "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not append:
            writer.writeheader()
        writer.writerows({name: _cell(value, digits=6) for name, value in row.items()} for row in rows)


def _cell(value: Any, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """The rows without their metadata; that is the same for all and goes above."""
    first = rows[0]
    print("\n" + ", ".join(f"{name} {first[name]}" for name in METADATA if name in first))
    columns = [name for name in first if name not in METADATA and name != "script"]
    cells = [columns] + [[_cell(row[name], digits=4) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
