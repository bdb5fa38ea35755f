"""Rows from files: by their names, whatever signs are in them."""

import json

import pytest

pytest.importorskip("datasets")

from peft_sparse.pruning import load_rows


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
