"""A run that was interrupted goes on and gives the same model, bit for bit; another run is refused."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from peft_sparse import prune_wanda
from peft_sparse.linears import block_linears
from peft_sparse.pruning import calibration
from peft_sparse.pruning.resume import MANIFEST

import models


def batches(seed: int = 1) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, models.VOCAB_SIZE, (2, 10), generator=generator)} for _ in range(3)]


def prune(model: nn.Module, folder: Path | None = None, data=None, **arguments) -> nn.Module:
    arguments = {"sparsity": 0.6, "measure_error": True, **arguments}
    return prune_wanda(model, data or batches(), progress=False, checkpoint_dir=folder, **arguments)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.fixture
def pruned_blocks(monkeypatch) -> list[str]:
    """Names of the blocks whose linears are pruned, in order; loaded ones are not among them."""
    blocks: list[str] = []
    original = calibration._Changes.make

    def make(self, step, gathered):
        blocks.append(step.name)
        return original(self, step, gathered)

    monkeypatch.setattr(calibration._Changes, "make", make)
    return blocks


def interrupt_after(monkeypatch, count: int, error: BaseException) -> None:
    original = calibration._Changes.make

    def make(self, step, gathered):
        if len(self.changed) >= count:
            raise error
        return original(self, step, gathered)

    monkeypatch.setattr(calibration._Changes, "make", make)


@pytest.mark.parametrize("factory", [models.tiny_llama, models.tiny_gpt2, models.tiny_bert])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_folder_changes_nothing_and_gives_the_model_at_once(tmp_path, pruned_blocks, factory, dtype):
    plain = prune(factory().to(dtype))
    assert_same(prune(factory().to(dtype), tmp_path), state_of(plain))
    assert len(pruned_blocks) == 4
    again = factory().to(dtype)
    again.register_forward_pre_hook(lambda *_: pytest.fail("a finished run needs no forward"))
    prune(again, tmp_path)
    assert_same(again, state_of(plain))
    assert len(pruned_blocks) == 4
    assert again.config.peft_sparse == plain.config.peft_sparse


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, error):
    expected, model = state_of(prune(models.tiny_llama())), models.tiny_llama()
    before = state_of(model)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7, error)
        with pytest.raises(type(error)):
            prune(model, tmp_path)
    assert_same(model, before)
    assert not hasattr(model.config, "peft_sparse")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.layers.0.safetensors", MANIFEST]
    blocks: list[str] = []
    original = calibration._Changes.make
    monkeypatch.setattr(
        calibration._Changes, "make", lambda self, step, g: (blocks.append(step.name), original(self, step, g))[1]
    )
    assert_same(prune(model, tmp_path), expected)
    assert blocks == ["model.layers.1"]
    assert model.config.peft_sparse["pruning"]["errors"].keys() == block_linears(model).keys()


@pytest.mark.parametrize("count", [7, 99])
def test_errors_that_are_wanted_later_or_no_longer(tmp_path, monkeypatch, count):
    """Of a run that was half-way or done: a block that was saved without errors is pruned again."""
    expected = prune(models.tiny_llama())
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        interrupt_after(patch, count, KeyboardInterrupt())
        prune(models.tiny_llama(), tmp_path, measure_error=False)
    for measured in (True, False):
        model = prune(models.tiny_llama(), tmp_path, measure_error=measured)
        assert_same(model, state_of(expected))
        errors = expected.config.peft_sparse["pruning"]["errors"] if measured else None
        assert model.config.peft_sparse["pruning"].get("errors") == errors


CHILD = """
import os, signal, sys
import models, test_resume
from peft_sparse.pruning import calibration
made = calibration._Changes.make
def make(self, step, gathered):
    if step.name.endswith(".1"):
        print("half-way", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return made(self, step, gathered)
calibration._Changes.make = make
test_resume.prune(models.tiny_llama(), sys.argv[1])
"""


def test_a_killed_process(tmp_path):
    """SIGKILL in the middle of the second block."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), *sys.path])
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "state")],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert "half-way" in child.stdout
    assert (tmp_path / "state" / "model.layers.0.safetensors").exists()
    assert not (tmp_path / "state" / "model.layers.1.safetensors").exists()
    assert_same(prune(models.tiny_llama(), tmp_path / "state"), state_of(prune(models.tiny_llama())))


@pytest.mark.parametrize("damage", ["truncated", "emptied", "deleted", "weight", "number", "quote", "key"])
@pytest.mark.parametrize("block", ["model.layers.0", "model.layers.1"])
def test_a_damaged_block_is_pruned_again(tmp_path, pruned_blocks, damage, block):
    """The last four are one bit: of a weight, of an error of outputs, and of what makes that readable."""
    done = prune(models.tiny_llama(), tmp_path)
    expected, errors = state_of(done), done.config.peft_sparse["pruning"]["errors"]
    pruned_blocks.clear()
    file = tmp_path / f"{block}.safetensors"
    content = bytearray(file.read_bytes())
    number = content.index(b'": 0.')
    content[{"number": number + 5, "quote": number, "key": content.index(b"errors")}.get(damage, -5)] ^= 1
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes({"truncated": content[: len(content) // 2], "emptied": b""}.get(damage, content))
    model = models.tiny_llama()
    if damage == "deleted":
        prune(model, tmp_path)
    else:
        with pytest.warns(UserWarning, match=rf"{block}.safetensors' cannot be read .* and is pruned again"):
            prune(model, tmp_path)
    assert_same(model, expected)
    assert model.config.peft_sparse["pruning"]["errors"] == errors
    assert pruned_blocks == [block]
    assert_same(prune(models.tiny_llama(), tmp_path), expected)  # whole again
    assert pruned_blocks == [block]


@pytest.mark.parametrize("names", [["model.layers.1"] * 2, ["model.layers.1"], ["model.layers.0", "model.layers.q"]])
def test_a_damaged_list_of_blocks(tmp_path, names):
    """One bit, and it has block 1 twice: block 0 would stay dense."""
    expected = state_of(prune(models.tiny_llama(), tmp_path))
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"blocks": names}))
    assert_same(prune(models.tiny_llama(), tmp_path), expected)
    assert json.loads((tmp_path / MANIFEST).read_text()) == manifest


def test_what_was_left_half_written_is_ignored(tmp_path):
    expected = state_of(prune(models.tiny_llama(), tmp_path))
    (tmp_path / ".model.layers.1.safetensors.123").write_bytes(b"half")
    os.remove(tmp_path / "model.layers.1.safetensors")
    assert_same(prune(models.tiny_llama(), tmp_path), expected)


def changed_model() -> nn.Module:
    model = models.tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 5] += 1e-3  # no target, and what blocks see depends on it
    return model


def another_function() -> nn.Module:
    model = models.tiny_llama()
    other = type(model)(type(model.config)(**model.config.to_dict() | {"hidden_act": "relu"})).eval()
    other.load_state_dict(model.state_dict())
    return other


OTHER_RUNS = {
    "sparsity": (
        models.tiny_llama,
        {"sparsity": 0.5},
        "sparsity differ in 14 places, the first is .* was 0.6 and is 0.5",
    ),
    "pattern": (models.tiny_llama, {"pattern": "2:4", "sparsity": None}, "pattern was 'unstructured' and is '2:4'"),
    "data": (models.tiny_llama, {"data": batches(2)}, "calibration differ in 1 places, the first is sha256 was"),
    "fewer": (models.tiny_llama, {"data": batches()[:2]}, "the first is sequences was 6 and is 4"),
    "targets": (models.tiny_llama, {"exclude_modules": ["q_proj"]}, "sparsity differ in 2 places, .*q_proj was 0.6"),
    "model": (changed_model, {}, "model weights was"),
    "config": (
        another_function,
        {},
        "model config differ in 1 places, the first is hidden_act was 'silu' and is 'relu'",
    ),
    "dtype": (lambda: models.tiny_llama().bfloat16(), {}, "model weights was"),
}


@pytest.mark.parametrize(("factory", "arguments", "message"), OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_another_run_is_refused(tmp_path, factory, arguments, message):
    prune(models.tiny_llama(), tmp_path)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model = factory()
    before = state_of(model)
    with pytest.raises(ValueError, match=rf"(?s)continues the run that it was made by, got another .*{message}"):
        prune(model, tmp_path, **arguments)
    assert_same(model, before)
    assert files == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_the_same_model_from_a_folder_goes_on(tmp_path, pruned_blocks):
    """Loading writes into the config where it is from, and a classifier's forward what it took its labels for."""
    model = models.tiny_bert()
    model.save_pretrained(tmp_path / "model")
    labelled = [batch | {"labels": torch.tensor([0, 1])} for batch in batches()]
    expected = state_of(prune(model, tmp_path / "run", labelled))
    again = type(model).from_pretrained(tmp_path / "model")
    again(**labelled[0])
    assert_same(prune(again, tmp_path / "run", labelled), expected)
    assert len(pruned_blocks) == 2


def test_the_pruned_model_is_another_one(tmp_path):
    model = prune(models.tiny_llama(), tmp_path)
    with pytest.raises(ValueError, match=r"model weights was .* the model as it was before pruning"):
        prune(model, tmp_path)


def test_a_block_of_another_run_is_refused(tmp_path):
    prune(models.tiny_llama(), tmp_path / "one")
    prune(models.tiny_llama(), tmp_path / "two", sparsity=0.5)
    os.replace(tmp_path / "two" / "model.layers.1.safetensors", tmp_path / "one" / "model.layers.1.safetensors")
    model = models.tiny_llama()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"got .*model.layers.1.safetensors' of another run; name another folder"):
        prune(model, tmp_path / "one")
    assert_same(model, before)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2, "run": {}, "blocks": []}', '{"format": 1, "run": {}}'])
def test_a_folder_that_cannot_be_read(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    model = models.tiny_llama()
    before = state_of(model)
    with pytest.raises(ValueError, match="`checkpoint_dir`"):
        prune(model, tmp_path)
    assert_same(model, before)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`checkpoint_dir` is a folder"):
        prune(models.tiny_llama(), tmp_path / "file")


def test_an_excluded_block_has_no_file(tmp_path, pruned_blocks):
    exclude = r".*layers\.0\..*"
    expected = state_of(prune(models.tiny_llama(), exclude_modules=exclude))
    assert_same(prune(models.tiny_llama(), tmp_path, exclude_modules=exclude), expected)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.layers.1.safetensors"]
    assert_same(prune(models.tiny_llama(), tmp_path, exclude_modules=exclude), expected)


def test_the_manifest_says_what_the_run_is(tmp_path):
    prune(models.tiny_llama(), tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["blocks"] == ["model.layers.0", "model.layers.1"]
    assert manifest["run"]["method"] == "wanda" and manifest["run"]["calibration"]["tokens"] == 60
    assert time.time() - (tmp_path / MANIFEST).stat().st_mtime < 600


def test_a_folder_of_somebodys_is_left_alone(tmp_path):
    model = models.tiny_llama()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"pruning_run.json, got .* has none and is not empty .*choose another name"):
        prune(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert_same(model, state_of(models.tiny_llama()))


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    plain = state_of(prune(models.tiny_llama()))

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("peft_sparse.pruning.resume.os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            prune(models.tiny_llama(), tmp_path)
    assert not list(tmp_path.iterdir())
    again = models.tiny_llama()
    (tmp_path / f".{MANIFEST}.1").write_text("of a run that was killed")
    prune(again, tmp_path)
    assert_same(again, plain)
