"""A resumed run goes on with the adapter that was saved, bit for bit, or not at all: what PEFT reads into an adapter
that is there already, our callbacks compare with checksums in the checkpoint's state."""

import json
import logging
import shutil
import struct
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_sparse import CheckpointCallback, PstConfig, SparsityCallback, SppConfig, last_complete_checkpoint
from peft_sparse.pruning import prune_magnitude
from peft_sparse.training.adapter_record import adapter_checksums

from models import tiny_bert
from train_script import Sentences

CONFIGS = {"pst": PstConfig(task_type="SEQ_CLS", sparsity=0.75), "spp": SppConfig(task_type="SEQ_CLS")}
WEIGHTS = "adapter_model.safetensors"


def trainer(folder, method="pst", callbacks=(), second=False, **changes) -> Trainer:
    torch.manual_seed(0)
    model = get_peft_model(prune_magnitude(tiny_bert()), CONFIGS[method])
    if second:
        model.add_adapter("second", CONFIGS[method])
    settings = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "steps", "save_steps": 2,
    } | changes  # fmt: skip
    callbacks = callbacks or [SparsityCallback()]
    data = Sentences(model.get_base_model())
    return Trainer(model, TrainingArguments(**settings), train_dataset=data, eval_dataset=data, callbacks=callbacks)


# PST needs the one, SPP may have the other only, and whoever has both has them in any order.
KINDS = {
    "pst": [SparsityCallback],
    "spp": [CheckpointCallback],
    "pst and checkpoints": [SparsityCallback, CheckpointCallback],
}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request) -> str:
    return request.param


@pytest.fixture
def callbacks(kind):
    return lambda: [callback() for callback in KINDS[kind]]


@pytest.fixture(scope="module")
def saved(kind, tmp_path_factory) -> tuple[str, Path]:
    """The method, and a checkpoint in the middle of a run."""
    folder = tmp_path_factory.mktemp("saved")
    trainer(folder, kind[:3], [callback() for callback in KINDS[kind]]).train()
    return kind[:3], folder / "checkpoint-2"


@pytest.fixture
def checkpoint(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved[1], tmp_path / "elsewhere" / "checkpoint-2"))


def flip(folder: Path, name: str) -> None:
    """The lowest bit of the last byte of the first tensor whose name has `name` in it: a small number becomes
    another one, or twice or half of it."""
    data = bytearray((folder / WEIGHTS).read_bytes())
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    key = next(key for key in sorted(header) if name in key)
    data[8 + size + header[key]["data_offsets"][1] - (8 if "pruned" in key else 1)] ^= 1
    (folder / WEIGHTS).write_bytes(data)


@pytest.mark.parametrize("name", ["_B", "classifier.weight", "pst_pruned"])
def test_a_flipped_bit(saved, callbacks, checkpoint, tmp_path, name):
    if saved[0] == "spp" and name == "pst_pruned":
        name = "spp_A"  # it has no counts
    flip(checkpoint, name)
    run = trainer(tmp_path / "run", saved[0], callbacks())
    with pytest.raises(ValueError, match=r"An adapter is trained on as it was saved .* is damaged, or was changed"):
        run.train(resume_from_checkpoint=str(checkpoint))
    assert not run.train_dataset.read  # before the first batch


def test_an_intact_one_is_resumed_and_saved_again(saved, callbacks, checkpoint, tmp_path, caplog):
    for restore in (False, True):
        run = trainer(tmp_path / "run", saved[0], callbacks(), restore_callback_states_from_checkpoint=restore)
        with caplog.at_level(logging.WARNING, logger="peft_sparse"):
            run.train(resume_from_checkpoint=str(checkpoint))
        assert not [record for record in caplog.records if "not compared" in record.message]
        again = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
        whole = json.loads((saved[1].with_name("checkpoint-4") / "trainer_state.json").read_text())
        assert again["stateful_callbacks"] == whole["stateful_callbacks"]
        assert "adapter_checksums" in json.dumps(whole["stateful_callbacks"])


def test_a_checkpoint_from_before_there_were_checksums(saved, callbacks, checkpoint, tmp_path, caplog):
    file = checkpoint / "trainer_state.json"
    state = json.loads(file.read_text())
    state["stateful_callbacks"] = {"TrainerControl": state["stateful_callbacks"]["TrainerControl"]}
    file.write_text(json.dumps(state))
    run = trainer(tmp_path / "run", saved[0], callbacks())
    with caplog.at_level(logging.WARNING, logger="peft_sparse"):
        run.train(resume_from_checkpoint=str(checkpoint))
    assert "'default' was not compared with the checkpoint of step 2, which has no checksum of it" in caplog.text
    assert "adapter_checksums" in (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text()


def pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def test_a_pickle(saved, callbacks, tmp_path):
    shutil.copytree(saved[1], tmp_path / "checkpoint-2")
    pickle(tmp_path / "checkpoint-2")
    assert last_complete_checkpoint(tmp_path) is None
    run = trainer(tmp_path, saved[0], callbacks())
    if (tmp_path / "incomplete-checkpoint-2").is_dir():  # CheckpointCallback has put it aside
        (tmp_path / "incomplete-checkpoint-2").rename(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"adapter is in adapter_model\.safetensors, got only .*, a pickle"):
        run.train(resume_from_checkpoint=True)
    assert not run.train_dataset.read


def test_a_run_that_had_the_other_callback(tmp_path):
    trainer(tmp_path / "one", "spp", [SparsityCallback()]).train()
    checkpoint = tmp_path / "one" / "checkpoint-2"
    trainer(tmp_path / "two", "spp", [CheckpointCallback()]).train(resume_from_checkpoint=str(checkpoint))
    flip(checkpoint, "_B")
    run = trainer(tmp_path / "three", "spp", [CheckpointCallback()])
    with pytest.raises(ValueError, match="as it was saved"):
        run.train(resume_from_checkpoint=str(checkpoint))


def test_another_adapter_beside_the_trained_one(tmp_path):
    trainer(tmp_path, second=True).train()
    flip(tmp_path / "checkpoint-2" / "second", "pst_A")
    run = trainer(tmp_path, second=True)
    with pytest.raises(ValueError, match="for the tensors of 'second' in the checkpoint of step 2"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_an_adapter_in_another_dtype_is_not_compared(tmp_path, caplog):
    trainer(tmp_path).train()
    run = trainer(tmp_path)
    run.model.to(torch.bfloat16)
    with caplog.at_level(logging.WARNING, logger="peft_sparse"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "it was saved in float32 int64 and is in bfloat16 float32 int64" in caplog.text


class Damage(TrainerCallback):
    """A bit that flips on the disk while a run goes on."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == args.max_steps:
            flip(Path(args.output_dir) / "checkpoint-2", "_B")


@pytest.mark.parametrize("damaged", [False, True])
def test_the_best_model(callbacks, tmp_path, damaged):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.0}
    run = trainer(tmp_path, "spp", callbacks() + [Damage()] * damaged, **best)
    if not damaged:
        run.train()
        assert run.state.best_model_checkpoint.endswith("checkpoint-2")  # nothing is learned, so the first is kept
        return
    with pytest.raises(ValueError, match=r"of 'default' in '.*checkpoint-2': its adapter_model"):
        run.train()


def test_nothing_is_said_of_saving(tmp_path, recwarn):
    """PST warns where an adapter is saved whose schedule never advanced; here nothing is."""
    adapter_checksums(get_peft_model(tiny_bert(), CONFIGS["pst"]))
    assert not [warning for warning in recwarn if "Saving" in str(warning.message)]


def test_the_way_to_check_what_load_adapter_does_not(tmp_path):
    """docs/troubles.md: PEFT alone reads it, and the config's `from_pretrained` refuses."""
    model = get_peft_model(prune_magnitude(tiny_bert()), CONFIGS["spp"])
    model.save_pretrained(tmp_path)
    before = adapter_checksums(model)
    SppConfig.from_pretrained(tmp_path)
    flip(tmp_path, "spp_B")
    with pytest.raises(ValueError, match="damaged"):
        SppConfig.from_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default")
    assert adapter_checksums(model) != before
    pickle(tmp_path)
    with pytest.raises(ValueError, match="a pickle, which can run code"):
        SppConfig.from_pretrained(tmp_path)
