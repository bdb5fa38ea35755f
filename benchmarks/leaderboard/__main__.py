"""The command line of the leaderboard; see the package's docstring."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import check_pruning, models
from benchmarks.leaderboard import __doc__ as description
from benchmarks.leaderboard import overview, parts, render, runs, who_wins
from benchmarks.leaderboard.settings import SEARCH_SEED
from benchmarks.leaderboard.store import Store
from benchmarks.leaderboard.workers import make_runs

STORE = models.REPOSITORY / ".leaderboard"
OUT = models.REPOSITORY / "benchmarks" / "results" / "leaderboard"


def options() -> argparse.ArgumentParser:
    """What the command takes."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.leaderboard",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--part", nargs="+", choices=parts.PARTS, default=list(parts.PARTS), help="default: all")
    found.add_argument("--model", default=None, help="a name or a folder (default: all of the part)")
    found.add_argument("--cases", nargs="+", default=None, help='such as "wanda 2:4", "sst2 90%%" (default: all)')
    found.add_argument("--rows", nargs="+", default=None, help="such as spp pst (default: all)")
    found.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the final runs (default: 0 1 2)")
    found.add_argument("--budget", choices=parts.BUDGET_NAMES, default="small", help="of every row (default: small)")
    found.add_argument("--steps", type=int, default=None, help="instead of the budget's; the same for every row")
    found.add_argument("--tries", type=int, default=None, help="learning rates for a row, instead of the budget's")
    found.add_argument(
        "--head-rate",
        type=float,
        default=None,
        metavar="RATE",
        help="of a classifier's head, in every row; 0: that of the weights (default if small: the task's, but 0 with "
        "--tuned-first; else 0)",
    )
    found.add_argument(
        "--clip",
        type=float,
        default=None,
        metavar="NORM",
        help="that gradients are clipped at, in every row (default: 1)",
    )
    found.add_argument(
        "--tuned-first",
        type=int,
        default=None,
        metavar="STEPS",
        help="of dense fine-tuning, from which every row starts, at one rate for head and weights (default: 0)",
    )
    found.add_argument("--workers", type=int, default=1, help="processes (default: 1); more may be started elsewhere")
    found.add_argument("--threads", type=int, default=1, help="torch threads of each worker (default: 1)")
    found.add_argument("--minutes", type=float, default=None, help="begin no run after so long (default: no limit)")
    found.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU, if any"
    )
    found.add_argument("--data", type=Path, default=check_pruning.SHARED / "data", help="default: shared/data")
    found.add_argument("--store", type=Path, default=STORE, help="where runs are kept (default: .leaderboard)")
    found.add_argument("--out", type=Path, default=OUT, help="tables and charts (default: results/leaderboard)")
    found.add_argument("--name", default=None, help="added to the files' names, for a table of some --rows")
    found.add_argument(
        "--restore", action="store_true", help="first take over the runs of the *-runs.csv in --out that are missing"
    )
    found.add_argument("--render", action="store_true", help="make no runs, only the tables and charts")
    found.add_argument("--list", action="store_true", help="say what would be run, and run nothing")
    return found


def main(argv: list[str] | None = None) -> int:
    """Make the runs that are missing, then tables and charts.

    Returns:
        Exit status: 1 if a worker failed, 130 after Ctrl-C.
    """
    args = options().parse_args(argv)
    if min(args.workers, args.threads) < 1:
        raise SystemExit(f"--workers and --threads are at least 1, got {args.workers} and {args.threads}.")
    if SEARCH_SEED in args.seeds:
        raise SystemExit(f"--seeds are of the final runs and none is {SEARCH_SEED}, the search's; got {args.seeds}.")
    if args.restore:
        several = sorted(args.out.glob("*-runs.csv"))
        print(f"{sum(runs.restore(path, Store(args.store)) for path in several)} runs taken over from {args.out}.")
    found = parts.make(args, Store(args.store))
    lines = {part: part.lines(cases, args.rows, tuple(args.seeds)) for part, cases in found}
    if args.list:
        records = Store(args.store).records()
        for line in (line for several in lines.values() for line in several):
            for trial in line.open_trials(records):
                print(trial)
        return 0
    try:
        whole = args.render or make_runs(args)
    except KeyboardInterrupt:
        print("\ninterrupted; finished runs are kept, and the same command makes the others", file=sys.stderr)
        return 130
    records = Store(args.store).records()
    for part, several in lines.items():
        path = render.render(part, several, records, args.out, args.name)
        print(f"No result of {part.name} yet." if path is None else f"\n{path.read_text(encoding='utf-8')}\n{path}")
    page = overview.write(args.out)
    if page is not None:
        print(f"All tables side by side: {page}")
        if who_wins.write(args.out) is not None:
            print(f"Who wins, counted anew: {args.out / who_wins.PAGE}")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
