"""Calibration data from a tokenizer and text, from rows of a dataset, or from what are batches already.

A batch is a dict of tensors as the model's forward takes them; see checks.py for what a pruner asks of it.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

Batch = dict[str, torch.Tensor]

_SOUNDS = ("input_values", "input_features")

# What tokenizers and collators put beside a model's inputs.
NOT_INPUTS = {"special_tokens_mask", "offset_mapping", "length", "overflow_to_sample_mapping", "word_ids", "idx", "id"}


def calibration_batches(
    source: Any,
    tokenizer: Any = None,
    num_sequences: int | None = 128,
    length: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    text_column: str = "text",
) -> list[Batch]:
    """Calibration data for the pruners, from text, a dataset, or batches.

    * Text (a string, strings, or rows with `text_column` and no `input_ids`): documents are tokenized, joined with the
      tokenizer's end-of-sequence token between them, and cut into windows of `length` tokens, so nothing is padded.
    * Rows, dicts of one sequence each (a tokenized `datasets` dataset, or any iterable): cut to `length` tokens and
      padded on the right to the longest of their batch, with an `attention_mask` that says so. Columns that are no
      sequences of numbers (strings, labels of whole sequences) are left out.
    * Batches, dicts of tensors with two dimensions or more: the first `num_sequences` sequences, otherwise unchanged.

    From a source that has a length sequences are drawn at random; a stream (a generator, an `IterableDataset`) is read
    from its start, no further than needed.

    Args:
        source: see above.
        tokenizer: of transformers; needed for text.
        num_sequences: how many sequences at most; None: all.
        length: tokens per sequence. Needed for text; None leaves rows as long as they are.
        batch_size: sequences per batch, of text and of rows.
        seed: of the draw.
        text_column: the column of a dataset that has the text.

    Returns:
        A list of dicts of tensors (sequences, tokens), on the CPU.

    Raises:
        ValueError: if the source is none of these, has nothing in it, or needs what was not given.

    Examples:
        >>> rows = [{"input_ids": [1, 2, 3], "text": "a b c"}, {"input_ids": [4, 5], "text": "d e"}]
        >>> batch = calibration_batches(iter(rows), batch_size=2)[0]
        >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
        ([[1, 2, 3], [4, 5, 0]], [[1, 1, 1], [1, 1, 0]])
    """
    for name, value in (("num_sequences", num_sequences), ("length", length), ("batch_size", batch_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"`{name}` is a positive integer, got {value!r}.")
    if isinstance(source, (Mapping, torch.Tensor)) or not isinstance(source, Iterable):
        raise ValueError(
            f"A source of calibration data is text, rows or batches, got one {type(source).__name__}; put it into a "
            "list, or take one split of a DatasetDict."
        )
    generator = torch.Generator().manual_seed(seed)
    items = _in_random_order([source] if isinstance(source, str) else source, generator)
    first = next(items, None)
    items = chain([] if first is None else [first], items)
    if first is None:
        raise ValueError("A source of calibration data has at least one text, row or batch, got an empty one.")
    if _is_text(first, text_column):
        documents = (_text_of(item, text_column) for item in items)
        rows = _windows(documents, tokenizer, num_sequences, length)
        if isinstance(source, str):  # windows from all over it
            rows = [rows[index] for index in torch.randperm(len(rows), generator=generator, device="cpu").tolist()]
        rows = rows[:num_sequences]
    elif not isinstance(first, Mapping):
        raise ValueError(f"A source of calibration data has strings or dicts in it, got {type(first).__name__}.")
    elif _is_batch(first):
        return _first_sequences(items, num_sequences)
    else:
        rows = [sequences_of(_one_sequence(row), length) for row in islice(items, num_sequences)]
        if not all(rows):
            raise ValueError(
                f"A row of calibration data has a sequence of numbers such as `input_ids`, got {list(first)}; "
                "tokenize it, or name the column of text in `text_column` and pass a tokenizer."
            )
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    return [collate(rows[start : start + batch_size], pad) for start in range(0, len(rows), batch_size)]


def _is_text(item: Any, text_column: str) -> bool:
    return isinstance(item, str) or (isinstance(item, Mapping) and "input_ids" not in item and text_column in item)


def _is_batch(item: Mapping[str, Any]) -> bool:
    """Whether a dict is a batch, and not a row: one of its tensors has a dimension for sequences."""
    tensors = {key: value for key, value in item.items() if isinstance(value, torch.Tensor)}
    return any(value.dim() >= _batch_dims(key, value) for key, value in tensors.items())


def _one_sequence(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Raises:
    ValueError: if a row has several sequences, as lists or numpy's arrays: what a tokenizer makes of several texts, or
        of one for numpy."""
    ids = row.get("input_ids")
    first = ids[0] if isinstance(ids, (list, tuple)) and ids else None
    if getattr(ids, "ndim", 1) > 1 or isinstance(first, (list, tuple)) or getattr(first, "ndim", 0):
        raise ValueError(
            f"A row of calibration data is one sequence, got a {type(ids).__name__} of sequences in `input_ids`; give "
            "one row for each, or a batch of tensors (`return_tensors='pt'` of the tokenizer, with padding)."
        )
    return row


def _in_random_order(source: Any, generator: torch.Generator) -> Iterator[Any]:
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        return iter(source)
    return (source[index] for index in torch.randperm(len(source), generator=generator, device="cpu").tolist())


def _text_of(item: Any, column: str) -> str:
    text = item.get(column) if isinstance(item, Mapping) else item
    if not isinstance(text, str):
        row = f", column {column!r} of the row {reprlib.repr(item)}" if isinstance(item, Mapping) else ""
        raise ValueError(
            f"Calibration text is strings, got {reprlib.repr(text)}{row}; leave out what is none, or name another "
            "column in `text_column`."
        )
    return text


def _windows(
    documents: Iterator[str], tokenizer: Any, number: int | None, length: int | None
) -> list[dict[str, torch.Tensor]]:
    if tokenizer is None or length is None:
        missing = "tokenizer" if tokenizer is None else "length"
        raise ValueError(
            f"Calibration data from text takes a tokenizer and a length, got none for `{missing}`; pass "
            "`calibration_batches(text, tokenizer, length=512)`."
        )
    ids: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in documents:
        # verbose: it would warn of a document longer than the model's window, which is cut into windows here
        ids += (end if ids else []) + tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if number is not None and len(ids) >= number * length:
            break
    windows = torch.tensor(ids, dtype=torch.int64, device="cpu")[: len(ids) // length * length].view(-1, length)
    if not len(windows):
        raise ValueError(
            f"Calibration text has at least one window of length={length} tokens, got {len(ids)} tokens; give more "
            "text, or a smaller `length`."
        )
    return [{"input_ids": window} for window in windows]


def _batch_dims(key: str, value: torch.Tensor) -> int:
    """Dimensions of an input that has one for the sequences of a batch: images, other floats, waves, ids and masks."""
    if key == "pixel_values":
        return 4
    return 3 if value.is_floating_point() and key != "input_values" else 2


def _first_sequences(batches: Iterator[Mapping[str, Any]], number: int | None) -> list[Batch]:
    taken: list[Batch] = []
    left = number
    for batch in batches:
        tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
        count = sequences_in(tensors)
        taken.append(tensors if left is None or left >= count else _cut(tensors, left))
        left = None if left is None else left - count
        if left is not None and left <= 0:
            break
    return taken


def _cut(batch: Batch, number: int) -> Batch:
    """The first sequences of a batch, with what is there once for all of them.

    Raises:
        ValueError: if there is no telling what of a tensor is theirs, such as the patches of all images of a batch."""
    count = sequences_in(batch)
    for key, value in batch.items():
        if value.dim() and len(value) not in (1, count):
            raise ValueError(
                f"A batch is cut along the first dimension of its tensors, one entry for each sequence, got shape "
                f"{tuple(value.shape)} for `{key}` in a batch of {count} sequences, of which {number} are wanted; "
                "give batches of one sequence each, or a `num_sequences` that takes whole ones (None: all)."
            )
    return {key: value[:number] if value.dim() else value for key, value in batch.items()}


def main_input(batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The tokens of a batch, or else its first tensor that is no single number; None if there is no such."""
    return next((t for t in (batch.get("input_ids"), *batch.values()) if t is not None and t.dim()), None)


def sequences_in(batch: Mapping[str, torch.Tensor]) -> int:
    """How many sequences a batch has; it may have single numbers beside them, such as CLIP's `return_loss`."""
    tokens = main_input(batch)
    return 0 if tokens is None else len(tokens)


def sequences_of(row: Mapping[str, Any], length: int | None = None) -> dict[str, torch.Tensor]:
    """The columns of a row that hold sequences of numbers, as tensors without a batch dimension."""
    found = {}
    for key, value in row.items():
        if key in NOT_INPUTS or isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__len__"):
            continue
        try:
            tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(value, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            continue  # lists of strings, or of lists of unequal length
        if tensor.dim():
            found[key] = tensor
    tokens = len(found["input_ids"]) if "input_ids" in found else None
    return {key: tensor[:length] if _is_of_tokens(key, tensor, tokens) else tensor for key, tensor in found.items()}


def _is_of_tokens(key: str, column: torch.Tensor, tokens: int | None) -> bool:
    """Whether a column has an entry for each token: as many as `input_ids`, where there are some (LayoutLM's boxes,
    but not the labels of a whole text); a decoder's tokens are counted by themselves."""
    of_decoder = key.startswith("decoder_") or (key == "labels" and not column.is_floating_point())
    return column.dim() == 1 if tokens is None or of_decoder else len(column) == tokens


def collate(rows: list[dict[str, torch.Tensor]], pad_token_id: int) -> Batch:
    """A batch of rows, padded on the right to the longest, with an `attention_mask` that says so.

    Raises:
        ValueError: if the rows have other columns than the first one, or differ in more than their length."""
    batch: Batch = {}
    for row in rows:
        if row.keys() != rows[0].keys():
            raise ValueError(
                f"Rows of calibration data have the same columns, got {list(rows[0])} and {list(row)}; leave out the "
                "columns that only some of them have."
            )
    for key in rows[0]:
        values = [row[key] for row in rows]
        if len({value.shape for value in values}) == 1:
            batch[key] = torch.stack(values)
            continue
        _check_widths(key, values)
        padding = -100 if key == "labels" else 0
        if key.endswith("input_ids"):
            padding = pad_token_id
        batch[key] = pad_sequence(values, batch_first=True, padding_value=padding)
        mask = _mask_of(key, rows[0])
        if mask is not None and mask not in rows[0]:
            ones = [torch.ones(len(value), dtype=torch.int64, device=value.device) for value in values]
            batch[mask] = pad_sequence(ones, batch_first=True)
    return batch


def _mask_of(key: str, row: Mapping[str, torch.Tensor]) -> str | None:
    """What the mask of a column is called, if it has one; beside a text that of a sound is the model's own matter."""
    if key in _SOUNDS and "input_ids" not in row:
        return "attention_mask"
    return key.replace("input_ids", "attention_mask") if key.endswith("input_ids") else None


def _check_widths(key: str, values: list[torch.Tensor]) -> None:
    """Raises:
    ValueError: if columns differ in more than their length."""
    other = next((value.shape for value in values if value.shape[1:] != values[0].shape[1:]), None)
    if other is not None:
        raise ValueError(
            f"Rows of a batch are padded along their first dimension, got the shapes {tuple(values[0].shape)} and "
            f"{tuple(other)} for `{key}`; take `batch_size=1`, or make them alike with the model's processor."
        )
