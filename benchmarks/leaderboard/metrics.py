"""Metrics of the tables, from predictions: GLUE's four, and BLEU. Written out, as the Hub's are out of reach here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch


def accuracy(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of equal ones."""
    return (predicted == labels).float().mean().item()


def f1(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Of label 1; 0 if it is neither there nor predicted.

    Examples:
        >>> round(f1(torch.tensor([1, 1, 0]), torch.tensor([1, 0, 0])), 4)
        0.6667
    """
    both = int(((predicted == 1) & (labels == 1)).sum())
    total = int((predicted == 1).sum() + (labels == 1).sum())
    return 2 * both / total if total else 0.0


def pearson(first: torch.Tensor, second: torch.Tensor) -> float:
    """Correlation; 0 if either does not vary."""
    a, b = first.double() - first.double().mean(), second.double() - second.double().mean()
    scale = (a.norm() * b.norm()).item()
    return (a @ b).item() / scale if scale else 0.0


def matthews(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Correlation of two labels, which is Pearson's of zeros and ones."""
    return pearson(predicted.float(), labels.float())


def bleu(found: Sequence[str], references: Sequence[Sequence[str]], order: int = 4) -> float:
    """Corpus BLEU in percent, of lower-cased words and punctuation marks; the brevity penalty takes the closest
    reference.

    Not comparable with tools that tokenize in another way.

    Examples:
        >>> round(bleu(["the cat sat on the mat"], [["the cat sat on the mat", "a cat"]]), 1)
        100.0
    """
    matches, totals, length, reference_length = [0] * order, [0] * order, 0, 0
    for text, several in zip(found, references, strict=True):
        words, candidates = _words(text), [_words(one) for one in several]
        length += len(words)
        reference_length += min((len(one) for one in candidates), key=lambda n: (abs(n - len(words)), n))
        for n in range(1, order + 1):
            counts = _ngrams(words, n)
            most: Counter = Counter()
            for one in candidates:
                most |= _ngrams(one, n)
            matches[n - 1] += sum((counts & most).values())
            totals[n - 1] += sum(counts.values())
    if min(matches) == 0:
        return 0.0
    mean = sum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / order
    return 100 * math.exp(mean + min(0.0, 1 - reference_length / length))


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() or c == "'" else f" {c} " for c in text.lower()).split()


def _ngrams(words: list[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
