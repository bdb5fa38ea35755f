"""The commands that README and guides show do what they say: run line by line as printed, on small models."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import yaml

from peft_sparse import last_complete_checkpoint, sparsity_report, verify_sparsity
from peft_sparse.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
STAND_INS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "HuggingFaceTB/SmolLM2-135M",
    "MODEL": "HuggingFaceTB/SmolLM2-135M",
    "sentence-transformers/all-MiniLM-L6-v2": "google-bert/bert-base-uncased",
}
SMALL = {
    "prune": ["--length=64", "--num-sequences=4"],
    "finetune": ["--set=training.max_steps=2", "--set=data.max_length=64"],
    "evaluate": ["--length=64"],
}


def commands(page: str, program: str) -> list[list[str]]:
    """The words of each line in a page's shell blocks that starts a program, with comments and line ends taken out."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))
    lines = [shlex.split(line, comments=True) for line in blocks.replace("\\\n", " ").splitlines()]
    return [line for line in lines if program in line]


def run(words: list[str], stand_ins: dict[str, str]) -> str:
    """One `peft-sparse` command.

    Returns:
        Its subcommand.
    """
    _, name, *arguments = [stand_ins[STAND_INS[word]] if word in STAND_INS else word for word in words]
    if "magnitude" not in arguments:
        arguments += SMALL.get(name, [])
    assert main([name, *arguments, "--quiet"]) == 0
    return name


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder as the guides take it to be: that of the repository, with a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "text.txt").write_text(topics["types"][:20000])
    return tmp_path


@pytest.mark.parametrize("page", ["README.md", "docs/command-line.md"])
def test_from_a_model_to_a_packed_one(page, hub_stand_ins, here):
    pytest.importorskip("datasets")
    pytest.importorskip("matplotlib")
    names = [run(words, hub_stand_ins) for words in commands(page, "peft-sparse")]
    expected = ["prune", "report", "finetune", "merge", "verify", "evaluate", "pack", "unpack"]
    left_out = ("report", "verify", "unpack") if page == "README.md" else ()
    assert names == [name for name in expected if name not in left_out]
    assert verify_sparsity("packed", reference="pruned").ok
    assert left_out or ((here / "sparsity.png").is_file() and verify_sparsity("dense", reference="merged").ok)


def test_the_recipe_of_the_command_line(hub_stand_ins, here):
    pytest.importorskip("datasets")
    (recipe,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/command-line.md").read_text(), re.DOTALL)
    run(["peft-sparse", "prune", "MODEL", "pruned", "--pattern", "2:4", "--data", "text.txt"], hub_stand_ins)
    (here / "recipe.yaml").write_text(recipe)
    run(["peft-sparse", "finetune", "recipe.yaml"], hub_stand_ins)
    assert yaml.safe_load(recipe)["output"]["merge"] is True
    assert verify_sparsity("out/merged", reference="pruned").ok


def test_the_picture_of_rows_and_columns(hub_stand_ins, here):
    pytest.importorskip("matplotlib")
    assert [run(words, hub_stand_ins) for words in commands("docs/sparsify.md", "peft-sparse")] == ["prune", "report"]
    assert (here / "sparsity.png").stat().st_size > 10_000
    assert sparsity_report("pruned").total_sparsity == pytest.approx(0.9, abs=1e-3)


@pytest.mark.slow
def test_two_processes(hub_stand_ins, here):
    """What docs/distributed.md starts without a GPU; those with FSDP2 and ZeRO-3 are in tests/training."""
    page = (ROOT / "docs/distributed.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    code = code.replace('TrainingArguments("out", ', 'TrainingArguments("out", use_cpu=True, ')
    code = code.replace("max_steps=200, save_steps=50", "max_steps=4, save_steps=2")
    code = code.replace('"HuggingFaceTB/SmolLM2-135M"', repr(hub_stand_ins["HuggingFaceTB/SmolLM2-135M"]))
    assert "use_cpu=True" in code and "max_steps=4" in code
    code += "import os\nos._exit(0)\n"  # gloo's threads may abort an interpreter that ends; the page says so
    (here / "train.py").write_text(code)
    lines = [words for words in commands("docs/distributed.md", "accelerate") if words[-1] == "train.py"]
    assert [any("ddp.yaml" in word for word in words) for words in lines] == [True, False, False, True]
    path = os.pathsep.join([str(ROOT / "src"), *sys.path])
    for words in (lines[0], lines[3]):
        start = words.index("accelerate")
        settings = dict(word.split("=", 1) for word in words[:start])
        command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", *words[start + 2 :]]
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | settings
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        assert last_complete_checkpoint("out").endswith("checkpoint-4")
        assert (here / "out" / "adapter" / "adapter_model.safetensors").is_file()
        shutil.rmtree("out")  # what comes next starts anew
