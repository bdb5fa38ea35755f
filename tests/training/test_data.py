"""A recipe's rows as examples: what they hold, and what is refused before anything is written."""

import gzip
import json
import sys
import warnings
from itertools import islice
from pathlib import Path

import pytest

from peft_sparse.pruning import load_rows
from peft_sparse.training import finetune, plan_finetune
from peft_sparse.training.build import load_tokenizer
from peft_sparse.training.data import calibration_texts, make_examples, read_split, token_stream
from peft_sparse.training.parts import DataPart, ModelPart
from peft_sparse.training.texts import fields, pair

from models import save_with_tokenizer, tiny_bert, tiny_gpt2, tiny_llama
from recipes import classifier, language_model, write_rows

datasets = pytest.importorskip("datasets")
pytest.importorskip("evaluate")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"text": "txt", "label": "label"}, "got 'txt', and split 'train' has 'answer', 'label'"),
        ({"text": "score", "label": "label"}, "A column of text has strings, got 0.0"),
        ({"text": "text", "label": "name"}, "list the names in `data.labels`"),
        ({"text": "text", "label": "name", "labels": ["low", "mid"]}, "got 'high' in column 'name' besides"),
        ({"text": "text", "label": "score"}, "from 0 to 1, got 0.125"),
        ({"text": "text", "label": "label", "path": "nowhere.jsonl"}, "got 'nowhere.jsonl', which is none"),
        ({"text": "text", "label": "label", "validation_split": "test"}, "A file is one split"),
    ],
)
def test_data_that_does_not_fit_is_an_error_before_anything_is_written(tmp_path, sentences, data, message):
    with pytest.raises(ValueError, match=message):
        finetune(classifier(tmp_path, sentences, data=data))
    assert not (tmp_path / "run").exists()


def test_without_the_package_that_reads_rows_it_is_named(tmp_path, sentences, monkeypatch):
    asked = language_model(tmp_path, sentences, data={"text": "text"})
    monkeypatch.setitem(sys.modules, "datasets", None)
    for run in (plan_finetune, finetune):
        with pytest.raises(ImportError, match="read by the package `datasets`; `pip install datasets`"):
            run(asked)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("streaming", "got"), [(False, "40 rows"), (True, "a stream")])
def test_text_without_a_whole_window(tmp_path, sentences, streaming, got):
    with pytest.raises(ValueError, match=f"got {got} without one in split 'train'; windows of text are whole"):
        plan_finetune(
            language_model(tmp_path, sentences, data={"text": "text", "max_length": 4000, "streaming": streaming})
        )


def test_examples_beyond_the_positions_are_refused_before_pruning(tmp_path, sentences):
    data = {"text": "text", "max_length": 65}
    asked = language_model(tmp_path, sentences, base=tiny_gpt2(), data=data, prune={"method": "magnitude"})
    for run in (plan_finetune, finetune):
        with pytest.raises(ValueError, match=r"`data.max_length` is at most 64, .* got 65"):
            run(asked)
    assert not (tmp_path / "run").exists()


def test_windows_have_every_token_in_order(tmp_path, sentences):
    save_with_tokenizer(tiny_llama(), tmp_path / "llama")
    model = ModelPart(path=str(tmp_path / "llama"))
    tokenizer = load_tokenizer(model)
    rows = [json.loads(line)["text"] for line in Path(sentences).read_text().splitlines()]
    expected = [i for text in rows for i in [*tokenizer(text, add_special_tokens=False)["input_ids"], 2]]
    for streaming in (False, True):
        data = DataPart(path=sentences, text="text", max_length=7, streaming=streaming, shuffle_buffer=1)
        one_pass = islice(make_examples(data, model, tokenizer, seed=0).train, len(expected) // 7)
        found = [i for row in one_pass for i in row["input_ids"]]
        assert found == expected[: len(found)] and len(expected) - len(found) < 7


def test_only_the_completion_is_learned(tmp_path, sentences):
    model = ModelPart(path=save_with_tokenizer(tiny_llama(), tmp_path / "llama"))
    tokenizer = load_tokenizer(model)
    for learned in (False, True):
        data = DataPart(
            path=sentences, prompt="{question}", completion="{answer}", max_length=16, train_on_prompt=learned
        )
        row = make_examples(data, model, tokenizer, seed=0).train[0]
        assert row["labels"] == (row["input_ids"] if learned else [-100] * 3 + row["input_ids"][3:])
        assert len(row["input_ids"]) == 5 and row["input_ids"][-1] == tokenizer.eos_token_id


def test_templates_name_columns_as_they_are_called(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"My question": "w1 w2", "the-answer_1": "w3"}])
    data = DataPart(path=rows, prompt="ask: {My question} ", completion="{the-answer_1}")
    assert [pair(row, data) for row in read_split(data, "train")] == [("ask: w1 w2 ", "w3")]
    for template in ("{a.b}", "{a[0]}", '{"a": 1}', "{}"):
        with pytest.raises(ValueError, match="A template has names of columns in braces, got"):
            fields(template)


@pytest.mark.parametrize(
    ("data", "row", "message"),
    [
        ({"prompt": "{question}", "completion": "{answer}"}, {"question": "w1", "answer": None}, "None for 'answer'"),
        ({"template": "alpaca"}, {"instruction": None, "input": "w1", "output": "w2"}, "None for 'instruction'"),
        ({"template": "alpaca"}, {"instruction": "w1", "input": None, "output": None}, "None for 'output'"),
        (
            {"prompt": "{question}", "completion": "{answer}"},
            {"question": "w1", "answer": {"text": ["w2"]}},
            "got dict",
        ),
        (
            {"prompt": "{question}", "completion": "{answer}"},
            {"question": ["w1"], "answer": "w2"},
            "got list for 'que",
        ),
        ({"template": "alpaca"}, {"instruction": "w1", "input": ["w1"], "output": "w2"}, "got list for 'input'"),
    ],
)
def test_nothing_and_no_structure_is_learned_as_python_writes_it(tmp_path, data, row, message):
    whole = {key: value or "w3" for key, value in row.items()}
    rows = write_rows(tmp_path / "rows.jsonl", [whole, row])
    with pytest.raises(ValueError, match=message):
        plan_finetune(language_model(tmp_path, rows, data=data | {"max_length": 64}, prune=None))


def test_an_input_that_is_missing_is_none_in_alpacas_prompt(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"instruction": "w1", "input": None, "output": "w2"}])
    data = DataPart(path=str(tmp_path / "rows.jsonl"), template="alpaca", max_length=512)
    assert list(calibration_texts(data)) and "None" not in str(calibration_texts(data))


def test_prompts_that_all_fill_the_length(tmp_path, sentences):
    """More text would not help there, and a smaller length neither."""
    data = {"prompt": "{text}", "completion": "{answer}", "max_length": 4}
    with pytest.raises(
        ValueError, match=r"got 40 rows without one .* room for its completion, so take a larger length"
    ):
        plan_finetune(language_model(tmp_path, sentences, data=data, prune=None))


def test_prompts_that_fill_the_length_are_counted(tmp_path):
    rows = [{"question": " ".join(["w1"] * length), "answer": "w2"} for length in (3, 16, 20, 15)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    model = ModelPart(path=save_with_tokenizer(tiny_llama(), tmp_path / "llama"))
    columns = {"path": path, "prompt": "{question}", "completion": "{answer}"}
    for limit, left_out, found in ((None, 2, 2), (2, 2, 2), (1, 0, 1)):
        data = DataPart(**columns, max_length=16, train_examples=limit)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            examples = make_examples(data, model, load_tokenizer(model), seed=0)
        told = [str(one.message) for one in said if "are left out" in str(one.message)]
        assert len(examples.train) == found and [one[:9] for one in told] == (["2 rows of"] if left_out else [])
    with pytest.raises(ValueError, match="got 4 rows without one"):
        make_examples(DataPart(**columns, max_length=2), model, load_tokenizer(model), seed=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_text_is_named_by_its_row(tmp_path, streaming):
    """A tokenizer without special tokens makes nothing of it."""
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "", "label": 1, "id": "x5"}])
    data = {"text": "text", "label": "label", "streaming": streaming}
    with pytest.raises(ValueError, match=r"at least one token, got \[''\] without one in the row .*'id': 'x5'"):
        plan_finetune(classifier(tmp_path, path, data=data))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_target_that_is_no_finite_number(tmp_path, value):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "w1", "label": 0.5}, {"text": "w2", "label": value}])
    asked = classifier(tmp_path, path, model={"num_labels": 1, "new_head": True}, evaluation={"metrics": ["mse"]})
    with pytest.raises(ValueError, match=f"is finite, got {value!r} in column 'label'"):
        plan_finetune(asked)


def test_a_part_of_a_text_file_is_held_out_as_a_file(tmp_path):
    """One document is one row, which slices cannot divide."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("w1 w2 w3 w4\n" * 10)
    way_out = r"name the reader, `path: text`, with a file for each split, `files: \{train: \.\.\., validation"
    for splits in (
        {"validation_split": "validation"},
        {"train_split": "train[:50%]", "validation_split": "train[50%:]"},
    ):
        with pytest.raises(ValueError, match=way_out):
            language_model(tmp_path, tmp_path / "a.txt", data={"text": "text"} | splits)
    files = {"train": str(tmp_path / "a.txt"), "validation": str(tmp_path / "b.txt")}
    data = {"text": "text", "validation_split": "validation", "files": files}
    plan = plan_finetune(language_model(tmp_path, "text", data=data, prune=None))
    assert plan["training examples"] == plan["validation examples"] == 3


def test_semicolons_between_columns_are_named(tmp_path):
    (tmp_path / "rows.csv").write_text("text;label\nw1;0\n")
    with pytest.raises(
        ValueError, match=r"has 'text;label'; set `options: \{sep: \";\"\}` for a file with semicolons"
    ):
        plan_finetune(classifier(tmp_path, tmp_path / "rows.csv"))


def test_a_text_is_measured_as_it_is(tmp_path):
    """Without the mark that Windows puts before it, and without a separator behind the last document."""
    save_with_tokenizer(tiny_llama(), tmp_path / "llama")
    tokenizer = load_tokenizer(ModelPart(path=str(tmp_path / "llama")))
    expected = tokenizer("w1 w2 w3", add_special_tokens=False)["input_ids"]
    for name, encoding in (("plain.txt", "utf-8"), ("windows.txt", "utf-8-sig")):
        (tmp_path / name).write_text("w1 w2 w3", encoding=encoding)
        for data in (
            DataPart(path=str(tmp_path / name), text="text"),
            DataPart(path="text", files={"train": [str(tmp_path / name)]}, text="text"),
        ):
            assert token_stream(data, "train", tokenizer) == expected
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "w1"}, {"text": "w2 w3"}])
    assert token_stream(DataPart(path=rows, text="text"), "train", tokenizer) == [expected[0], 2, *expected[1:]]


CSV = """question,answer,label,other
w1,00730,001,1
w2,1.50,None,
w3,true,NA,3
w4,NA,001,4
"""


@pytest.mark.parametrize("way", ["csv", "tsv", "files", "tsv files", "folder", "files of a folder", "stream"])
def test_text_of_a_csv_file_is_taken_as_it_is_written(tmp_path, way):
    """pandas would make 730, 1.5, True and nothing of these answers."""
    (tmp_path / "rows").mkdir()
    file = tmp_path / "rows" / ("train.tsv" if way == "tsv" else "train.csv")
    file.write_text(CSV.replace(",", "\t") if way == "tsv" else CSV)
    source = {"path": str(tmp_path / "rows" if way == "folder" else file)}
    if way == "files":
        source = {"path": "csv", "files": {"train": str(file)}}
    if way == "tsv files":
        files = [tmp_path / "rows" / "a.tsv", tmp_path / "rows" / "b.TSV.gz"]
        rows = CSV.replace(",", "\t").splitlines(keepends=True)
        files[0].write_text("".join(rows[:3]))
        files[1].write_bytes(gzip.compress("".join([rows[0], *rows[3:]]).encode()))
        source = {"path": "csv", "files": {"train": [str(file) for file in files]}}
    if way == "files of a folder":
        source = {"path": str(tmp_path / "rows"), "files": {"train": "train.csv"}}
    data = DataPart(**source, prompt="{question}", completion="{answer}", streaming=way == "stream")
    rows = list(read_split(data, "train", data.streaming))
    answers = ["00730", "1.50", "true", "NA"]
    assert [pair(row, data)[1] for row in rows] == answers and rows[0]["other"] == 1
    assert [text[2:] for text in calibration_texts(data)] == answers
    data = DataPart(**source, text="answer", label="label", labels=["001", "None", "NA"], max_length=8)
    save_with_tokenizer(tiny_bert(), tmp_path / "bert")
    model = ModelPart(path=str(tmp_path / "bert"), task="sequence_classification")
    assert make_examples(data, model, load_tokenizer(model), seed=0).train["labels"] == [0, 1, 2, 0]


def test_gaps_in_a_csv_file_and_options_for_pandas(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\nw1,1\n-,\n,0\n")
    columns = {"path": str(tmp_path / "rows.csv"), "text": "text", "label": "label"}

    def texts(**options):
        return [row["text"] for row in read_split(DataPart(**columns, options=options), "train")]

    assert texts() == ["w1", "-", None] and texts(keep_default_na=False) == ["w1", "-", ""]
    assert texts(na_filter=False) == ["w1", "-", ""]
    assert texts(na_values="-") == texts(na_values=["-"]) == ["w1", None, None]
    (tmp_path / "quotes.tsv").write_text('text\tlabel\n"w1 w2\t1\nw3\t0\n"w4\t1\n')  # as docs/command-line.md says
    quotes = {"path": str(tmp_path / "quotes.tsv"), "text": "text", "label": "label"}
    assert len(read_split(DataPart(**quotes), "train")) == 1
    assert len(read_split(DataPart(**quotes, options={"quoting": 3}), "train")) == 3
    number = DataPart(**columns, labels=None)
    assert [row["label"] for row in read_split(number, "train")] == [1, None, 0]
    with pytest.raises(
        ValueError, match=r"got None in 'text' of the row {'text': None, 'label': '0'}; leave out such"
    ):
        plan_finetune(classifier(tmp_path, columns["path"], data={"text": "text", "label": "label"}))
    (tmp_path / "rows.csv").write_text("text,label\nw1,1\nw2,\n")
    with pytest.raises(
        ValueError, match=r"got None in column 'label' of the row {'text': 'w2', 'label': None}; leave"
    ):
        plan_finetune(classifier(tmp_path, columns["path"], data={"text": "text", "label": "label"}))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", "text,label\n"), ("a.csv", "\n"), ("a.json", "[]"), ("a.jsonl", "\n\n"), ("a.parquet", None)],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_without_rows(tmp_path, name, content, streaming):
    if streaming and content == "\n":
        return  # pandas' own words, when it is read: "No columns to parse from file"
    path = tmp_path / name
    if content is None:
        datasets.Dataset.from_dict({"text": [], "label": []}).to_parquet(path)
    else:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"Data has at least one row, got none in split 'train' of '.*a\."):
        plan_finetune(language_model(tmp_path, path, data={"text": "text", "streaming": streaming}))


def test_a_share_of_a_text_of_one_line(tmp_path):
    (tmp_path / "one.txt").write_text("w1 " * 1000)
    data = {
        "text": "text", "files": {"train": str(tmp_path / "one.txt")},
        "train_split": "train[:95%]", "validation_split": "train[95%:]",
    }  # fmt: skip
    with pytest.raises(
        ValueError, match=r"in split 'train\[\d*%?:\d*%?\]' of 'text'; a text file has a row for each line, so name"
    ):
        plan_finetune(language_model(tmp_path, "text", data=data))


def test_one_data_set_of_save_to_disk_is_a_split(tmp_path, sentences):
    rows = datasets.load_dataset("json", data_files=sentences, split="train")
    rows.save_to_disk(tmp_path / "saved", num_shards=3)
    data = {"text": "text", "label": "label"}
    asked = data | {"train_split": "train[:75%]", "validation_split": "train[75%:]"}
    plan = plan_finetune(classifier(tmp_path, tmp_path / "saved", data=asked))
    assert (plan["training examples"], plan["validation examples"]) == (30, 10)
    assert load_rows(tmp_path / "saved", "validation")[:] == rows[:]
    with pytest.raises(ValueError, match=r"A file is one split, got .*saved"):
        classifier(tmp_path, tmp_path / "saved", data=data | {"validation_split": "validation"})
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "splits")
    asked = data | {"validation_split": "validation"}
    assert plan_finetune(classifier(tmp_path, tmp_path / "splits", data=asked))["validation examples"] == 40
