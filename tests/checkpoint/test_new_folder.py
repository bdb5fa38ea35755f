"""The folder of a result: whatever is asked for can be written when the work is done, or was refused before it."""

import os
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from peft_sparse import prune_magnitude, verify_sparsity
from peft_sparse.checkpoint import pack_checkpoint, unpack_checkpoint
from peft_sparse.checkpoint.new_folder import check_writable, new_folder

import models

FILES = ["README.md", "config.json", "generation_config.json", "sparse_model.safetensors"]


@pytest.fixture
def dense(tmp_path) -> Path:
    prune_magnitude(models.tiny_llama(), "2:4").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("given", ["there", ".", "link", "link to nothing", "new/below/new", "n" * 255])
def test_places(given, dense, tmp_path, monkeypatch):
    """A folder that is there stays the same one, as it may be where a disk is mounted, or all that one may write."""
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "link to nothing").symlink_to("nothing")
    monkeypatch.chdir(place if given == "." else tmp_path)
    before = Path(given).stat().st_ino if given in ("there", ".", "link") else None
    pack_checkpoint(dense, given)
    assert names(Path(given)) == FILES and verify_sparsity(given, reference=dense).ok
    assert before is None or Path(given).stat().st_ino == before
    assert (tmp_path / "link").is_symlink() and not list(tmp_path.glob(".*"))
    if given == "link to nothing":
        assert names(tmp_path / "nothing") == FILES
    unpack_checkpoint(given, tmp_path / "again")
    AutoModelForCausalLM.from_pretrained(tmp_path / "again")


def test_two_results_in_one_place(tmp_path):
    """The first one stays, and the second leaves nothing."""
    with (
        pytest.raises(
            ValueError, match=r"into an empty folder, got 'first' in '.*out' since it began; choose another"
        ),
        new_folder(tmp_path / "out") as second,
    ):
        with new_folder(tmp_path / "out") as first:
            (first / "first").touch()
        (second / "second").touch()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["first"]


def test_an_end_as_soon_as_there_is_a_folder_leaves_nothing(tmp_path, monkeypatch):
    """Before anybody has been told its name."""
    mkdir = Path.mkdir

    def ending(path, *arguments, **options):
        mkdir(path, *arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.mkdir", ending)
    with pytest.raises(KeyboardInterrupt):
        check_writable(tmp_path)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("is_there", "ends_at"), [(False, 0), (True, 0), (True, 2), (True, 3)])
def test_an_end_at_any_move_leaves_nothing(is_there, ends_at, tmp_path, monkeypatch):
    folder, moved, rename = tmp_path / "out", [], Path.rename
    if is_there:
        folder.mkdir()

    def ending(path, target):
        if len(moved) == ends_at:
            raise KeyboardInterrupt
        moved.append(path.name)
        return rename(path, target)

    with pytest.raises(KeyboardInterrupt), new_folder(folder) as temporary:
        (temporary / "code").mkdir()
        for name in ("config.json", "model.safetensors", "code/more.py", "tokenizer.json"):
            (temporary / name).write_text("{}")
        monkeypatch.setattr(Path, "rename", ending)
    assert "config.json" not in moved  # the last one
    assert names(tmp_path) == (["out"] if is_there else []) and not (is_there and names(folder))


def test_what_came_into_the_folder_meanwhile_stays(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"got 'mine.txt' in .*out' since"), new_folder(tmp_path / "out") as temporary:
        (temporary / "config.json").write_text("{}")
        (tmp_path / "out" / "mine.txt").write_text("mine")
    assert names(tmp_path / "out") == ["mine.txt"]


def test_what_an_earlier_end_left_is_named(tmp_path):
    (tmp_path / "out" / ".peft-sparse-abc").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"not empty \('.peft-sparse-abc' is in it\)"), new_folder(tmp_path / "out"):
        pass


def test_who_may_read_a_new_folder_is_what_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "out"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
