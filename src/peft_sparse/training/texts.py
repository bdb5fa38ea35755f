"""Text for a causal language model as examples.

Two kinds: documents, joined and cut into windows so that nothing is padded; prompt and completion, where by default
only the completion is learned.
"""

from __future__ import annotations

import reprlib
import string
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from peft_sparse.training.parts import DataPart

Row = dict[str, Any]
BATCH = 256  # rows that are tokenised together
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80

# Stanford Alpaca's two prompts (Taori et al., 2023), which SPP's authors train on: with and without an input.
_ALPACA = (
    "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


def fields(template: str) -> list[str]:
    """The columns that a template names.

    Raises:
        ValueError: for anything in braces that is no name of a column."""
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f"A template has columns in braces, got {template!r} ({error}).") from error
    odd = [field for field in fields if not field.replace("_", "a").replace(" ", "a").replace("-", "a").isalnum()]
    if odd:
        raise ValueError(f"A template has names of columns in braces, got {odd[0]!r} in {template!r}.")
    return fields


def windows(rows: Iterable[Row], data: DataPart, tokenizer: Any) -> Iterator[Row]:
    """Documents joined and cut into windows of exactly `max_length` tokens; the rest at the end is left out."""
    between = separator(data, tokenizer)
    ids: list[int] = []
    for batch in batches(rows):
        texts = [text_of(row, str(data.text)) for row in batch]
        for document in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            ids += document + between
        full = len(ids) // data.max_length * data.max_length
        for start in range(0, full, data.max_length):
            window = ids[start : start + data.max_length]
            yield {"input_ids": window, "attention_mask": [1] * len(window), "labels": window}
        ids = ids[full:]


def separator(data: DataPart, tokenizer: Any) -> list[int]:
    """The tokens between documents."""
    if data.separator is not None:
        return (
            tokenizer(data.separator, add_special_tokens=False, verbose=False)["input_ids"] if data.separator else []
        )
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def completions(rows: Iterable[Row], data: DataPart, tokenizer: Any) -> Iterator[Row | None]:
    """Prompt and completion, cut to `max_length` tokens; None for a row of which nothing would be learned then."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for batch in batches(rows):
        pairs = [pair(row, data) for row in batch]
        prompts = tokenizer([prompt for prompt, _ in pairs], verbose=False)["input_ids"]
        answers = tokenizer([answer for _, answer in pairs], add_special_tokens=False, verbose=False)["input_ids"]
        for prompt, answer in zip(prompts, answers, strict=True):
            prompt = prompt[:-1] if end and prompt[-1:] == end else prompt
            ids = (prompt + answer + end)[: data.max_length]
            learned = 0 if data.train_on_prompt else min(len(prompt), len(ids))
            labels = [-100] * learned + ids[learned:]
            learns = learned < len(ids)  # else the prompt alone is too long
            yield {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels} if learns else None


def pair(row: Row, data: DataPart) -> tuple[str, str]:
    """The prompt and the completion of a row.

    Raises:
        ValueError: if a column of them is empty in this row, or has what is no text or number, such as a list."""
    if data.template == "alpaca":
        given = row.get("input") and _given(row, "input")
        with_input = ", paired with an input that provides further context" if given else ""
        given = f"### Input:\n{given}\n\n" if given else ""
        prompt = _ALPACA.format(with_input=with_input, instruction=_given(row, "instruction"), input=given)
        return prompt, str(_given(row, "output"))
    return _filled(str(data.prompt), row), _filled(str(data.completion), row)


def _filled(template: str, row: Mapping[str, Any]) -> str:
    return template.format(**{field: _given(row, field) for field in fields(template)})


def _given(row: Mapping[str, Any], column: str) -> Any:
    value = row[column]
    if value is None:
        raise ValueError(
            f"A prompt and a completion have something in each of their columns, got None for {column!r} in the row "
            f"{shown(row)}; leave out such rows."
        )
    if not isinstance(value, (str, int, float)):
        raise ValueError(
            f"A prompt and a completion are made of strings, numbers and truth values, got {type(value).__name__} for "
            f"{column!r} in the row {shown(row)}; write what is in it (turns of a chat, say) into columns of strings."
        )
    return value


def text_of(row: Row, column: str) -> str:
    """Raises:
    ValueError: if it is no string."""
    value = row[column]
    if not isinstance(value, str):
        way_out = "leave out such rows" if value is None else "choose another column"
        raise ValueError(
            f"A column of text has strings, got {_SHORT.repr(value)} in {column!r} of the row {shown(row)}; {way_out}."
        )
    return value


def shown(row: Mapping[str, Any]) -> str:
    """A row as a message names it: by the starts of its values."""
    return "{" + ", ".join(f"{key!r}: {_SHORT.repr(value)}" for key, value in row.items()) + "}"


def batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows to tokenise together."""
    iterator = iter(rows)
    while batch := list(islice(iterator, BATCH)):
        yield batch
