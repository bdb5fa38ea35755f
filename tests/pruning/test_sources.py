"""Rows from files: by their names, whatever signs are in them."""

import json

import pytest

from peft_sparse.pruning import load_rows

datasets = pytest.importorskip("datasets")


@pytest.mark.parametrize("name", ["rows[1].jsonl", "a b*c/rows.jsonl", "rows?.jsonl", "[x]/rows.jsonl"])
def test_a_name_with_the_signs_of_a_pattern_is_that_file(name, tmp_path, monkeypatch):
    for place, text in ((name, "meant"), ("rows1.jsonl", "another"), ("x/rows.jsonl", "another")):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(json.dumps({"text": text}) + "\n")
    for path, files in ((name, None), ("json", {"train": name}), ("json", {"train": [name, name]})):
        monkeypatch.chdir(tmp_path)
        assert set(load_rows(path, files=files)["text"]) == {"meant"}
        monkeypatch.chdir((tmp_path / name).parent)  # relative to a folder with such a name
        own = None if files is None else {"train": (tmp_path / name).name}
        assert set(load_rows(path if files else (tmp_path / name).name, files=own)["text"]) == {"meant"}


def test_patterns_are_patterns_still(tmp_path):
    for number in range(3):
        (tmp_path / f"rows{number}.jsonl").write_text(json.dumps({"text": str(number)}) + "\n")
    assert sorted(load_rows("json", files={"train": str(tmp_path / "rows[01].jsonl")})["text"]) == ["0", "1"]


@pytest.mark.parametrize("path", ["DIR/nothing*.csv", "csv"])
def test_a_pattern_that_no_file_matches_is_named(tmp_path, path):
    """`datasets` says of it that it wants features."""
    files = {"train": f"{tmp_path}/nothing*.csv"} if path == "csv" else None
    with pytest.raises(ValueError, match=r"got '.*nothing\*.csv', which matches none; check the path"):
        load_rows(path.replace("DIR", str(tmp_path)), files=files)


def test_files_of_a_data_set_are_named_from_its_folder(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.csv").write_text("text\n1.50\n")
    (tmp_path / "rows" / "b.csv").write_text("text\nother\n")
    for name in ("a.csv", "a*.csv"):
        assert load_rows(tmp_path / "rows", files={"train": name}, texts=["text"])["text"] == ["1.50"]
    with pytest.raises(ValueError, match=r"could not be loaded .*c.csv.*check the names"):
        load_rows(tmp_path / "rows", files={"train": "c.csv"})


def test_a_stream_has_no_parts(tmp_path):
    (tmp_path / "rows.csv").write_text("text\nw1\n")
    with pytest.raises(ValueError, match=r"got the split 'train\[:50%\]'; name a whole one, 'train', or do not"):
        load_rows(tmp_path / "rows.csv", "train[:50%]", streaming=True)


def test_a_cache_that_cannot_be_written_is_not_blamed_on_the_file(tmp_path, monkeypatch):
    """A home folder that is read-only, or none, as in some containers."""
    (tmp_path / "rows.csv").write_text("text\nw1\n")
    (tmp_path / "home").write_text("no folder")  # root may write into any that is one
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home" / "datasets")
    with pytest.raises(ValueError, match=r"in a cache, got '.*home.datasets', .* HF_DATASETS_CACHE to a folder"):
        load_rows(tmp_path / "rows.csv")


def test_a_file_is_one_data_set_and_has_no_names(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"got 'large' beside '.*rows.jsonl', which is one alone; leave the name out"):
        load_rows(tmp_path / "rows.jsonl", name="large")


@pytest.mark.parametrize(("name", "reader"), [("jsonl", "json"), ("tsv", "csv"), ("txt", "text")])
def test_an_ending_is_no_reader(tmp_path, name, reader):
    with pytest.raises(ValueError, match=rf"one of arrow, csv, .*, got '{name}', which '{reader}' reads"):
        load_rows(name, files={"train": str(tmp_path / f"rows.{name}")})


def test_another_encoding_is_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("text,label\nschön,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"got '.*rows\.csv' with the byte 0xf6, .* or name the `encoding`"):
        load_rows("csv", files={"train": str(path)})
    assert load_rows("csv", files={"train": str(path)}, encoding="latin-1")["text"] == ["schön"]


def test_semicolons_between_columns_and_commas_in_a_text(tmp_path):
    (tmp_path / "rows.csv").write_text("text;label\none;1\ntwo, three, four;0\n")
    with pytest.raises(ValueError, match=r'semicolons between its columns needs `options: {sep: ";"}`'):
        load_rows(tmp_path / "rows.csv")
    assert load_rows(tmp_path / "rows.csv", sep=";")["text"] == ["one", "two, three, four"]
