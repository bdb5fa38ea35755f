"""docs/models.md: it has all architectures that were promised, and says what a new run says."""

import re

import pytest

from benchmarks import any_model
from benchmarks.any_model import COLUMNS, PAGE, TICK, page, refusals, try_one
from benchmarks.architectures import ARCHITECTURES, PROMISED
from benchmarks.models import REPOSITORY

# One each of: encoder, Conv1D, fused projections, encoder-decoder, images, speech, experts, shared blocks.
QUICK = ("BERT", "Falcon", "ViT", "Mixtral (MoE)")
COMMITTED = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""


def committed_cells(name: str) -> list[str]:
    rows = [line for line in COMMITTED.splitlines() if line.startswith(f"| {name} |")]
    assert len(rows) == 1, f"docs/models.md has {len(rows)} rows for {name}; run `make models-table`"
    return [cell.strip() for cell in rows[0].strip("|").split("|")]


def new_cells(name: str) -> list[str]:
    table = page([try_one(name, ARCHITECTURES[name])], [])
    row = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize("name", PROMISED)
def test_every_promised_architecture_has_a_row_and_works(name):
    cells = committed_cells(name)
    assert len(cells) == 3 + len(COLUMNS)
    assert cells[3:] == [TICK] * len(COLUMNS)


def test_the_page_has_a_row_for_each_architecture_of_the_script():
    assert set(PROMISED) <= set(ARCHITECTURES)
    for name in ARCHITECTURES:
        committed_cells(name)
    assert f"[{len(ARCHITECTURES)} architectures](docs/models.md)" in (REPOSITORY / "README.md").read_text("utf-8")


@pytest.mark.parametrize("name", QUICK)
def test_a_new_run_says_the_same(name):
    assert new_cells(name) == committed_cells(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - set(QUICK)))
def test_a_new_run_of_the_others_says_the_same(name):
    assert new_cells(name) == committed_cells(name)


def test_what_is_refused_says_what_the_page_says():
    for what, error in refusals():
        assert f"**{what}.**" in COMMITTED
        assert _without_sets(error) in _without_sets(COMMITTED)


def _without_sets(text: str) -> str:
    """PEFT prints sets, whose order is another one in every process."""
    return re.sub(r"\{[^{}]*\}", "{...}", text)


def test_the_checks_can_fail(monkeypatch):
    """A tuner that loses zeros, or that changes the function, gets no tick."""
    monkeypatch.setattr(any_model, "expected_zeros", lambda linear, pattern: 1)
    cell = try_one("BERT", ARCHITECTURES["BERT"], ["PST"]).cells["PST"]
    assert cell.startswith("unstructured: AssertionError: another count in `base_model.model.bert.encoder.layer.0.")
    monkeypatch.undo()
    monkeypatch.setattr(any_model, "TOLERANCE", -1.0)
    cell = try_one("BERT", ARCHITECTURES["BERT"], ["SPP"]).cells["SPP"]
    assert cell.startswith("unstructured: AssertionError: outputs differ by")


def test_the_command_prints_some(capsys):
    any_model.main(["--only", "BERT"])
    assert "| BERT | `BertForSequenceClassification` | 12 of 14" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        any_model.main(["--only", "BERTA"])
    assert "no architecture is called 'BERTA'" in capsys.readouterr().err
