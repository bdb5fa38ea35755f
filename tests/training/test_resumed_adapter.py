"""Weights that PEFT or transformers read without asking the adapter's config are looked at all the same: those of a
resumed run and of the best model, of `load_adapter` for an adapter that is there, and of transformers' own."""

import copy
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from peft_sparse import CheckpointCallback, PstConfig, SparsityCallback, SppConfig, last_complete_checkpoint
from peft_sparse.pruning import prune_magnitude

from models import tiny_bert
from train_script import Sentences

CONFIGS = {"pst": PstConfig(task_type="SEQ_CLS", sparsity=0.75), "spp": SppConfig(task_type="SEQ_CLS")}
WEIGHTS = "adapter_model.safetensors"
DAMAGED = r"is as it was saved \(CRC-32 .* is damaged, or of another save"
PICKLED = r"are in adapter_model\.safetensors, got only .* a pickle, which can run code"


def adapted(method: str, base=None) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(prune_magnitude(tiny_bert()) if base is None else base, copy.deepcopy(CONFIGS[method]))


def trainer(folder, method="pst", callbacks=(), second=False, **changes) -> Trainer:
    model = adapted(method)
    if second:
        model.add_adapter("second", copy.deepcopy(CONFIGS[method]))
    settings = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "steps", "save_steps": 2,
    } | changes  # fmt: skip
    callbacks = [*callbacks, *([SparsityCallback()] if method == "pst" else [])]
    data = Sentences(model.get_base_model())
    return Trainer(model, TrainingArguments(**settings), train_dataset=data, eval_dataset=data, callbacks=callbacks)


def tensors(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module", params=list(CONFIGS))
def saved(request, tmp_path_factory) -> tuple[str, Path]:
    """The method, and a checkpoint in the middle of a run."""
    folder = tmp_path_factory.mktemp("saved")
    trainer(folder, request.param).train()
    return request.param, folder / "checkpoint-2"


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


def pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


class TestTrainer:
    @pytest.mark.parametrize("name", ["_B", "classifier.weight", "pst_pruned"])
    def test_a_flipped_bit(self, saved, checkpoint, tmp_path, name):
        if saved[0] == "spp" and name == "pst_pruned":
            name = "spp_A"  # it has no counts
        flip(checkpoint, name)
        run = trainer(tmp_path / "run", saved[0])
        before = tensors(run.model)
        with pytest.raises(ValueError, match=DAMAGED):
            run.train(resume_from_checkpoint=str(checkpoint))
        assert not run.train_dataset.read and same(before, tensors(run.model))

    def test_an_intact_one_is_resumed(self, saved, checkpoint, tmp_path):
        trainer(tmp_path / "run", saved[0]).train(resume_from_checkpoint=str(checkpoint))
        whole, again = saved[1].with_name("checkpoint-4"), tmp_path / "run" / "checkpoint-4"
        assert (whole / WEIGHTS).read_bytes() == (again / WEIGHTS).read_bytes()

    def test_a_pickle(self, saved, tmp_path):
        shutil.copytree(saved[1], tmp_path / "checkpoint-2")
        pickle(tmp_path / "checkpoint-2")
        assert last_complete_checkpoint(tmp_path) is None
        run = trainer(tmp_path, saved[0])
        with pytest.raises(ValueError, match=PICKLED):
            run.train(resume_from_checkpoint=True)
        assert not run.train_dataset.read

    def test_checkpoint_callback_puts_a_pickle_aside(self, saved, tmp_path):
        shutil.copytree(saved[1], tmp_path / "checkpoint-2")
        pickle(tmp_path / "checkpoint-2")
        trainer(tmp_path, saved[0], [CheckpointCallback()])
        assert (tmp_path / "incomplete-checkpoint-2").is_dir()

    def test_another_adapter_beside_the_trained_one(self, tmp_path):
        trainer(tmp_path, second=True).train()
        flip(tmp_path / "checkpoint-2" / "second", "pst_A")
        run = trainer(tmp_path, second=True)
        with pytest.raises(ValueError, match=f"(?s){DAMAGED}"):
            run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    @pytest.mark.parametrize("damaged", [False, True])
    def test_the_best_model(self, tmp_path, damaged):
        best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.0}
        run = trainer(tmp_path, "spp", [Damage()] * damaged, **best)
        if not damaged:
            run.train()
            assert run.state.best_model_checkpoint.endswith("checkpoint-2")  # nothing is learned: the first is kept
            return
        with pytest.raises(ValueError, match=DAMAGED):
            run.train()


class Damage(TrainerCallback):
    """A bit that flips on the disk while a run goes on."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == args.max_steps:
            flip(Path(args.output_dir) / "checkpoint-2", "_B")


@pytest.fixture(params=list(CONFIGS))
def method(request) -> str:
    return request.param


class TestLoadAdapter:
    """PEFT's, into an adapter that is there."""

    @pytest.mark.parametrize("in_subfolder", [False, True])
    @pytest.mark.parametrize("as_keywords", [False, True])
    def test_damaged_weights(self, method, tmp_path, in_subfolder, as_keywords):
        model = adapted(method)
        folder = tmp_path / "sub" if in_subfolder else tmp_path
        model.save_pretrained(folder)
        where = {"model_id": str(tmp_path), "adapter_name": "default"} if as_keywords else {}
        given = [] if as_keywords else [tmp_path, "default"]
        subfolder = {"subfolder": "sub"} if in_subfolder else {}
        model.load_adapter(*given, **where, **subfolder)
        flip(folder, "_B")
        before = tensors(model)
        with pytest.raises(ValueError, match=DAMAGED):
            model.load_adapter(*given, **where, **subfolder)
        assert same(before, tensors(model))

    @pytest.mark.parametrize("with_config", [True, False])
    def test_a_pickle(self, method, tmp_path, with_config):
        model = adapted(method)
        model.save_pretrained(tmp_path)
        pickle(tmp_path)
        if not with_config:
            (tmp_path / "adapter_config.json").unlink()
        with pytest.raises(ValueError, match=PICKLED):
            model.load_adapter(str(tmp_path), "default")

    def test_what_was_changed_on_purpose(self, method, tmp_path):
        model = adapted(method)
        model.save_pretrained(tmp_path)
        flip(tmp_path, "_B")
        file = tmp_path / "adapter_config.json"
        config = json.loads(file.read_text())
        del config["checksums"]
        file.write_text(json.dumps(config))
        before = tensors(model)
        model.load_adapter(str(tmp_path), "default")
        assert not same(before, tensors(model))

    def test_other_methods_are_left_alone(self, tmp_path):
        """A pickled LoRA adapter is read as ever."""
        model = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"]))
        model.save_pretrained(tmp_path, safe_serialization=False)
        assert (tmp_path / "adapter_model.bin").is_file()
        model.load_adapter(str(tmp_path), "default")
        assert type(PeftConfig.from_pretrained(str(tmp_path))) is LoraConfig


class TestTransformers:
    """Its own `load_adapter`, and `from_pretrained` of an adapter's folder."""

    @pytest.fixture
    def folders(self, method, tmp_path) -> tuple[Path, Path]:
        """A base model's and an adapter's."""
        base = prune_magnitude(tiny_bert())
        base.save_pretrained(tmp_path / "base")
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        adapted(method, loaded).save_pretrained(tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter"

    @pytest.mark.usefixtures("transformers_adapters")
    @pytest.mark.parametrize(
        ("harm", "words"), [(lambda folder: flip(folder, "_B"), DAMAGED), (pickle, PICKLED)], ids=["flipped", "pickle"]
    )
    def test_harm(self, folders, harm, words):
        base, adapter = folders
        model = AutoModelForSequenceClassification.from_pretrained(base)
        model.load_adapter(str(adapter), "intact")
        AutoModelForSequenceClassification.from_pretrained(adapter)
        harm(adapter)
        before = tensors(model)
        with pytest.raises(ValueError, match=words):
            model.load_adapter(str(adapter), "harmed")
        assert same(before, tensors(model))
        with pytest.raises(ValueError, match=words):
            AutoModelForSequenceClassification.from_pretrained(adapter)

    def test_the_config_alone(self, folders):
        config = PeftConfig.from_pretrained(str(folders[1]))
        assert config.checksums is None  # as it is for PstConfig.from_pretrained
        flip(folders[1], "_B")
        with pytest.raises(ValueError, match=DAMAGED):
            PeftConfig.from_pretrained(str(folders[1]))
