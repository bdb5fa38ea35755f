"""Perplexity of SmolLM2-135M after each pruner, at several sparsities: calibrated on 64 x 512 tokens of C4, measured
on WikiText-2.

    python -m benchmarks.pruning_quality                                        # all rows, some hours on one core
    python -m benchmarks.pruning_quality --methods wanda sparsegpt --settings 50 2:4
    python -m benchmarks.pruning_quality --model some/folder

Every row is written as soon as it is measured, and rows that the CSV already has are skipped, so a run can be stopped
and started again. The data are those of the folder `shared/` (beside the repository, or where PEFT_SPARSE_SHARED
points), the model is the one that `make demo` leaves in `.demo/`.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoTokenizer

from benchmarks import check_pruning, models, report, runner
from peft_sparse.evaluation import perplexity
from peft_sparse.linears import block_linears
from peft_sparse.pruning import owl_sparsity, prune_magnitude, prune_ria, prune_sparsegpt, prune_wanda

Batches = list[dict[str, torch.Tensor]]


class Method(NamedTuple):
    """A pruner, whether it takes calibration data, and what it compares by default."""

    prune: Callable[..., nn.Module]
    calibrated: bool
    group: str


class Setting(NamedTuple):
    """How sparse, and by which allocation over the layers: OWL's with this lambda, or uniform."""

    pattern: str
    sparsity: float
    owl_lambda: float | None = None  # None: the same sparsity in all layers


METHODS = {
    "magnitude": Method(prune_magnitude, False, "layer"),
    "wanda": Method(prune_wanda, True, "row"),
    "sparsegpt": Method(prune_sparsegpt, True, "layer"),
    "ria": Method(prune_ria, True, "layer"),
}
SETTINGS = {
    "50": Setting("unstructured", 0.5),
    "60": Setting("unstructured", 0.6),
    "60-owl": Setting("unstructured", 0.6, 0.08),
    "60-owl-0.04": Setting("unstructured", 0.6, 0.04),
    "75": Setting("unstructured", 0.75),
    "2:4": Setting("2:4", 0.5),
    "4:8": Setting("4:8", 0.5),
}
DENSE = "dense"
SEQUENCES, TOKENS, WINDOW = 64, 512, 512
QUICK_SEQUENCES, QUICK_TOKENS = 4, 16
# What makes a row the same as one that is in the CSV.
KEY = ("model", "method", "setting", "sequences", "tokens", "window", "held_out_tokens", "dtype", "eval_dtype")


def windows(ids: torch.Tensor, count: int, length: int) -> Batches:
    """`count` windows of `length` tokens, drawn from all that do not overlap, one a batch.

    Raises:
        SystemExit: if there are fewer.
    """
    found = ids[: len(ids) // length * length].reshape(-1, length)
    if len(found) < count:
        raise SystemExit(f"Calibration takes {count} windows of {length} tokens, the text has {len(found)}.")
    chosen = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:count]
    return [{"input_ids": row[None]} for row in found[chosen]]


def load_data(args: argparse.Namespace, model: nn.Module) -> tuple[Batches, torch.Tensor]:
    """Calibration batches and the held-out tokens.

    Raises:
        SystemExit: if a file is not there.
    """
    if args.quick:
        ids = torch.randint(3, model.config.vocab_size, (1000,), generator=torch.Generator().manual_seed(0))
        return windows(ids[:500], args.sequences, args.tokens), ids[500:]
    texts = []
    for name in ("c4_calibration/c4_300.jsonl", "wikitext2/test_a.txt"):
        path = check_pruning.SHARED / "data" / name
        if not path.is_file():
            raise SystemExit(f"The data of this benchmark are in shared/data, got no {name}; set PEFT_SPARSE_SHARED.")
        texts.append(path.read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    documents = tokenizer([json.loads(line)["text"] for line in texts[0].splitlines()])["input_ids"]
    joined = [token for document in documents for token in (*document, tokenizer.eos_token_id)]
    held_out = torch.tensor(tokenizer(texts[1])["input_ids"])[: args.held_out_tokens]
    return windows(torch.tensor(joined), args.sequences, args.tokens), held_out


def rows_present(path: Path) -> set[tuple[str, ...]]:
    """Keys of the rows that a CSV has."""
    if not path.exists():
        return set()
    with path.open(newline="", encoding="utf-8") as file:
        return {tuple(row[name] for name in KEY) for row in csv.DictReader(file)}


def wanted(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(method, setting) of all rows, the dense one first."""
    return [(DENSE, ""), *((method, setting) for setting in args.settings for method in args.methods)]


def measure(args: argparse.Namespace, path: Path) -> int:
    """Measure the rows that are missing, each written when it is done; how many that were."""
    model = models.load(models.TINY if args.quick else args.model, args.dtype, args.device)
    batches, held_out = load_data(args, model)
    dense = {name: linear.weight.detach().clone() for name, linear in block_linears(model).items()}
    facts = {"model": models.describe(models.TINY if args.quick else args.model)}
    facts |= {"sequences": args.sequences, "tokens": args.tokens, "window": args.window}
    facts |= {"held_out_tokens": len(held_out), "eval_dtype": str(args.eval_dtype).removeprefix("torch.")}
    present, written = rows_present(path), 0
    for method, setting in wanted(args):
        row = {"method": method, "setting": setting} | facts | {"dtype": str(args.dtype).removeprefix("torch.")}
        if tuple(str(row[name]) for name in KEY) in present:
            continue
        before = report.metadata(args)
        for name, linear in block_linears(model).items():
            linear.weight.data.copy_(dense[name])
        pruned = _prune(model, method, setting, batches)
        zeros = sum(int((linear.weight == 0).sum()) for linear in block_linears(model).values())
        start = time.perf_counter()
        with torch.autocast(args.device.type, args.eval_dtype, enabled=args.eval_dtype != args.dtype):
            value = perplexity(model, held_out, args.window)
        result = {"perplexity": value, "achieved_sparsity": zeros / sum(weight.numel() for weight in dense.values())}
        seconds = {"evaluation_seconds": time.perf_counter() - start}
        del row["dtype"]  # it is among the metadata
        report.write([{"script": "pruning_quality"} | row | result | pruned | seconds | before], path, append=True)
        print(f"{method} {setting}: perplexity {value:.4g}", flush=True)
        written += 1
    return written


def _prune(model: nn.Module, name: str, setting_name: str, batches: Batches) -> dict[str, float | None]:
    """Prune the dense model; the seconds that allocation and pruning took."""
    if name == DENSE:
        return {"allocation_seconds": None, "prune_seconds": None}
    method, setting = METHODS[name], SETTINGS[setting_name]
    start, allocation = time.perf_counter(), None
    sparsity: float | dict[str, float] = setting.sparsity
    if setting.owl_lambda is not None:
        sparsity = owl_sparsity(model, batches, setting.sparsity, lam=setting.owl_lambda, group=method.group)
        allocation = time.perf_counter() - start
        start = time.perf_counter()
    method.prune(model, *((batches,) if method.calibrated else ()), setting.pattern, sparsity)
    return {"allocation_seconds": allocation, "prune_seconds": time.perf_counter() - start}


def options() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", type=Path, default=models.DEMO_MODEL, help="folder (default: the demo's SmolLM2)")
    found.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    found.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    found.add_argument("--sequences", type=int, default=SEQUENCES, help=f"for calibration (default: {SEQUENCES})")
    found.add_argument("--tokens", type=int, default=TOKENS, help=f"of each of them (default: {TOKENS})")
    found.add_argument("--window", type=int, default=WINDOW, help=f"of perplexity (default: {WINDOW})")
    found.add_argument("--held-out-tokens", type=int, default=None, help="the first so many (default: all)")
    found.add_argument("--threads", type=int, default=2, help="torch.set_num_threads (default: 2)")
    found.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    found.add_argument("--dtype", choices=runner.DTYPES, default="float32", help="of the model (default: float32)")
    found.add_argument("--eval-dtype", choices=runner.DTYPES, default=None, help="autocast perplexity (default: no)")
    found.add_argument("--quick", action="store_true", help="a tiny random model: shows that the script runs")
    found.add_argument("--out", type=Path, default=None, help="CSV (default: benchmarks/results/pruning_quality.csv)")
    found.set_defaults(rounds=1)
    return found


def main(argv: list[str] | None = None) -> int:
    """Check, measure what is missing.

    Returns:
        Exit status: 2 if pruners do not prune as they should, and then nothing is measured.
    """
    args = runner.prepare(options().parse_args(argv))
    args.eval_dtype = args.dtype if args.eval_dtype is None else runner.DTYPES[args.eval_dtype]
    if args.quick:
        args.sequences, args.tokens = QUICK_SEQUENCES, QUICK_TOKENS
    elif not args.model.is_dir():
        raise SystemExit(f"--model is a folder that transformers reads, got {args.model}, which is none.")
    wrong = check_pruning.failure()
    if wrong:
        print(f"No benchmark is reported: the pruners' correctness check failed.\n{wrong}", file=sys.stderr)
        return 2
    path = args.out or runner.RESULTS / f"pruning_quality{'-quick' if args.quick else ''}.csv"
    written = measure(args, path)
    print(f"{written} new rows in {path}" + ("; a tiny random model, these numbers say nothing." * args.quick))
    return 0


if __name__ == "__main__":
    sys.exit(main())
