"""A recipe's rows as the examples that a Trainer takes: tokenised lazily, so that a stream stays one.

Three kinds: classification (one text or a pair, and a label); text for a causal language model, joined and cut into
windows so that nothing is padded; prompt and completion, where by default only the completion is learned.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from peft_sparse.pruning import load_rows
from peft_sparse.training.parts import DataPart, ModelPart

Row = dict[str, Any]
BATCH = 256  # rows that are tokenised together

# Stanford Alpaca's two prompts (Taori et al., 2023), which SPP's authors train on: with and without an input.
_ALPACA = (
    "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


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
    encode: Callable[[Iterable[Row]], Iterator[Row]],
    seed: int | None,
    streaming: bool,
) -> Any:
    import datasets

    rows = read_split(data, split, streaming)
    first = next(iter(rows), None)
    if first is None:
        raise ValueError(f"Data has at least one row, got none in split {split!r} of {data.path!r}.")
    _check_columns(data, first, split)
    examples = list(_generate(rows, 1 if streaming else limit, encode))
    if not examples:
        raise ValueError(
            f"Data has at least one example of at most data.max_length={data.max_length} tokens, got "
            f"{'a stream' if streaming else f'{len(rows):,} rows'} without one in split {split!r}; windows of text "
            "are whole, so give more text or a smaller length."
        )
    if not streaming:
        return datasets.Dataset.from_list(examples)
    if seed is not None:
        rows = rows.shuffle(seed=seed, buffer_size=data.shuffle_buffer)
    return datasets.IterableDataset.from_generator(
        _generate, gen_kwargs={"rows": rows, "limit": limit, "encode": encode}
    )


def _generate(rows: Iterable[Row], limit: int | None, encode: Callable[[Iterable[Row]], Iterator[Row]]) -> Iterator:
    return islice(encode(rows), limit)


def _columns(data: DataPart) -> list[str]:
    if data.template == "alpaca":
        return ["instruction", "output"]
    templates = [data.prompt, data.completion]
    found = [field for template in templates if template is not None for field in _fields(template)]
    texts = [data.text] if isinstance(data.text, str) else data.text or []
    return [*texts, *([data.label] if data.label else []), *found]


def _fields(template: str) -> list[str]:
    """The columns that a template names.

    Raises:
        ValueError: for anything in braces that is no name of a column."""
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f"A template has columns in braces, got {template!r} ({error}).") from error
    odd = [field for field in fields if not field.replace("_", "a").isalnum()]
    if odd:
        raise ValueError(f"A template has names of columns in braces, got {odd[0]!r} in {template!r}.")
    return fields


def _check_columns(data: DataPart, row: Row, split: str) -> None:
    missing = [column for column in _columns(data) if column not in row]
    if missing:
        raise ValueError(
            f"`data` names columns of its rows, got {missing[0]!r}, and split {split!r} has {', '.join(sorted(row))}."
        )


def _encoder(
    data: DataPart, model: ModelPart, tokenizer: Any, label2id: Mapping[str, int]
) -> Callable[[Iterable[Row]], Iterator[Row]]:
    if model.task == "sequence_classification":
        label = partial(_label, data=data, num_labels=model.num_labels, label2id=label2id)
        return partial(_classification, data=data, label=label, tokenizer=tokenizer)
    if data.text is not None:
        return partial(_windows, data=data, tokenizer=tokenizer)
    return partial(_completions, data=data, tokenizer=tokenizer)


def _classification(
    rows: Iterable[Row], data: DataPart, label: Callable[[Row], int | float], tokenizer: Any
) -> Iterator[Row]:
    columns = [data.text] if isinstance(data.text, str) else data.text or []
    for batch in _batches(rows):
        texts = [[_text(row, column) for row in batch] for column in columns]
        encoded = tokenizer(*texts, truncation=True, max_length=data.max_length)
        for index, row in enumerate(batch):
            example = {key: values[index] for key, values in encoded.items()}
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
        return float(value)
    count = 2 if num_labels is None else num_labels
    if not float(value).is_integer() or not 0 <= value < count:
        raise ValueError(
            f"A label of {count} classes is from 0 to {count - 1}, got {value!r} in column {data.label!r}; set "
            "`model.num_labels`, 1 for a number as the target, or leave out rows without a label."
        )
    return int(value)


def _windows(rows: Iterable[Row], data: DataPart, tokenizer: Any) -> Iterator[Row]:
    """Documents joined and cut into windows of exactly `max_length` tokens; the rest at the end is left out."""
    between = _separator(data, tokenizer)
    ids: list[int] = []
    for batch in _batches(rows):
        texts = [_text(row, str(data.text)) for row in batch]
        for document in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            ids += document + between
        full = len(ids) // data.max_length * data.max_length
        for start in range(0, full, data.max_length):
            window = ids[start : start + data.max_length]
            yield {"input_ids": window, "attention_mask": [1] * len(window), "labels": window}
        ids = ids[full:]


def _separator(data: DataPart, tokenizer: Any) -> list[int]:
    if data.separator is not None:
        return (
            tokenizer(data.separator, add_special_tokens=False, verbose=False)["input_ids"] if data.separator else []
        )
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def token_stream(data: DataPart, split: str, tokenizer: Any) -> list[int]:
    """All tokens of a split's text in one row, for [`peft_sparse.perplexity`]."""
    between, ids = _separator(data, tokenizer), []
    rows = iter(read_split(data, split))
    first = next(rows, None)
    if first is None:
        raise ValueError(f"Data has at least one row, got none in split {split!r} of {data.path!r}.")
    _check_columns(data, first, split)
    rows = chain([first], rows)
    for batch in _batches(rows):
        for document in tokenizer([_text(r, str(data.text)) for r in batch], add_special_tokens=False, verbose=False)[
            "input_ids"
        ]:
            ids += document + between
    return ids


def calibration_texts(data: DataPart) -> Iterable[str]:
    """The texts of the training rows, for pruners; a single one as a string, which is drawn from all over."""
    rows = read_split(data, data.train_split, data.streaming)
    if data.text is None:
        texts = ("".join(_pair(row, data)) for row in rows)
    else:
        columns = [data.text] if isinstance(data.text, str) else data.text
        texts = (" ".join(_text(row, column) for column in columns) for row in rows)
    if data.streaming:
        return texts
    documents = list(texts)
    return documents[0] if len(documents) == 1 else documents


def _completions(rows: Iterable[Row], data: DataPart, tokenizer: Any) -> Iterator[Row]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for batch in _batches(rows):
        pairs = [_pair(row, data) for row in batch]
        prompts = tokenizer([prompt for prompt, _ in pairs], verbose=False)["input_ids"]
        answers = tokenizer([answer for _, answer in pairs], add_special_tokens=False, verbose=False)["input_ids"]
        for prompt, answer in zip(prompts, answers, strict=True):
            prompt = prompt[:-1] if end and prompt[-1:] == end else prompt
            ids = (prompt + answer + end)[: data.max_length]
            learned = 0 if data.train_on_prompt else min(len(prompt), len(ids))
            if learned < len(ids):  # else the prompt alone is too long
                yield {
                    "input_ids": ids,
                    "attention_mask": [1] * len(ids),
                    "labels": [-100] * learned + ids[learned:],
                }


def _pair(row: Row, data: DataPart) -> tuple[str, str]:
    if data.template == "alpaca":
        given = row.get("input")
        with_input = ", paired with an input that provides further context" if given else ""
        given = f"### Input:\n{given}\n\n" if given else ""
        return _ALPACA.format(with_input=with_input, instruction=row["instruction"], input=given), str(row["output"])
    return _filled(str(data.prompt), row), _filled(str(data.completion), row)


def _filled(template: str, row: Mapping[str, Any]) -> str:
    return template.format(**{field: row[field] for field in _fields(template)})


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"A column of text has strings, got {value!r} in {column!r}; choose another column.")
    return value


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, BATCH)):
        yield batch
