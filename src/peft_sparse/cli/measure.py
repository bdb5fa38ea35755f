"""`peft-sparse report`, `verify` and `evaluate`: numbers about a model; nothing is written but a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from peft_sparse.cli._options import Outcome, add_command, add_data, add_loading, positive

REPORT_EXAMPLES = """\
  peft-sparse report pruned
  peft-sparse report pruned --plot sparsity.png
  peft-sparse report owner/model --json | python -c "import json, sys; print(json.load(sys.stdin)['total_sparsity'])"
"""
VERIFY_EXAMPLES = """\
  peft-sparse verify merged --reference pruned
  peft-sparse verify merged --pattern 2:4
  peft-sparse verify merged --reference pruned && peft-sparse pack merged packed
"""
EVALUATE_EXAMPLES = """\
  peft-sparse evaluate merged --data test.txt --length 512
  peft-sparse evaluate merged --data Salesforce/wikitext --data-name wikitext-2-raw-v1 --split test
  peft-sparse evaluate merged --task sequence_classification --data dev.jsonl --text-column sentence \\
      --label-column label --metric accuracy f1
  peft-sparse evaluate out/adapter --config configs/spp_causal_lm.yaml
"""


def add_commands(commands: Any) -> None:
    """Add the commands."""
    _add_report(commands)
    _add_verify(commands)
    _add_evaluate(commands)


def _add_report(commands: Any) -> None:
    report = add_command(
        commands,
        "report",
        run_report,
        "where the zeros of a model are",
        "Count the zeros of the linears in a model's transformer blocks, and name the pattern that they follow.",
        REPORT_EXAMPLES,
    )
    report.add_argument("model", metavar="MODEL", help="a folder, dense or packed, or a name on the Hub")
    report.add_argument(
        "--plot",
        metavar="FILE",
        help="draw how full rows and columns are: .png, .svg or .pdf; an old picture there is replaced",
    )


def _add_verify(commands: Any) -> None:
    verify = add_command(
        commands,
        "verify",
        run_verify,
        "whether all zeros are still there",
        "Compare the zeros of a model with those of the model it came from, or with an N:M pattern. Exit status 1 if\n"
        "a zero was lost or the pattern does not hold.",
        VERIFY_EXAMPLES,
    )
    verify.add_argument("model", metavar="MODEL", help="a folder, dense or packed, or a name on the Hub")
    verify.add_argument("--reference", metavar="MODEL", help="the pruned model that it was made from")
    verify.add_argument("--pattern", metavar="N:M", help="that every layer has to follow")


def _add_evaluate(commands: Any) -> None:
    evaluate = add_command(
        commands,
        "evaluate",
        run_evaluate,
        "perplexity or metrics of a model on data",
        "Measure a model, or an adapter on its base: perplexity of a text, or loss and metrics of a classifier.",
        EVALUATE_EXAMPLES,
    )
    evaluate.add_argument("model", metavar="MODEL", help="a folder: dense, packed or an adapter; or a name on the Hub")
    evaluate.add_argument("--config", metavar="CONFIG.yaml", help="take data and metrics from this recipe")
    evaluate.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a value of the recipe",
        dest="overrides",
    )
    add_data(evaluate, "validation", needed=False)
    evaluate.set_defaults(split=None, text_column=None)  # so that one that is given beside a recipe is seen
    evaluate.add_argument("--label-column", metavar="NAME", help="for sequence_classification")
    evaluate.add_argument("--second-text-column", metavar="NAME", help="for pairs of texts")
    evaluate.add_argument("--num-labels", type=positive, metavar="N", help="1 for a number (default: the model's)")
    evaluate.add_argument("--metric", nargs="+", default=[], metavar="NAME", help="accuracy, f1, pearsonr, ...")
    evaluate.add_argument("--length", type=positive, metavar="TOKENS", help="of a window (default: up to 512)")
    evaluate.add_argument("--examples", type=positive, metavar="N", help="at most so many rows, or windows of text")
    evaluate.add_argument(
        "--batch-size", type=positive, metavar="N", help="examples at once (default: 8); text goes window by window"
    )
    evaluate.add_argument("--tokenizer", metavar="MODEL", help="default: the model's")
    add_loading(evaluate)


def run_report(options: argparse.Namespace) -> Outcome:
    """Count zeros, and draw them."""
    from peft_sparse.evaluation import plot_sparsity, sparsity_report

    if options.plot is not None:
        _check_picture(options.plot)  # first: counting may take long
    report = sparsity_report(options.model)
    if options.plot is not None:
        plot_sparsity(options.model).savefig(options.plot)
    return Outcome(report.to_dict(), str(report))


def _check_picture(path: str) -> None:
    """Raises:
    ValueError: if no picture can be written there.
    ImportError: if matplotlib is not installed."""
    from peft_sparse.checkpoint.new_folder import check_writable
    from peft_sparse.evaluation.plots import picture_formats

    file, formats = Path(path), picture_formats()
    if file.suffix.lstrip(".").lower() not in formats:
        raise ValueError(f"A picture's ending tells its format, one of {', '.join(formats)}, got {path!r}.")
    if file.is_dir():
        raise ValueError(f"A picture is a file, got {path!r}, which is a folder; name a file in it.")
    if not file.parent.is_dir():
        raise ValueError(
            f"A picture goes into a folder that is there, got {path!r} and no folder {str(file.parent)!r}; make it, "
            "or choose another place."
        )
    check_writable(file.parent)


def run_verify(options: argparse.Namespace) -> Outcome:
    """Compare zeros."""
    from peft_sparse.evaluation import verify_sparsity

    if options.reference is None and options.pattern is None:
        raise ValueError("Zeros are compared with a model or a pattern, got neither; pass --reference or --pattern.")
    report = verify_sparsity(options.model, reference=options.reference, pattern=options.pattern)
    return Outcome(report.to_dict(), str(report), report.exit_status)


def run_evaluate(options: argparse.Namespace) -> Outcome:
    """Measure on data."""
    from peft_sparse.training import evaluate_model, evaluate_recipe, load_recipe

    if (options.config is None) == (options.data is None):
        raise ValueError("Data comes from --data or from a recipe, `--config`; give one of the two.")
    if options.overrides and options.config is None:
        raise ValueError(f"`--set` changes a recipe, got {options.overrides[0]!r} without one; name it in `--config`.")
    if options.config is not None:
        _check_recipe_alone(options)
        recipe = load_recipe(options.config, options.overrides)
        result = evaluate_recipe(recipe, options.model, options.batch_size, progress=not options.quiet)
    else:
        text = options.text_column or "text"
        result = evaluate_model(
            options.model,
            task=options.task,
            dtype=options.dtype,
            num_labels=options.num_labels,
            tokenizer=options.tokenizer,
            trust_remote_code=options.trust_remote_code,
            data={
                "path": options.data,
                "name": options.data_name,
                "validation_split": options.split or "validation",
                "text": [text, options.second_text_column] if options.second_text_column else text,
                "label": options.label_column,
                "max_length": options.length,
                "validation_examples": options.examples,
            },
            metrics=options.metric,
            batch_size=options.batch_size,
            progress=not options.quiet,
        )
    return Outcome(result, table(result))


def _check_recipe_alone(options: argparse.Namespace) -> None:
    """Raises:
    ValueError: if an option is given that the recipe decides."""
    for name in ("data_name", "split", "text_column", "label_column", "second_text_column", "num_labels", "metric",
                 "length", "examples", "tokenizer", "task", "dtype", "trust_remote_code"):  # fmt: skip
        if getattr(options, name):
            raise ValueError(
                f"With `--config` the recipe names data, metrics and model settings, got --{name.replace('_', '-')} "
                "beside it; change the recipe's value with `--set PART.KEY=VALUE`."
            )


def table(values: dict[str, Any]) -> str:
    """One line for each value."""
    width = max(map(len, values))
    return "\n".join(f"{name:<{width}}  {_shown(name, value)}" for name, value in values.items())


def _shown(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2%}" if name == "sparsity" else f"{value:.4f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "-" if value is None else str(value)
