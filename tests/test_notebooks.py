"""The notebooks run from top to bottom, on tiny models and for a few steps; their files hold no one's paths."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
MODELS = {
    "quickstart": "HuggingFaceTB/SmolLM2-135M",
    "spp_causal_lm": "HuggingFaceTB/SmolLM2-135M",
    "pst_classification": "google-bert/bert-base-uncased",
}


def test_each_notebook_has_a_model_here():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(MODELS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # tiny models, trained for a few steps
@pytest.mark.parametrize("name", MODELS)
def test_runs(name, hub_stand_ins, tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    for split, count in [("train", 64), ("dev", 16)]:
        rows = [{"sentence": f"a {'fine' if i % 2 else 'dull'} film", "label": i % 2} for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for variable, value in {"MODEL": hub_stand_ins[MODELS[name]], "STEPS": "3", "SST2": str(tmp_path)}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    scope: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), name, "exec"), scope)
    pyplot.close("all")
    assert (tmp_path / "out").exists() or (tmp_path / "pruned").exists()


def code_cells(name):
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_stored(name):
    """As `make notebooks` left them: all cells were run in order, with results and without noise."""
    cells = code_cells(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    text = "".join("".join(output.get("text", [])) for output in outputs)
    assert "perplexity" in text or "accuracy" in text
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}  # nothing from stderr
    assert all(word not in text for word in ("Traceback", "Warning", "warning", "_runtime", "it/s"))


@pytest.mark.parametrize("name", ["quickstart", "pst_classification"])
def test_pictures_are_stored(name):
    kinds = {kind for cell in code_cells(name) for output in cell["outputs"] for kind in output.get("data", {})}
    assert "image/png" in kinds


@pytest.mark.parametrize("name", MODELS)
def test_nothing_in_the_file_names_a_machine(name):
    text = (NOTEBOOKS / f"{name}.ipynb").read_text()
    assert not re.search(r"/(home|root|work|tmp|usr|opt|var|mnt|Users)/", text)


def test_execute_stores_what_a_cell_printed_drew_and_returned(monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    monkeypatch.syspath_prepend(str(NOTEBOOKS))
    import execute

    source = [
        "import matplotlib.pyplot as plt, sys\nprint('a', 1)\nprint('bar', file=sys.stderr)\n"
        "print({'train_runtime': '3'})\nfigure = plt.plot([1, 2])",
        "x = 3\nx + 1",
    ]
    notebook = {
        "cells": [{"cell_type": "code", "source": [text], "outputs": [], "execution_count": None} for text in source]
    }
    execute.execute(notebook)
    first, second = (cell["outputs"] for cell in notebook["cells"])
    assert first[0] == {"name": "stdout", "output_type": "stream", "text": ["a 1\n"]}
    assert first[1]["data"]["image/png"].startswith("iVBOR")
    assert second[0]["data"]["text/plain"] == ["4"] and second[0]["execution_count"] == 2
