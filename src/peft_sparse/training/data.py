"""A recipe's rows as the examples that a Trainer takes: tokenised lazily, so that a stream stays one.

Classification is here (one text or a pair, and a label), language models in texts.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from peft_sparse.pruning import load_rows
from peft_sparse.pruning.sources import no_row
from peft_sparse.training.labels import Labels
from peft_sparse.training.parts import DataPart, ModelPart
from peft_sparse.training.streams import Encode, endless
from peft_sparse.training.texts import Row, batches, completions, fields, pair, separator, shown, text_of, windows


@dataclass
class Examples:
    """Attributes:
    train, validation: what a Trainer takes, None for no validation. A stream has no length.
    collator: for both.
    """

    train: Any
    validation: Any
    collator: Any


def make_examples(
    data: DataPart,
    model: ModelPart,
    tokenizer: Any,
    seed: int,
    train: bool = True,
    own_labels: Mapping[str, int] | None = None,
) -> Examples:
    """Read, tokenise and check the rows of a recipe.

    Args:
        data, model: of a checked recipe.
        tokenizer: of transformers; gets a padding token if it has none.
        seed: of the order of a stream.
        train: False: only the validation part.
        own_labels: of the model, see `Labels.of`.

    Raises:
        ValueError: if rows or columns are missing, a label is none, or nothing is left.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    labels = Labels.of(data, model, own_labels or {}) if model.task == "sequence_classification" else None
    training = validation = None
    if train:
        order = seed if data.streaming else None
        training = _split(data, data.train_split, data.train_examples, tokenizer, labels, order)
    if data.validation_split is not None:
        validation = _split(data, data.validation_split, data.validation_examples, tokenizer, labels, None)
    if labels is not None:
        collator: Any = DataCollatorWithPadding(tokenizer)
    else:
        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    return Examples(training, validation, collator)


def read_split(data: DataPart, split: str, streaming: bool = False, labels: Labels | None = None) -> Any:
    """The rows of one split, untouched. Labels that are classes are looked up by their names, as they are written."""
    texts = _text_columns(data) if labels is None or labels.count == 1 else [*_text_columns(data), labels.column]
    return load_rows(
        data.path, split, name=data.name, files=data.files, streaming=streaming, texts=texts, **data.options
    )


def _split(
    data: DataPart, split: str, limit: int | None, tokenizer: Any, labels: Labels | None, order: int | None
) -> Any:
    """The examples of one split; `order` is the seed of a stream's, None where it is no stream."""
    streaming = order is not None
    rows = read_split(data, split, streaming, labels)
    first = next(iter(rows), None)
    if first is None:
        raise no_row(data.path, split)
    _check_columns(data, first, split)
    if labels is not None and rows.features is not None:  # a stream may not know its columns
        labels = labels.of_column(rows.features.get(labels.column))
    encode = _encoder(data, labels, tokenizer)
    examples, left_out = _read(rows, 1 if streaming else limit, encode)
    if not examples:
        way_out = "windows of text are whole, so give more text or a smaller"
        if data.text is None:
            way_out = "a prompt leaves room for its completion, so take a larger"
        raise ValueError(
            f"Data has at least one example of at most data.max_length={data.max_length} tokens, got "
            f"{'a stream' if streaming else f'{len(rows):,} rows'} without one in split {split!r}; {way_out} length."
        )
    if order is not None:
        return endless(rows, limit, encode, order, data.shuffle_buffer)
    if left_out:
        warnings.warn(
            f"{left_out:,} rows of split {split!r} are left out: their prompts alone take data.max_length="
            f"{data.max_length} tokens, so that no completion would be learned; a larger one keeps them.",
            stacklevel=2,
        )
    import datasets  # not before `read_split`, which tells who has none how to get it

    return datasets.Dataset.from_list(examples)


def _read(rows: Iterable[Row], limit: int | None, encode: Encode) -> tuple[list[Row], int]:
    """Examples, and how many rows before the last of them gave none."""
    examples: list[Row] = []
    left_out = 0
    for example in encode(rows):
        if example is None:
            left_out += 1
        else:
            examples.append(example)
        if len(examples) == limit:
            break
    return examples, left_out


def _text_columns(data: DataPart) -> list[str]:
    """The columns whose values are taken as they are written."""
    if data.template == "alpaca":
        return ["instruction", "input", "output"]
    if data.text is not None:
        return [data.text] if isinstance(data.text, str) else data.text
    templates = [data.prompt, data.completion]
    return [field for template in templates if template is not None for field in fields(template)]


def _check_columns(data: DataPart, row: Row, split: str) -> None:
    optional = "input" if data.template == "alpaca" else None
    needed = [*_text_columns(data), *([data.label] if data.label else [])]
    missing = [column for column in needed if column not in row and column != optional]
    if missing:
        names = ", ".join(map(repr, sorted(row)))
        semicolons = len(row) == 1 and ";" in names
        way_out = '; set `options: {sep: ";"}` for a file with semicolons between its columns' if semicolons else ""
        raise ValueError(
            f"`data` names columns of its rows, got {missing[0]!r}, and split {split!r} has {names}{way_out}."
        )


def _encoder(data: DataPart, labels: Labels | None, tokenizer: Any) -> Encode:
    if labels is not None:
        return partial(_classification, data=data, labels=labels, tokenizer=tokenizer)
    return partial(completions if data.text is None else windows, data=data, tokenizer=tokenizer)


def _classification(rows: Iterable[Row], data: DataPart, labels: Labels, tokenizer: Any) -> Iterator[Row]:
    columns = _text_columns(data)
    for batch in batches(rows):
        texts = [[text_of(row, column) for row in batch] for column in columns]
        encoded = tokenizer(*texts, truncation=True, max_length=data.max_length)
        for index, row in enumerate(batch):
            example = {key: values[index] for key, values in encoded.items()}
            if not example["input_ids"]:
                raise ValueError(
                    f"A text has at least one token, got {[row[column] for column in columns]} without one in the row "
                    f"{shown(row)}; leave out such rows."
                )
            yield example | {"labels": labels.number(row)}


def token_stream(data: DataPart, split: str, tokenizer: Any) -> list[int]:
    """All tokens of a split's text in one row, for [`peft_sparse.perplexity`]."""
    between, ids = separator(data, tokenizer), list[int]()
    rows = iter(read_split(data, split))
    first = next(rows, None)
    if first is None:
        raise no_row(data.path, split)
    _check_columns(data, first, split)
    rows = chain([first], rows)
    for batch in batches(rows):
        for document in tokenizer(
            [text_of(r, str(data.text)) for r in batch], add_special_tokens=False, verbose=False
        )["input_ids"]:
            ids += between + document if ids else document
    return ids


def calibration_texts(data: DataPart) -> Iterable[str]:
    """The texts of the training rows, for pruners; a single one as a string, which is drawn from all over."""
    rows = read_split(data, data.train_split, data.streaming)
    if data.text is None:
        texts = ("".join(pair(row, data)) for row in rows)
    else:
        columns = _text_columns(data)
        texts = (" ".join(text_of(row, column) for column in columns) for row in rows)
    if data.streaming:
        return texts
    documents = list(texts)
    return documents[0] if len(documents) == 1 else documents
