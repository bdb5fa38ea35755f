"""Runs that are killed, disks that are full, files that are cut short: the last complete checkpoint is what counts."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from peft_sparse import CheckpointCallback, last_complete_checkpoint
from peft_sparse.training import checkpoint_callback
from peft_sparse.training.checkpoints import MANIFEST, checkpoint_fault, checkpoints, saved_again, set_aside_incomplete

import train_script
from forking import forked_process
from killing import kill_at_file

STEPS = 6


def settings(folder: Path, tuner: str, **arguments) -> dict:
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2} | arguments
    return {"tuner": tuner, "output_dir": str(folder), "steps": STEPS, "arguments": saving}


def train(run: dict, kill_at: int | None = None, file_limit: int | None = None) -> None:
    """The body of a process: train, and resume if there is something to resume from."""
    torch.set_num_threads(1)
    if kill_at is not None:
        kill_at_file(kill_at)
    if file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the kernel ends the process, with no error to see
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    resume = any(checkpoint_fault(folder) is None for folder in checkpoints(run["output_dir"]))
    train_script.train(run | {"resume": resume or None}, [CheckpointCallback()])


def run_process(*args) -> int:
    process = forked_process(train, *args)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def outcome(folder: Path) -> tuple[bytes, dict]:
    """What a run ends with: the adapter, bit for bit, and the masks."""
    report = json.loads((folder / "rank-0.json").read_text())
    return (folder / "final" / "adapter_model.safetensors").read_bytes(), report["final_masks"]


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory) -> dict[str, tuple[bytes, dict]]:
    outcomes = {}
    for tuner in ("pst", "spp-dropout"):
        folder = tmp_path_factory.mktemp(tuner)
        assert run_process(settings(folder, tuner)) == 0
        outcomes[tuner] = outcome(folder)
    return outcomes


# The files of a save: adapter, arguments, optimizer, scheduler, random states, state, (an old checkpoint,) manifest.
KILL_POINTS = [2, 13, 15, 24, 30]


@pytest.mark.parametrize("tuner", ["pst", "spp-dropout"])
@pytest.mark.parametrize("kill_at", [9, pytest.param(0, marks=pytest.mark.slow)])
def test_killed_in_the_middle_of_a_save(tmp_path, never_killed, tuner, kill_at):
    """The file that is written when the process dies is left half; then it is resumed and killed again."""
    run = settings(tmp_path, tuner)
    for point in [kill_at] if kill_at else KILL_POINTS:
        assert run_process(run, point) in (-signal.SIGKILL, 0)
    assert run_process(run) == 0
    assert outcome(tmp_path) == never_killed[tuner]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 2))])
@pytest.mark.parametrize("tuner", ["pst", pytest.param("spp-dropout", marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, never_killed, tuner, seed):
    moments, run = random.Random(seed), settings(tmp_path, tuner)
    for _ in range(3):
        process = forked_process(train, run)
        process.start()
        before = len(os.listdir(tmp_path))
        while process.is_alive() and len(os.listdir(tmp_path)) == before:
            time.sleep(0.005)  # until it saves
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.join()
    assert run_process(run) == 0
    assert outcome(tmp_path) == never_killed[tuner]


def test_disk_full(tmp_path, never_killed):
    """A file may not grow beyond a limit: the optimizer's state does not fit. Nothing older is lost."""
    run = settings(tmp_path, "pst")
    assert run_process(run, 20) == -signal.SIGKILL
    last = last_complete_checkpoint(tmp_path)
    before = {path: path.read_bytes() for path in Path(last).rglob("*") if path.is_file()}
    adapter = (Path(last) / "adapter_model.safetensors").stat().st_size
    assert run_process(run, None, adapter + 1000) == 1
    assert last_complete_checkpoint(tmp_path) == last
    assert {path: path.read_bytes() for path in before} == before
    assert run_process(run) == 0
    assert outcome(tmp_path) == never_killed["pst"]


def test_no_room_for_the_next_checkpoint(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    saves = iter([usage, usage, usage._replace(free=1000)])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: next(saves))
    with pytest.raises(OSError, match=r"takes about [\d,]+ bytes, got 1,000 free .* at step 3") as error:
        train_script.train(settings(tmp_path, "pst"), [CheckpointCallback()])
    assert error.value.errno == errno.ENOSPC
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_no_room_for_the_first_checkpoint(tmp_path, monkeypatch):
    """Weights would fit, but not what the optimizer keeps of them, twice as much: none to go by is there yet."""
    trainer = train_script.make_trainer(train_script.DEFAULTS | settings(tmp_path, "pst"), [CheckpointCallback()])
    trained = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    usage = shutil.disk_usage(tmp_path)._replace(free=(1 << 16) + 2 * trained)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"takes about [\d,]+ bytes, got .* at step 1"):
        trainer.train()
    assert not checkpoints(tmp_path)


def test_read_only_folder(tmp_path, monkeypatch):
    def refuse(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(checkpoint_callback.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match="nothing can be written \\(Read-only file system\\)"):
        train_script.train(settings(tmp_path, "pst"), [CheckpointCallback()])
    assert not checkpoints(tmp_path)


def test_output_dir_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"choose another folder|File exists|Not a directory"):
        train_script.train(settings(tmp_path / "file", "pst"), [CheckpointCallback()])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder of two complete checkpoints, with manifests."""
    folder = tmp_path_factory.mktemp("finished")
    assert run_process(settings(folder, "pst")) == 0
    return folder


@pytest.fixture(params=["manifest", "no manifest"])
def copied(finished, tmp_path, request) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    if request.param == "no manifest":  # as a Trainer without CheckpointCallback leaves it
        for manifest in (tmp_path / "run").rglob(MANIFEST):
            manifest.unlink()
    return tmp_path / "run"


def test_all_is_complete(copied):
    assert [folder.name for folder in checkpoints(copied)] == ["checkpoint-6", "checkpoint-5"]
    assert [checkpoint_fault(folder) for folder in checkpoints(copied)] == [None, None]
    assert last_complete_checkpoint(str(copied)) == str(copied / "checkpoint-6")
    assert not set_aside_incomplete(copied)


FILES = ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.999])
def test_a_truncated_file_is_seen(copied, name, share):
    file = copied / "checkpoint-6" / name
    os.truncate(file, int(share * file.stat().st_size))
    assert name in checkpoint_fault(file.parent)
    assert last_complete_checkpoint(copied) == str(copied / "checkpoint-5")
    assert set_aside_incomplete(copied) == [copied / "incomplete-checkpoint-6"]
    assert last_complete_checkpoint(copied) == str(copied / "checkpoint-5")


def test_a_missing_file_is_seen(copied):
    has_manifest = (copied / "checkpoint-6" / MANIFEST).exists()
    (copied / "checkpoint-6" / ("optimizer.pt" if has_manifest else "trainer_state.json")).unlink()
    assert last_complete_checkpoint(copied) == str(copied / "checkpoint-5")


def test_a_changed_byte_is_seen(finished, tmp_path):
    """Also where the format would not tell: in the numbers of a safetensors file."""
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-6" / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert "CRC-32" in checkpoint_fault(file.parent)


def test_a_folder_that_another_run_began_to_overwrite(finished, tmp_path):
    """The old state file is still there, and whole."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.copy(tmp_path / "run/checkpoint-5/optimizer.pt", tmp_path / "run/checkpoint-6/optimizer.pt")
    assert "optimizer.pt" in checkpoint_fault(tmp_path / "run" / "checkpoint-6")


class Requested(TrainerCallback):
    """What SIGTERM does with `enable_jit_checkpoint`, while step 4 is saved: that is saved once more, in the same
    folder. `seen` has what could have been resumed from afterwards."""

    def __init__(self) -> None:
        self.manager, self.seen = None, None

    def on_save(self, args, state, control, **kwargs):
        self.manager.is_checkpoint_requested = state.global_step == 4

    def on_step_end(self, args, state, control, **kwargs):
        self.seen = last_complete_checkpoint(args.output_dir)


def test_a_checkpoint_that_is_saved_again_before_the_end(tmp_path):
    if "enable_jit_checkpoint" not in {field.name for field in fields(TrainingArguments)}:
        pytest.skip("this transformers saves none when it is told to end")
    requested = Requested()
    run = settings(tmp_path, "pst", enable_jit_checkpoint=True, save_steps=4, save_total_limit=1)
    trainer = train_script.make_trainer(train_script.DEFAULTS | run, [CheckpointCallback(), requested])
    (jit,) = (one for one in trainer.callback_handler.callbacks if type(one).__name__ == "JITCheckpointCallback")
    requested.manager, saved = jit.jit_manager, tmp_path / "checkpoint-4"
    trainer.train()
    assert requested.seen == last_complete_checkpoint(tmp_path) == str(saved) and not saved_again(saved)
    assert json.loads((saved / "trainer_state.json").read_text())["global_step"] == 4
    (saved / "checkpoint-is-incomplete.txt").touch()
    assert "checkpoint-is-incomplete.txt" in checkpoint_fault(saved)


def test_random_states_of_all_processes(finished, tmp_path):
    """Without a manifest, as many as in an older checkpoint that has one."""
    shutil.copytree(finished, tmp_path / "run")
    for folder in checkpoints(tmp_path / "run"):
        (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
        shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    newer, older = checkpoints(tmp_path / "run")
    checkpoint_callback.write_manifest(older)
    (newer / MANIFEST).unlink()
    assert last_complete_checkpoint(tmp_path / "run") == str(newer)
    (newer / "rng_state_1.pth").unlink()
    assert last_complete_checkpoint(tmp_path / "run") == str(older)


def test_nothing_to_resume_from(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    assert last_complete_checkpoint(tmp_path) is None
    assert set_aside_incomplete(tmp_path) == [tmp_path / "incomplete-checkpoint-3"]
    (tmp_path / "checkpoint-3").mkdir()
    assert set_aside_incomplete(tmp_path) == [tmp_path / "incomplete-checkpoint-3.2"]


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_loading_a_truncated_adapter(finished, tmp_path, share):
    shutil.copytree(finished / "final", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    os.truncate(file, int(share * file.stat().st_size))
    base, _ = train_script.make_model(train_script.DEFAULTS)
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors.*cut short"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert [name for name, _ in base.named_modules()] == names
    assert load_file(finished / "final" / "adapter_model.safetensors")
