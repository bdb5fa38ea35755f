"""The demo's results as plain text: tables that fit a terminal, each with what one has to know to read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell; the first is flush left, the others right.

    Examples:
        >>> print(table(["model", "zeros"], [["dense", "0"], ["pruned", "128"]]))
        model   zeros
        ------  -----
        dense       0
        pruned    128
    """
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    lines = (
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in cells)
    )
    return "\n".join(line.rstrip() for line in lines)


def language_model(result: dict[str, Any]) -> str:
    """Two tables of part (a): perplexities, and the zeros at every stage."""
    rows = result["rows"]
    quality = table(
        ["perplexity", "tuner", "untuned", "tuned", "reloaded", "sparsity", "trained", "of model", "minutes"],
        [
            [
                row["name"],
                row["tuner"],
                _number(row["perplexity_untuned"]),
                _number(row["perplexity_tuned"]),
                _number(row["perplexity_reloaded"]),
                _percent(row["sparsity"]),
                _millions(row["trainable_parameters"]),
                _percent(row["trainable_share"]),
                f"{row['seconds'] / 60:.1f}",
            ]
            for row in rows
        ],
    )
    pruned = [row for row in rows if row["zeros_pruned"] is not None]
    zeros = table(
        ["zeros in the linears", "pruned", "merged", "reloaded", "changed place"],
        [
            [
                row["name"],
                *(f"{row[key]:,}" for key in ("zeros_pruned", "zeros_merged", "zeros_reloaded", "zeros_moved")),
            ]
            for row in pruned
        ],
    )
    notes = f"""\
Text: {result["text"]}.
{result["train_tokens"]:,} tokens to train on ({result["calibration_tokens"]:,} of them calibrate Wanda); the last \
documents, {result["held_out_tokens"]:,} tokens, are held out.
Training: {result["steps"]} steps of {result["batch_size"]} x {result["window"]} tokens, all linears of the blocks. \
Held-out and training text are of one kind,
so a part of each gain is adaptation to it: compare with the dense model tuned on the same text."""
    saved = "\n".join(f"Saved: {row['saved_in']}" for row in pruned)
    return f"LANGUAGE MODEL  {result['model']}\n\n{quality}\n\n{zeros}\n\n{notes}\n{saved}"


def sentiment(result: dict[str, Any]) -> str:
    """The table of part (b)."""
    body = table(
        ["sentiment", "accuracy", "merged", "sparsity", "trained", "of model", "seconds"],
        [
            [
                row["name"],
                f"{row['accuracy']:.4f}",
                "-" if row["accuracy_merged"] is None else f"{row['accuracy_merged']:.4f}",
                _percent(row["sparsity"]),
                _millions(row["trainable_parameters"]),
                _percent(row["trainable_share"]),
                f"{row['seconds']:.0f}",
            ]
            for row in result["rows"]
        ],
    )
    notes = f"""\
Data: movie snippets from the source package vaderSentiment 3.3.2, positive or negative by their mean rating:
{result["train_examples"]:,} to train on, {result["held_out_examples"]:,} held out. Always the more frequent label: \
{_percent(result["majority"])}. {result["steps"]} steps of {result["batch_size"]} for each row.
Sparsity: of the blocks' linears, after merging. Trained: parameters, and their share of the dense model's.
Movement's scores start at zero, whatever the size of the weights; its paper trains for epochs, which these steps are \
not."""
    saved = "\n".join(f"Saved: {row['saved_in']}" for row in result["rows"] if row["saved_in"])
    return f"SENTIMENT  {result['model']}\n\n{body}\n\n{notes}\n{saved}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _millions(value: int) -> str:
    return f"{value / 1e6:.2f}M"
