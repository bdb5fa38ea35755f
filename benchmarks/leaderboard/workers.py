"""The processes that make the runs. In a module of its own: a process that is started anew cannot find what is in the
`__main__` of a package."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time

import torch

from benchmarks import report
from benchmarks.leaderboard import parts
from benchmarks.leaderboard.plan import work
from benchmarks.leaderboard.store import Store


def make_runs(args: argparse.Namespace) -> bool:
    """Make the runs that are missing, in this process or in `args.workers` new ones.

    Returns:
        Whether all workers came to their end.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads and ours would compete
    if args.workers == 1:
        _work(args)
        return True
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_quietly_interrupted, args=(args,)) for _ in range(args.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return not any(worker.exitcode for worker in workers)


def _quietly_interrupted(args: argparse.Namespace) -> None:
    """[`_work`] in a process that gets the Ctrl-C of its terminal too, of which the first one tells."""
    try:
        _work(args)
    except KeyboardInterrupt:
        sys.exit(130)


def _work(args: argparse.Namespace) -> None:
    """One worker, in a process of its own or in this one."""
    torch.set_num_threads(args.threads)
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    store, facts = Store(args.store), _facts(args)
    for part, cases in parts.make(args, store):
        lines = part.lines(cases, args.rows, tuple(args.seeds))
        work(store, lines, part.run, deadline, lambda text: print(text, flush=True), facts)


def _facts(args: argparse.Namespace) -> dict[str, object]:
    """Hardware, workers that shared it, versions and commit, for every record."""
    given = argparse.Namespace(
        rounds=None, device=torch.device(args.device), dtype=torch.float32, threads=args.threads
    )
    known = {"workers": args.workers} | report.metadata(given)
    return {name: value for name, value in known.items() if value is not None}
