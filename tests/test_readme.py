"""What the README shows is true: its example runs, its names exist, its commands are targets of the Makefile."""

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_sparse

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.filterwarnings("ignore")  # a training of two steps on a model that reads this text as bytes
def test_quick_example_runs(llama_dir, tmp_path, monkeypatch, capsys):
    """On a small local model, two steps and a short text; all else as printed."""
    code = BLOCKS[0].replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(llama_dir))
    code = code.replace("max_steps=30", "max_steps=2")
    code = code.replace('"\\n".join(topics.values())', "topics['types'][:40000]")
    assert str(llama_dir) in code and "max_steps=2" in code and "types" in code
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert "pruned: perplexity" in printed and "tuned:  perplexity" in printed
    assert scope["sparsity_report"](tmp_path / "smollm2-2-4").pattern == "2:4"


@pytest.mark.filterwarnings("ignore")  # as above
def test_other_examples_run(hub_stand_ins, tmp_path, monkeypatch):
    """With what each of them takes to be there."""
    monkeypatch.chdir(tmp_path)
    names = {"llama": "HuggingFaceTB/SmolLM2-135M", "bert": "google-bert/bert-base-uncased"}
    tokenizer = AutoTokenizer.from_pretrained(hub_stand_ins[names["llama"]])
    text = "a fine film, a dull film: what a joy and what a waste of the class " * 40
    rows = [{"input_ids": [3 + index, 7, 9], "labels": index % 2} for index in range(8)]
    pst, pruning, storing = BLOCKS[1:]
    scope = {
        "data": rows,
        "texts": [text],
        "tokenizer": tokenizer,
    }
    pst = pst.replace(f'"{names["bert"]}"', repr(hub_stand_ins[names["bert"]]))
    exec(compile(pst.replace("num_train_epochs=3", "max_steps=2, report_to=[]"), "README.md", "exec"), scope)
    assert peft_sparse.sparsity_report(tmp_path / "sparse-bert").total_sparsity > 0.85
    scope["model"] = AutoModelForCausalLM.from_pretrained(hub_stand_ins[names["llama"]])
    exec(compile(pruning.replace("length=512", "length=8"), "README.md", "exec"), scope)
    assert peft_sparse.sparsity_report(scope["model"]).total_sparsity == pytest.approx(0.6, abs=0.01)
    scope["pruned_model"] = scope["model"]
    exec(compile(storing, "README.md", "exec"), scope)
    assert type(scope["model"].base_model) is peft_sparse.SppModel


def test_named_recipes_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").iterdir()):
        if page.is_file():
            for name in re.findall(r"configs/[a-z0-9_/]+\.yaml", page.read_text()):
                assert (ROOT / name).is_file(), f"{page.name}: {name}"


def test_every_block_is_valid_python():
    assert len(BLOCKS) >= 2
    for block in BLOCKS:
        compile(block, "README.md", "exec")


def test_public_names_are_those_of_the_readme_and_more():
    imported = set(re.findall(r"from peft_sparse import (.*)", README))
    names = {name.strip() for line in imported for name in line.split(",")}
    assert names and names <= set(peft_sparse.__all__)
    assert all(hasattr(peft_sparse, name) for name in peft_sparse.__all__)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
