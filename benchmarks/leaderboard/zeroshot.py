"""Zero-shot accuracy: which choice a language model finds the likeliest.

log p(choice | question) is divided by the choice's length in characters, as the harnesses' `acc_norm` does, since a
longer choice has more to be improbable in. Where the choice fills a gap ("_"), the text behind the gap is scored with
each choice in front of it, and nothing is divided: it is the same text for all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

TASKS = {
    "arc_challenge": "zeroshot/arc_challenge/test.jsonl",
    "arc_easy": "zeroshot/arc_easy/test.jsonl",
    "boolq_noctx": "zeroshot/boolq_noctx/validation.jsonl",
    "openbookqa": "zeroshot/openbookqa/test.jsonl",
    "winogrande": "zeroshot/winogrande/validation.jsonl",
}
BATCH = 16
GAP = "_"


class Request(NamedTuple):
    """A continuation to score after a context, and what to divide its log-likelihood by."""

    context: str
    continuation: str
    length: int


def requests(question: str, choices: list[str]) -> list[Request]:
    """One for each choice.

    Examples:
        >>> requests("Ann met Bo as _ left.", ["Ann", "Bo"])[1]
        Request(context='Ann met Bo as Bo', continuation=' left.', length=1)
        >>> requests("The sky is", ["blue"])[0]
        Request(context='The sky is', continuation=' blue', length=4)
    """
    if GAP in question:
        before, _, after = question.partition(GAP)
        return [Request(before + choice, " " + after.strip(), 1) for choice in choices]
    return [Request(question, " " + choice, max(1, len(choice))) for choice in choices]


def read(data: Path, task: str, limit: int | None) -> list[dict[str, Any]]:
    """Rows of a task: `question`, `choices`, `label`."""
    lines = (data / TASKS[task]).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:limit]]


def accuracy(model: nn.Module, tokenizer: Any, rows: list[dict[str, Any]], context_length: int) -> float:
    """Share of rows whose right choice has the highest score."""
    asked = [requests(row["question"], row["choices"]) for row in rows]
    scores = iter(log_likelihoods(model, tokenizer, [one for several in asked for one in several], context_length))
    right = 0
    for row, several in zip(rows, asked, strict=True):
        normalised = [next(scores) / one.length for one in several]
        right += max(range(len(several)), key=normalised.__getitem__) == row["label"]
    return right / len(rows)


@torch.no_grad()
def log_likelihoods(model: nn.Module, tokenizer: Any, asked: list[Request], context_length: int) -> list[float]:
    """log p(continuation | context) of each, in the order given; contexts that do not fit lose their beginning.

    The model takes `logits_to_keep`, as all but a few of transformers do.
    """
    model.eval()
    device = next(model.parameters()).device
    pairs = [_encode(tokenizer, one, context_length) for one in asked]
    found = [0.0] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda index: len(pairs[index][0]))  # little padding
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        width = max(len(pairs[index][0]) for index in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask = torch.zeros(len(batch), width, dtype=torch.int64)
        for place, index in enumerate(batch):
            tokens, _ = pairs[index]
            ids[place, : len(tokens)] = torch.tensor(tokens)
            mask[place, : len(tokens)] = 1
        # A vocabulary is wide: only logits from the first one that predicts a continuation.
        first = min(len(pairs[index][0]) - 1 - pairs[index][1] for index in batch)
        asks = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        logits = model(**asks, logits_to_keep=width - first).logits
        targets = ids[:, first + 1 :, None].to(device)
        logs = F.log_softmax(logits[:, :-1].float(), -1).gather(2, targets).squeeze(2).cpu()
        for place, index in enumerate(batch):
            tokens, count = pairs[index]
            end = len(tokens) - 1 - first
            found[index] = float(logs[place, end - count : end].sum())
    return found


def _encode(tokenizer: Any, one: Request, context_length: int) -> tuple[list[int], int]:
    """Tokens of context and continuation, and how many at the end are scored. They are encoded together, since a
    token may span the border; at least one token stays in front, as nothing predicts the first."""
    context = tokenizer(one.context)["input_ids"]
    both = tokenizer(one.context + one.continuation)["input_ids"]
    count = max(1, min(len(both) - len(context), context_length - 1, len(both) - 1))
    return both[-context_length:], count
