"""What the README shows is true: its example runs, its names exist, its commands are targets of the Makefile."""

import re
from pathlib import Path
from pydoc_data.topics import topics

import pytest

import peft_sparse
from peft_sparse.cli.main import main

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
def test_the_command_line_runs_as_printed(llama_dir, tmp_path, monkeypatch, capsys):
    """Each line of the block, one after the other, with a small local model, a short text and two steps."""
    pytest.importorskip("datasets")
    (block,) = [block for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "peft-sparse prune" in block]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "text.txt").write_text(topics["types"][:20000])
    lines = [line.partition("#")[0].split() for line in block.splitlines() if line.startswith("peft-sparse")]
    for words in lines:
        words = [str(llama_dir) if word.startswith("HuggingFaceTB/") else word for word in words[1:]]
        small = {
            "prune": ["--length", "64"],
            "finetune": ["--set", "training.max_steps=2"],
            "evaluate": ["--length=64"],
        }
        assert main([*words, *small.get(words[0], [])]) == 0, capsys.readouterr().err
    assert [words[1] for words in lines] == ["prune", "finetune", "merge", "evaluate", "pack"]
    assert peft_sparse.verify_sparsity("packed", reference="pruned").ok


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
