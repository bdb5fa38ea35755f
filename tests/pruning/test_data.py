"""Calibration data from text, datasets and batches."""

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from peft_sparse import calibration_batches, prune_wanda

import models


class WordTokenizer:
    """As much of a tokenizer as is needed: a number for every word."""

    eos_token_id = 2
    pad_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens and not verbose
        return {"input_ids": [int(word) for word in text.split()]}


def documents(count: int, words: int = 10) -> list[str]:
    return [" ".join(str(3 + (i * words + j) % 90) for j in range(words)) for i in range(count)]


def flat(batches: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    return [row for batch in batches for row in batch["input_ids"].tolist()]


# Text


def test_one_long_text_gives_windows_from_all_over_it():
    text = " ".join(str(number) for number in range(1000))
    batches = calibration_batches(text, WordTokenizer(), num_sequences=20, length=10, batch_size=8)
    assert [batch["input_ids"].shape for batch in batches] == [(8, 10), (8, 10), (4, 10)]
    rows = flat(batches)
    assert all(row == list(range(row[0], row[0] + 10)) and row[0] % 10 == 0 for row in rows)
    assert len({row[0] for row in rows}) == 20 and max(row[0] for row in rows) > 500
    assert all(batch.keys() == {"input_ids"} for batch in batches)  # nothing is padded
    assert flat(calibration_batches(text, WordTokenizer(), 20, 10, 8)) == rows
    assert flat(calibration_batches(text, WordTokenizer(), 20, 10, 8, seed=1)) != rows


@pytest.mark.parametrize("kind", ["strings", "rows", "dataset", "generator", "stream"])
def test_documents_are_joined_with_the_end_token(kind):
    texts = documents(30)
    rows = [{"text": text, "url": "x"} for text in texts]
    source = {
        "strings": texts,
        "rows": rows,
        "dataset": datasets.Dataset.from_list(rows),
        "generator": iter(texts),
        "stream": datasets.Dataset.from_list(rows).to_iterable_dataset(),
    }[kind]
    batches = calibration_batches(source, WordTokenizer(), num_sequences=6, length=22, batch_size=4)
    assert [batch["input_ids"].shape for batch in batches] == [(4, 22), (2, 22)]
    for row in flat(batches):
        assert row.count(2) == 2  # ten words and an end, twice
    if kind in ("generator", "stream"):  # from the start
        assert flat(batches)[0][:10] == [int(word) for word in texts[0].split()]


def test_a_stream_is_read_no_further_than_needed():
    read = []

    def stream():
        for text in documents(1000):
            read.append(text)
            yield text

    calibration_batches(stream(), WordTokenizer(), num_sequences=2, length=20)
    assert len(read) < 8


def test_as_many_as_there_are():
    assert len(flat(calibration_batches(documents(5), WordTokenizer(), length=8))) == 6  # 54 tokens
    assert len(flat(calibration_batches(documents(5), WordTokenizer(), num_sequences=None, length=8))) == 6


def test_a_real_tokenizer(llama_dir, shared):
    text = (shared / "data/tinystories/sample_a.txt").read_text()
    batches = calibration_batches(text, AutoTokenizer.from_pretrained(llama_dir), 4, length=64, batch_size=2)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 64), (2, 64)]


# Rows


def rows() -> list[dict]:
    return [
        {
            "input_ids": list(range(3, 3 + n)),
            "text": "x" * n,
            "label": 1,
            "labels": list(range(3, 3 + n)),
            "none": None,
        }
        for n in (4, 7, 5, 6)
    ]


@pytest.mark.parametrize("kind", ["list", "dataset", "tensors", "stream"])
def test_rows_of_unequal_length(kind):
    source = rows() if kind == "list" else datasets.Dataset.from_list(rows())
    if kind == "tensors":
        source = source.with_format("torch")
    if kind == "stream":
        source = source.to_iterable_dataset()
    batches = calibration_batches(source, WordTokenizer(), batch_size=2)
    assert len(batches) == 2
    for batch in batches:
        assert batch.keys() == {"input_ids", "attention_mask", "labels"}
        assert batch["attention_mask"].sum() in (9, 10, 11, 12, 13)
        padded = batch["attention_mask"] == 0
        assert padded.any() and (batch["input_ids"][padded] == 1).all() and (batch["labels"][padded] == -100).all()
        assert (batch["input_ids"][~padded] >= 3).all()
    assert sorted(len([i for i in row if i != 1]) for row in flat(batches)) == [4, 5, 6, 7]


def test_rows_are_cut_and_counted():
    batches = calibration_batches(rows(), num_sequences=3, length=4, batch_size=3)
    assert [batch["input_ids"].shape for batch in batches] == [(3, 4)]
    assert "attention_mask" not in batches[0]


def test_only_what_has_an_entry_for_each_token_is_cut():
    row = {"input_ids": list(range(3, 23)), "bbox": [[0, 0, 1, 1]] * 20, "token_type_ids": [0] * 20}
    (batch,) = calibration_batches([row | {"labels": [0.0, 1.0] * 5}], length=6)
    assert {key: tuple(value.shape[1:]) for key, value in batch.items()} == {
        "input_ids": (6,), "bbox": (6, 4), "token_type_ids": (6,), "labels": (10,),
    }  # fmt: skip
    (batch,) = calibration_batches([row | {"labels": list(range(9)), "decoder_input_ids": list(range(9))}], length=6)
    assert batch["labels"].shape == batch["decoder_input_ids"].shape == (1, 6)  # a target of another length
    (batch,) = calibration_batches([{"input_values": [0.5] * 20}], length=6)
    assert batch["input_values"].shape == (1, 6)


def test_images():
    images = [{"pixel_values": torch.randn(3, 4, 4), "label": 2} for _ in range(3)]
    assert [b["pixel_values"].shape for b in calibration_batches(images, batch_size=2)] == [(2, 3, 4, 4), (1, 3, 4, 4)]


def test_sounds():
    """Of unequal length, as one-dimensional waves or as features of each moment."""
    for key, shapes in (("input_values", [(400,), (300,)]), ("input_features", [(40, 8), (30, 8)])):
        (batch,) = calibration_batches(iter([{key: torch.randn(shape)} for shape in shapes]), batch_size=2)
        assert batch[key].shape == (2, *shapes[0]) and not batch[key][1, shapes[1][0] :].any()
        assert batch["attention_mask"].sum(1).tolist() == [shapes[0][0], shapes[1][0]]
    rows = [{"input_ids": [3] * n, "input_features": torch.randn(n + 1, 8)} for n in (5, 3)]
    (batch,) = calibration_batches(iter(rows), batch_size=2)
    assert batch["attention_mask"].shape == (2, 5)
    waves = {"input_values": torch.randn(4, 400)}
    assert torch.equal(calibration_batches([waves])[0]["input_values"], waves["input_values"])


# Batches


def test_batches_are_handed_on():
    given = [{"input_ids": torch.arange(12).view(3, 4), "attention_mask": torch.ones(3, 4)} for _ in range(4)]
    taken = calibration_batches(iter(given), num_sequences=7)
    assert [len(batch["input_ids"]) for batch in taken] == [3, 3, 1]
    assert torch.equal(taken[2]["input_ids"], given[2]["input_ids"][:1])
    loader = torch.utils.data.DataLoader([{"input_ids": torch.arange(4)} for _ in range(6)], batch_size=2)
    assert [b["input_ids"].shape for b in calibration_batches(loader, num_sequences=4)] == [(2, 4), (2, 4)]
    images = [{"pixel_values": torch.randn(2, 3, 4, 4)}]
    assert torch.equal(calibration_batches(images)[0]["pixel_values"], images[0]["pixel_values"])


def test_tensors_without_a_dimension_for_sequences_stay_whole():
    """As Qwen-VL has them: the patches of all images, and three positions for each token."""
    batch = {"input_ids": torch.ones(2, 10, dtype=torch.int64), "pixel_values": torch.randn(512, 24)}
    batch |= {"image_grid_thw": torch.tensor([[1, 16, 16]] * 2), "position_ids": torch.zeros(3, 2, 10)}
    for number in (128, 4, None):
        taken = calibration_batches([batch, batch], num_sequences=number)
        assert [one.keys() for one in taken] == [batch.keys()] * 2
        assert all(torch.equal(one[key], batch[key]) for one in taken for key in batch)
    with pytest.raises(ValueError, match=r"\(512, 24\) for `pixel_values` in a batch of 2 sequences, of which 1 are"):
        calibration_batches([batch, batch], num_sequences=3)


def test_what_is_there_once_for_all_sequences_stays():
    batch = {"input_ids": torch.ones(3, 4, dtype=torch.int64), "position_ids": torch.arange(4)[None]}
    (taken,) = calibration_batches([batch], num_sequences=2)
    assert {key: value.shape for key, value in taken.items()} == {"input_ids": (2, 4), "position_ids": (1, 4)}


TEXT = {"tokenizer": WordTokenizer(), "length": 8}


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("some text", {}, "takes a tokenizer and a length, got none for `tokenizer`"),
        ("some text", {"tokenizer": WordTokenizer()}, "got none for `length`"),
        ("1 2 3", {"tokenizer": WordTokenizer(), "length": 8}, "one window of length=8 tokens, got 3 tokens"),
        ([], {}, "at least one text, row or batch, got an empty one"),
        (iter(()), {}, "got an empty one"),
        (7, {}, "text, rows or batches, got one int"),
        ({"input_ids": [1]}, {}, "got one dict"),
        ([7], {}, "strings or dicts in it, got int"),
        ([{"sentence": "a"}], {}, r"a sequence of numbers such as `input_ids`, got \['sentence'\]; .* `text_column`"),
        ([{"text": "1"}, {"text": None}], TEXT, "got None, column 'text' of the r"),
        ([{"text": 0.5}], TEXT, "strings, got 0.5, .*another column in `text_c"),
        (["1", None], TEXT, "Calibration text is strings, got None; leave out"),
        ([{"input_ids": [1, 2]}, {"input_ids": [1], "labels": [1]}], {"batch_size": 2}, "have the same columns"),
        (
            [{"input_ids": [[1, 2], [3, 4]]}],
            {},
            "is one sequence, got a list of sequences in `input_ids`; give one row",
        ),
        ([{"input_ids": np.array([[1, 2]])}], {}, "got a ndarray of sequences"),
        (
            [{"input_features": torch.ones(8, n)} for n in (40, 30)],
            {"batch_size": 2},
            r"first dimension, got the shapes \(8, [34]0\) and \(8, [34]0\) for `input_features`; take `batch_size=1`",
        ),
        (rows(), {"num_sequences": 0}, "`num_sequences` is a positive integer, got 0"),
        (rows(), {"batch_size": True}, "`batch_size` is a positive integer, got True"),
        (rows(), {"length": 1.5}, "`length` is a positive integer, got 1.5"),
    ],
)
def test_sources_that_are_refused(source, arguments, message):
    with pytest.raises(ValueError, match=message):
        calibration_batches(source, **arguments)


# Pruners


def test_a_pruner_takes_a_tokenized_dataset(tiny_llama):
    """Rows of unequal length, with columns that are no inputs."""
    data = datasets.Dataset.from_list([{**row, "idx": 3} for row in rows()])
    assert prune_wanda(tiny_llama, data, progress=False) is tiny_llama
    expected = prune_wanda(
        models.tiny_llama(), [{"input_ids": torch.tensor([row["input_ids"]])} for row in rows()], progress=False
    )
    for tensor, other in zip(tiny_llama.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(tensor, other)


def test_single_numbers_beside_the_sequences(tiny_llama):
    ids = torch.randint(3, models.VOCAB_SIZE, (3, 8))
    batch = {"logits_to_keep": torch.tensor(1), "input_ids": ids}
    taken = calibration_batches([batch, batch], num_sequences=4)
    assert [(len(one["input_ids"]), int(one["logits_to_keep"])) for one in taken] == [(3, 1), (1, 1)]
    facts = prune_wanda(tiny_llama, [batch], progress=False).config.peft_sparse["pruning"]["calibration"]
    assert (facts["sequences"], facts["tokens"]) == (3, 24)


def test_a_pruner_takes_a_stream(tiny_bert):
    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows()]).to_iterable_dataset()
    assert prune_wanda(tiny_bert, data, progress=False).config.peft_sparse["pruning"]["calibration"]["tokens"] == 22


def test_a_dataset_that_is_not_tokenized(tiny_llama):
    data = datasets.Dataset.from_list([{"text": "a b", "label": 1}])
    with pytest.raises(ValueError, match=r"such as `input_ids`, got \['text', 'label'\]; .*calibration_batches"):
        prune_wanda(tiny_llama, data, progress=False)
    with pytest.raises(ValueError, match="at least one batch, got none"):
        prune_wanda(tiny_llama, datasets.Dataset.from_dict({"input_ids": []}), progress=False)
