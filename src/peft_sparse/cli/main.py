"""`peft-sparse`: its subcommands, its exit statuses, and what is done with errors.

A command is a function of the parsed options that returns an [`Outcome`]. Commands import the library when they run,
so that parsing is quick. While one runs, what anything prints goes to stderr: stdout has the result alone, so that
`--json` can be piped.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from peft_sparse.cli import _hub as hub
from peft_sparse.cli import _options as shared
from peft_sparse.cli import convert, measure, prune, train

DONE, CHECK_FAILED, USAGE, FAILED, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143

EPILOG = """\
a first session:
  peft-sparse prune MODEL pruned --method wanda --pattern 2:4 --data text.txt
  peft-sparse report pruned
  peft-sparse finetune configs/spp_causal_lm.yaml     tunes ./pruned on ./text.txt, into ./out
  peft-sparse merge out/adapter merged
  peft-sparse verify merged --reference pruned
  peft-sparse pack merged packed

exit status:
  0  done; for verify: no zero was lost and the pattern holds
  1  done, and a check failed: verify or merge found lost zeros or groups against the pattern
  2  the command line is wrong; nothing was run
  3  the command could not be carried out; the message says why, --traceback where
  130  interrupted with Ctrl-C
  143  ended by SIGTERM, as `timeout` and batch systems send it

`peft-sparse COMMAND --help` has the options and examples of each command.
"""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = shared.Parser(
        prog="peft-sparse",
        description="Sparse language models: prune, fine-tune, merge, check, store. Every zero kept.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for group in (prune, train, convert, measure):
        group.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None, before_running: Callable[[], Any] = lambda: None) -> int:
    """Parse, run, print.

    Args:
        argv: without the program's name; None: the process's.
        before_running: called when the command line is known to be right.

    Returns:
        The exit status.
    """
    parser = make_parser()
    try:
        options = parser.parse_args(argv)
        if options.version:
            from importlib.metadata import version

            print(version("peft-sparse"))
            return DONE
        if options.command is None:
            parser.print_help()
            return USAGE
    except SystemExit as stop:  # argparse has printed help or what is wrong
        return int(stop.code or 0)
    interrupts: list[int] = []
    try:
        with _quiet_streams(options.quiet):
            before_running()
            with _noted(interrupts), hub.no_long_wait():
                outcome: shared.Outcome = options.run(options)
        if outcome.printed:
            with _reader_may_leave(sys.stdout):
                _print(outcome, options.json)
        return outcome.status
    except KeyboardInterrupt:
        return _interrupted(interrupts)
    except BrokenPipeError:  # of stderr
        _to_nowhere(sys.stderr)
        return FAILED
    except Exception as error:
        if options.traceback:
            traceback.print_exc()
        if interrupts:  # a library has made something else of it
            return _interrupted(interrupts)
        with _reader_may_leave(sys.stderr):
            print(f"error: {_message(error)}", file=sys.stderr)
        return FAILED


@contextlib.contextmanager
def _noted(interrupts: list[int]) -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C, as ever, and on SIGTERM, to tidy up alike; note which it was."""
    before = {number: signal.getsignal(number) for number in _signals()}
    process = os.getpid()

    def interrupt(number: int, _: Any) -> None:
        if number == signal.SIGTERM and os.getpid() != process:  # a worker that was forked, ended by its pool
            os._exit(TERMINATED)
        interrupts.append(number)
        raise KeyboardInterrupt

    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signals() -> list[int]:
    """Those that end a command: not those that are ignored, as by `nohup`, or that somebody else has an answer to."""
    if threading.current_thread() is not threading.main_thread():
        return []
    ending = [] if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else [signal.SIGINT]
    # A process among others may wait for them where no handler is run, and its launcher waits for it.
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        ending.append(signal.SIGTERM)
    return list(ending)


def _interrupted(interrupts: Sequence[int] = ()) -> int:
    terminated = signal.SIGTERM in interrupts
    print("\nterminated" if terminated else "\ninterrupted", file=sys.stderr)
    return TERMINATED if terminated else INTERRUPTED


def _message(error: Exception) -> str:
    """One paragraph. The library's own errors are whole sentences; others get the name of their class."""
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, ImportError, FileNotFoundError)) and text:
        return text
    return f"{type(error).__name__}: {text or 'no message'} (--traceback shows where)"


def _print(outcome: shared.Outcome, as_json: bool) -> None:
    from peft_sparse.evaluation.strict_json import strict_json

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # all is done: no name in it may be an error of a terminal's
    print(strict_json(outcome.data) if as_json else outcome.text, flush=True)


@contextlib.contextmanager
def _reader_may_leave(stream: Any) -> Iterator[None]:
    """Of what is printed last: the status is that of the command, whoever reads its output:
    `peft-sparse report MODEL | head`."""
    try:
        yield
    except BrokenPipeError:
        _to_nowhere(stream)


def _to_nowhere(stream: Any) -> None:
    """Python would write the rest at its end, and fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def _quiet_streams(quiet: bool) -> Iterator[None]:
    """Prints go to stderr, warnings are one line each; nothing but errors with `quiet`."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)

    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.showwarning = show
        # PEFT 0.21 reads an attribute that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        if not quiet:
            yield
            return
        warnings.simplefilter("ignore")
        with shared.nothing_shown():
            yield


if __name__ == "__main__":
    sys.exit(main())
