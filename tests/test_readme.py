"""What the README shows is true: its example runs, its names exist, its commands are targets of the Makefile."""

import re
from pathlib import Path

import pytest

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
