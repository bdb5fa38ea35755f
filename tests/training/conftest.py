"""Data for recipes."""

import pytest

from models import WORDS
from recipes import write_rows


@pytest.fixture
def sentences(tmp_path):
    """The label is a function of the first word; also a name for it, a number, and a question for it."""
    rows = []
    for n in range(40):
        words = [WORDS[(7 * n + 3 * k) % 90] for k in range(5)]
        high = (7 * n) % 90 > 45
        rows.append({
            "text": " ".join(words), "label": int(high), "name": "high" if high else "low", "score": n / 8,
            "question": " ".join(words[:3]), "answer": words[4],
        })  # fmt: skip
    return write_rows(tmp_path / "rows.jsonl", rows)
