"""The notebooks run from top to bottom, on tiny models and for a few steps; their files hold no one's paths."""

import json
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
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
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
    matplotlib.pyplot.close("all")
    assert (tmp_path / "out").exists() or (tmp_path / "pruned").exists()


@pytest.mark.parametrize("name", MODELS)
def test_printed_output_names_no_machine(name):
    text = (NOTEBOOKS / f"{name}.ipynb").read_text()
    assert "/home/" not in text and "/root/" not in text and "/work/" not in text and "/tmp/" not in text
