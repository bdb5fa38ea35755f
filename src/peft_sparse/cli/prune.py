"""`peft-sparse prune`."""

from __future__ import annotations

import argparse
import re
from typing import Any

from peft_sparse.cli._options import Outcome, add_command, add_data, add_dry_run, add_loading, positive

EXAMPLES = """\
  peft-sparse prune gpt2 pruned --method magnitude --sparsity 0.5
  peft-sparse prune ./llama pruned --method wanda --pattern 2:4 --data calibration.jsonl
  peft-sparse prune ./llama pruned --method sparsegpt --sparsity 0.75 --data allenai/c4 --data-name en --streaming
  peft-sparse prune ./llama pruned --pattern 2:4 --data text.txt --dry-run
  peft-sparse prune ./llava pruned --data text.txt --exclude-modules '.*vision_tower.*'
"""
_NAMES = "names or ends of names, or one regex for full names"
CALIBRATION = "calibration, for all methods but magnitude"


def add_commands(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "prune",
        run,
        "zero the least important weights of a model",
        "Prune the linears inside a model's transformer blocks, and save the result with its tokenizer. Counts of\n"
        "zeros are exact.",
        EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, dense or packed, or a name on the Hub")
    parser.add_argument("output", metavar="OUTPUT", help="a new folder")
    parser.add_argument(
        "--method", choices=["magnitude", "wanda", "sparsegpt", "ria"], default="wanda", help="default: wanda"
    )
    parser.add_argument(
        "--pattern", default="unstructured", help="unstructured, or N:M such as 2:4 (default: unstructured)"
    )
    parser.add_argument("--sparsity", type=float, help="share of zeros in [0, 1) (default: 0.5; N:M fixes it)")
    parser.add_argument("--group", choices=["layer", "row"], help="what competes (default: as in the method's paper)")
    parser.add_argument("--target-modules", nargs="+", metavar="NAME", help=f"only linears with these {_NAMES}")
    parser.add_argument("--exclude-modules", nargs="+", metavar="NAME", help=f"all but linears with these {_NAMES}")
    data = parser.add_argument_group(CALIBRATION)
    add_data(data, "train", needed=False)  # type: ignore[arg-type] # a group adds arguments as a parser does
    data.add_argument("--streaming", action="store_true", help="read no more of the data than is needed")
    data.add_argument("--num-sequences", type=positive, default=128, metavar="N", help="default: 128")
    data.add_argument("--length", type=positive, metavar="TOKENS", help="of a sequence (default: up to 512)")
    data.add_argument("--batch-size", type=positive, default=1, metavar="N", help="sequences at once (default: 1)")
    data.add_argument("--seed", type=int, default=0, help="of the draw of sequences (default: 0)")
    data.add_argument("--checkpoint-dir", metavar="FOLDER", help="a new folder for finished blocks, to go on from")
    data.add_argument("--device", help="move one block at a time there, e.g. cuda")
    data.add_argument("--measure-error", action="store_true", help="also tell how far each linear's output moves")
    add_loading(parser)
    parser.add_argument("--tokenizer", metavar="MODEL", help="also saved with the result (default: the model's)")
    parser.add_argument("--pack", action="store_true", help="save packed, as `peft-sparse pack` does")
    add_dry_run(parser)
    parser.set_defaults(calibration={action.dest: action for action in data._group_actions})


def run(options: argparse.Namespace) -> Outcome:
    """Prune and save."""
    from peft_sparse.checkpoint import prune_checkpoint

    if options.method == "magnitude":
        _refuse_calibration(options)
    result = prune_checkpoint(
        options.model,
        options.output,
        options.method,
        pattern=options.pattern,
        sparsity=options.sparsity,
        group=options.group,
        data=_data(options),
        calibration=_calibration(options),
        task=options.task,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        packed=options.pack,
        trust_remote_code=options.trust_remote_code,
        dry_run=options.dry_run,
        target_modules=_names(options.target_modules),
        exclude_modules=_names(options.exclude_modules),
        **_of_calibrating_methods(options),
    )
    return Outcome(result.to_dict(), str(result))


def _data(options: argparse.Namespace) -> dict[str, Any] | None:
    """The arguments of `load_rows`."""
    if options.data is None:
        return None
    names = {"path": options.data, "name": options.data_name, "split": options.split}
    return names | {"streaming": options.streaming}


def _calibration(options: argparse.Namespace) -> dict[str, Any] | None:
    """The arguments of `calibration_batches`."""
    if options.method == "magnitude":
        return None
    given = {name: getattr(options, name) for name in ("num_sequences", "batch_size", "seed", "text_column")}
    return given | ({"length": options.length} if options.length else {})


def _of_calibrating_methods(options: argparse.Namespace) -> dict[str, Any]:
    """Further arguments of the pruners, which `prune_magnitude` has not."""
    if options.method == "magnitude":
        return {}
    given = {name: getattr(options, name) for name in ("checkpoint_dir", "device", "measure_error")}
    return given | {"progress": not options.quiet}


def _names(given: list[str] | None) -> list[str] | str | None:
    """What PEFT takes, where text is a regex: a single name with a sign that no name has is one."""
    return given[0] if given and len(given) == 1 and not re.fullmatch(r"[\w.-]+", given[0]) else given


def _refuse_calibration(options: argparse.Namespace) -> None:
    """Raises:
    ValueError: if an option was given that magnitude pruning would not heed."""
    given = [
        action.option_strings[0]
        for name, action in options.calibration.items()
        if getattr(options, name) != action.default
    ]
    if given:
        raise ValueError(
            f"magnitude prunes by weights alone, without calibration, got {', '.join(given)}; leave "
            f"{'it' if len(given) == 1 else 'them'} out, or take another --method."
        )
