"""Options that several commands share, and what a command hands back. Nothing here is heavy to import."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn


@dataclass(frozen=True)
class Outcome:
    """The result of a command: for `--json`, for people, the exit status, and whether it is printed: of several
    processes by one."""

    data: dict[str, Any]
    text: str
    status: int = field(default=0)
    printed: bool = True


class Parser(argparse.ArgumentParser):
    """argparse, but what is wrong is said in one line, by the command that was asked for, with the nearest name."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; `{self.prog} --help` lists what there is\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # argparse would first say what is missing, and leave what is mistyped to the parser of all commands, which
        # does not know this one's options.
        words = list(sys.argv[1:] if args is None else args)
        for word in words[: words.index("--")] if "--" in words else words:
            if self._subparsers is not None and not word.startswith("-"):
                break  # the command; what follows is for its own parser
            if re.match(r"--[A-Za-z]\S*$", word) and word.partition("=")[0] not in self._option_string_actions:
                self._unknown(word)
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self._unknown(unknown[0])
        return options, unknown

    def _unknown(self, word: str) -> NoReturn:
        near = difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, n=1)
        self.error(f"there is no {word!r}" + (f", did you mean {near[0]}?" if near else ""))


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], Outcome],
    summary: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """A subcommand with the options that all have."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bars and no warnings")
    parser.add_argument("--traceback", action="store_true", help="also show where in the code an error came from")
    return parser


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, say what would be done, and write nothing"
    )


def add_loading(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded."""
    parser.add_argument(
        "--task",
        choices=["causal_lm", "sequence_classification"],
        help="the kind of model (default: what its config.json says)",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: the one in its config.json"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def add_data(parser: argparse.ArgumentParser, split: str, needed: bool) -> None:
    """Where text or rows come from."""
    parser.add_argument(
        "--data",
        metavar="FILE_OR_NAME",
        required=needed,
        help="a file (.txt, .jsonl, .csv, .parquet) or a data set on the Hub",
    )
    parser.add_argument("--data-name", metavar="NAME", help="the data set's configuration, e.g. wikitext-2-raw-v1")
    parser.add_argument("--split", default=split, help=f"of the data set (default: {split})")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="default: text")


def positive(text: str) -> int:
    """Raises:
    ArgumentTypeError: unless it is an integer above 0."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"should be a whole number above 0, got {text!r}")
    return value


@contextlib.contextmanager
def nothing_shown() -> Iterator[None]:
    """Without progress bars, without what transformers logs below errors, and without what anything prints."""
    names = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)  # which libraries read when they are imported
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), _imported_silenced():
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _imported_silenced() -> Iterator[None]:
    """The same for libraries that are imported already, as by `python -m peft_sparse`."""
    with contextlib.ExitStack() as undone:
        if logging := sys.modules.get("transformers.utils.logging"):
            undone.callback(logging.set_verbosity, logging.get_verbosity())
            logging.set_verbosity_error()
            if logging.is_progress_bar_enabled():
                undone.callback(logging.enable_progress_bar)
                logging.disable_progress_bar()
        datasets = sys.modules.get("datasets.utils")
        if datasets is not None and not datasets.are_progress_bars_disabled():
            undone.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        yield
