"""The shared runner: interleaved runs, medians, ratios paired run by run, and a gate before all of it.

The variants of a comparison take turns, A B C C B A ..., after a warm-up, so that a machine that slows down for a
while slows all of them, and none of them always follows the same other one. A ratio is the median over rounds of
(variant's time / baseline's time of the same round); it is therefore not exactly the ratio of the two medians. Nothing
is reported when the ops' correctness check fails, and no option turns that check off.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import check, report

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
WARMUP_ROUNDS = 3
QUICK_ROUNDS = 2

Row = dict[str, Any]


class Times:
    """Seconds of each round, by variant: `seconds[name][i]` and `seconds[other][i]` were taken in the same round."""

    def __init__(self, seconds: Mapping[str, list[float]]) -> None:
        self.seconds = dict(seconds)

    def median_ms(self, name: str) -> float:
        return 1e3 * statistics.median(self.seconds[name])

    def spread_ms(self, name: str) -> float:
        """Interquartile range; of fewer than four rounds, the whole range."""
        return 1e3 * _spread(self.seconds[name])

    def ratio(self, name: str, baseline: str) -> float | None:
        """Median of the per-round ratios of `name` to `baseline`; None if either was not run."""
        if name not in self.seconds or baseline not in self.seconds:
            return None
        return statistics.median(self._ratios(name, baseline))

    def ratio_spread(self, name: str, baseline: str) -> float:
        """Of the same ratios, what [`Times.spread_ms`] is of the times."""
        return _spread(self._ratios(name, baseline))

    def _ratios(self, name: str, baseline: str) -> list[float]:
        return [own / other for own, other in zip(self.seconds[name], self.seconds[baseline], strict=True)]

    def columns(self, name: str, baselines: Mapping[str, str]) -> Row:
        """The time columns of a row.

        Args:
            baselines: column name -> variant to divide by.
        """
        own: Row = {"median_ms": self.median_ms(name), "spread_ms": self.spread_ms(name)}
        return own | {column: self.ratio(name, baseline) for column, baseline in baselines.items()}


def _spread(values: Sequence[float]) -> float:
    in_order = sorted(values)
    if len(in_order) < 4:
        return in_order[-1] - in_order[0]
    first, _, third = statistics.quantiles(in_order, n=4)
    return third - first


def interleave(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    title: str = "",
    warmup: int = WARMUP_ROUNDS,
    settle: int = 0,
    count: int = 1,
) -> Times:
    """Run every step once per round, in the order given and the next time in the reverse order.

    Args:
        steps: variant -> a function that does one run; what it returns is dropped.
        rounds: measured rounds.
        warmup: rounds before them that are not measured.
        settle: runs of a step right before each measured one, for steps so short that it matters to them what the
            step before left in the caches.
        count: of what is computed in a run, by which its seconds are divided.
    """
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()  # what is there already need not be looked at again
    gc.disable()
    try:
        for turn in tqdm(range(warmup + rounds), desc=title, leave=False):
            for name in names[:: -1 if turn % 2 else 1]:
                step = steps[name]
                for _ in range(settle):
                    step()
                _synchronize(device)
                start = time.perf_counter()
                step()
                _synchronize(device)
                if turn >= warmup:
                    seconds[name].append((time.perf_counter() - start) / count)
            gc.collect()  # between rounds, so that no variant pays for what another left
    finally:
        gc.enable()
        gc.unfreeze()
    return Times(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parser(description: str | None, rounds: int = 20) -> argparse.ArgumentParser:
    """The options that every script has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, default=2, help="torch.set_num_threads (default: 2)")
    options.add_argument("--rounds", type=int, default=None, help=f"measured rounds (default: {rounds}; quick: 2)")
    options.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    options.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and inputs (default: float32)")
    options.add_argument("--quick", action="store_true", help="tiny sizes: shows that the script runs, no result")
    options.add_argument(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="peak memory, a child process for each variant (default: on)",
    )
    options.add_argument("--append", action="store_true", help="add rows to the CSV instead of writing it anew")
    options.add_argument("--out", type=Path, default=None, help="CSV file (default: benchmarks/results/<script>.csv)")
    options.set_defaults(default_rounds=rounds)
    return options


def prepare(args: argparse.Namespace) -> argparse.Namespace:
    """Turn options into what `measure` functions take, and set torch up.

    Raises:
        SystemExit: if the device is not there, or cannot do what is asked for.
    """
    args.device = torch.device(args.device)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a GPU that torch sees, got none; leave it out to run on the CPU.")
    args.triton = any(peer.endswith("_triton") for peer in getattr(args, "peers", ()))
    if args.triton and args.device.type != "cuda":
        raise SystemExit(
            "spp_triton and pst_triton run on a GPU only; add --device cuda, or leave them out of --peers."
        )
    args.dtype = DTYPES[args.dtype]
    if args.rounds is None:
        args.rounds = QUICK_ROUNDS if args.quick else args.default_rounds
    if args.rounds < 1 or args.threads < 1:
        raise SystemExit(f"--rounds and --threads are at least 1, got {args.rounds} and {args.threads}.")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


def main(
    script: str,
    options: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], list[Row]],
    argv: list[str] | None = None,
) -> int:
    """A script: check, measure, write the CSV, print the table.

    Returns:
        Exit status: 2 if the ops' correctness check failed, and then nothing is measured or written.
    """
    args = prepare(options.parse_args(argv))
    wrong = check.failure(args.device, args.dtype, args.triton)
    if wrong:
        print(f"No benchmark is reported: the ops' correctness check failed.\n{wrong}", file=sys.stderr)
        return 2
    before = report.metadata(args)  # the load before, not the one we cause
    rows = [{"script": script} | row | before for row in measure(args)]
    if not rows:
        return 0
    path = args.out or RESULTS / f"{script}{'-quick' if args.quick else ''}.csv"
    report.write(rows, path, append=args.append)
    report.print_table(rows)
    print(f"\n{len(rows)} rows in {path}")
    if args.quick:
        print("--quick: the sizes are tiny, these numbers say nothing.")
    return 0
