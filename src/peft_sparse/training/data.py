"""A recipe's rows as the examples that a Trainer takes: tokenised lazily, so that a stream stays one.

Classification is here (one text or a pair, and a label), language models in texts.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from peft_sparse.pruning import load_rows
from peft_sparse.training.parts import DataPart, ModelPart
from peft_sparse.training.texts import Row, batches, completions, fields, pair, separator, text_of, windows

Encode = Callable[[Iterable[Row]], Iterator[Row | None]]  # None: a row of which nothing would be learned


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
    label2id: Mapping[str, int] | None = None,
) -> Examples:
    """Read, tokenise and check the rows of a recipe.

    Args:
        data, model: of a checked recipe.
        tokenizer: of transformers; gets a padding token if it has none.
        seed: of the order of a stream.
        train: False: only the validation part.
        label2id: of the model, for labels that are text, where `data.labels` does not list them.

    Raises:
        ValueError: if rows or columns are missing, a label is none, or nothing is left.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    encode = _encoder(data, model, tokenizer, label2id or {})
    training = _split(data, data.train_split, data.train_examples, encode, seed, data.streaming) if train else None
    validation = None
    if data.validation_split is not None:
        validation = _split(data, data.validation_split, data.validation_examples, encode, None, False)
    if model.task == "sequence_classification":
        collator: Any = DataCollatorWithPadding(tokenizer)
    else:
        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    return Examples(training, validation, collator)


def read_split(data: DataPart, split: str, streaming: bool = False) -> Any:
    """The rows of one split, untouched."""
    return load_rows(data.path, split, name=data.name, files=data.files, streaming=streaming, **data.options)


def _split(
    data: DataPart,
    split: str,
    limit: int | None,
    encode: Encode,
    seed: int | None,
    streaming: bool,
) -> Any:
    import datasets

    rows = read_split(data, split, streaming)
    first = next(iter(rows), None)
    if first is None:
        raise ValueError(f"Data has at least one row, got none in split {split!r} of {data.path!r}.")
    _check_columns(data, first, split)
    examples, left_out = _read(rows, 1 if streaming else limit, encode)
    if not examples:
        raise ValueError(
            f"Data has at least one example of at most data.max_length={data.max_length} tokens, got "
            f"{'a stream' if streaming else f'{len(rows):,} rows'} without one in split {split!r}; windows of text "
            "are whole, so give more text or a smaller length."
        )
    if not streaming:
        if left_out:
            warnings.warn(
                f"{left_out:,} rows of split {split!r} are left out: their prompts alone take data.max_length="
                f"{data.max_length} tokens, so that no completion would be learned; a larger one keeps them.",
                stacklevel=2,
            )
        return datasets.Dataset.from_list(examples)
    if seed is not None:
        rows = rows.shuffle(seed=seed, buffer_size=data.shuffle_buffer)
    return datasets.IterableDataset.from_generator(
        _generate, gen_kwargs={"rows": rows, "limit": limit, "encode": encode}
    )


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


def _generate(rows: Iterable[Row], limit: int | None, encode: Encode) -> Iterator[Row]:
    return islice((example for example in encode(rows) if example is not None), limit)


def _columns(data: DataPart) -> list[str]:
    if data.template == "alpaca":
        return ["instruction", "output"]
    templates = [data.prompt, data.completion]
    found = [field for template in templates if template is not None for field in fields(template)]
    texts = [data.text] if isinstance(data.text, str) else data.text or []
    return [*texts, *([data.label] if data.label else []), *found]


def _check_columns(data: DataPart, row: Row, split: str) -> None:
    missing = [column for column in _columns(data) if column not in row]
    if missing:
        raise ValueError(
            f"`data` names columns of its rows, got {missing[0]!r}, and split {split!r} has {', '.join(sorted(row))}."
        )


def _encoder(data: DataPart, model: ModelPart, tokenizer: Any, label2id: Mapping[str, int]) -> Encode:
    if model.task == "sequence_classification":
        label = partial(_label, data=data, num_labels=model.num_labels, label2id=label2id)
        return partial(_classification, data=data, label=label, tokenizer=tokenizer)
    if data.text is not None:
        return partial(windows, data=data, tokenizer=tokenizer)
    return partial(completions, data=data, tokenizer=tokenizer)


def _classification(
    rows: Iterable[Row], data: DataPart, label: Callable[[Row], int | float], tokenizer: Any
) -> Iterator[Row]:
    columns = [data.text] if isinstance(data.text, str) else data.text or []
    for batch in batches(rows):
        texts = [[text_of(row, column) for row in batch] for column in columns]
        encoded = tokenizer(*texts, truncation=True, max_length=data.max_length)
        for index, row in enumerate(batch):
            example = {key: values[index] for key, values in encoded.items()}
            if not example["input_ids"]:
                raise ValueError(
                    f"A text has at least one token, got {[row[column] for column in columns]} without one in the row "
                    f"{row}; leave out such rows."
                )
            yield example | {"labels": label(row)}


def _label(row: Row, data: DataPart, num_labels: int | None, label2id: Mapping[str, int]) -> int | float:
    assert data.label is not None
    value = row[data.label]
    if data.labels is not None:
        if value not in data.labels:
            raise ValueError(f"`data.labels` lists the labels, got {value!r} in column {data.label!r} besides.")
        return data.labels.index(value)
    if isinstance(value, bool):
        value = int(value)
    if isinstance(value, str) and num_labels != 1:
        value = label2id.get(value, value)
    if not isinstance(value, (int, float)):
        names = f" or one of the model's names {', '.join(label2id)}" if label2id and num_labels != 1 else ""
        raise ValueError(
            f"A label is a number{names}, got {value!r} in column {data.label!r}; list the names in `data.labels`, in "
            "the order of their numbers."
        )
    if num_labels == 1:
        if not math.isfinite(value):
            raise ValueError(
                f"A number as the target is finite, got {value!r} in column {data.label!r}; leave out such rows."
            )
        return float(value)
    count = 2 if num_labels is None else num_labels
    if not float(value).is_integer() or not 0 <= value < count:
        raise ValueError(
            f"A label of {count} classes is from 0 to {count - 1}, got {value!r} in column {data.label!r}; set "
            "`model.num_labels`, 1 for a number as the target, or leave out rows without a label."
        )
    return int(value)


def token_stream(data: DataPart, split: str, tokenizer: Any) -> list[int]:
    """All tokens of a split's text in one row, for [`peft_sparse.perplexity`]."""
    between, ids = separator(data, tokenizer), []
    rows = iter(read_split(data, split))
    first = next(rows, None)
    if first is None:
        raise ValueError(f"Data has at least one row, got none in split {split!r} of {data.path!r}.")
    _check_columns(data, first, split)
    rows = chain([first], rows)
    for batch in batches(rows):
        for document in tokenizer(
            [text_of(r, str(data.text)) for r in batch], add_special_tokens=False, verbose=False
        )["input_ids"]:
            ids += document + between
    return ids


def calibration_texts(data: DataPart) -> Iterable[str]:
    """The texts of the training rows, for pruners; a single one as a string, which is drawn from all over."""
    rows = read_split(data, data.train_split, data.streaming)
    if data.text is None:
        texts = ("".join(pair(row, data)) for row in rows)
    else:
        columns = [data.text] if isinstance(data.text, str) else data.text
        texts = (" ".join(text_of(row, column) for column in columns) for row in rows)
    if data.streaming:
        return texts
    documents = list(texts)
    return documents[0] if len(documents) == 1 else documents
