"""A small training, to be started by `accelerate launch` or `torchrun` as users start theirs, or by python alone.

    PYTHONPATH=tests python tests/training/train_script.py '[{"tuner": "pst", "output_dir": "out"}]'

For each of the settings it trains a tiny random model with an unchanged Trainer and leaves in `output_dir` what a test
may want to compare: `rank-0.json`, `rank-1.json`, ... (losses, the masks that the forwards used, where the schedule
was) and the adapter.
"""

import hashlib
import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from peft_sparse import (
    CheckpointCallback,
    DistillationCallback,
    PstConfig,
    SparsityCallback,
    SppConfig,
    last_complete_checkpoint,
    sparsity_report,
)
from peft_sparse.linears import is_share, whole_parameter
from peft_sparse.pruning import prune_magnitude
from peft_sparse.tuners.pst import PstLinear

import models
from killing import KillInStep, kill_at_file

CONFIGS = {
    "pst": lambda **kw: PstConfig(sparsity=0.75, **kw),
    "pst-2:4": lambda **kw: PstConfig(pattern="2:4", **kw),
    "pst-4:8": lambda **kw: PstConfig(pattern="4:8", **kw),
    "movement": lambda **kw: PstConfig(sparsity=0.75, importance="movement", weight_update="full", **kw),
    "magnitude": lambda **kw: PstConfig(sparsity=0.75, importance="magnitude", weight_update="full", **kw),
    "spp": lambda **kw: SppConfig(**kw),
    "spp-dropout": lambda **kw: SppConfig(spp_dropout=0.1, **kw),
    "lora": lambda **kw: LoraConfig(**kw),
}


class Sentences(Dataset):
    """Random token ids; the label is a function of the first one, or the ids themselves for a language model.

    `read` has which ones this process was given; with `order`, the rows of another run's epochs, it is given those.
    """

    def __init__(self, model, size: int = 48, seed: int = 0, order: list[list[int]] | None = None):
        self.ids = torch.randint(3, 90, (size, 8), generator=torch.Generator().manual_seed(seed))
        self.is_classifier = hasattr(model, "classifier")
        self.read: list[int] = []
        self.order = order and [row for epoch in order for row in epoch]
        self.length = len(order[0]) if order else size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        self.read.append(index if self.order is None else self.order[len(self.read)])
        ids = self.ids[self.read[-1]]
        return {"input_ids": ids, "labels": (ids[0] > 45).long() if self.is_classifier else ids}


class Recorder(TrainerCallback):
    """Digests of the masks that the forwards of each step used, and the counts, by step."""

    def __init__(self, model):
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, PstLinear)}
        self.masks: dict[int, dict[str, str]] = {}
        self.counts: dict[int, list[int]] = {}

    def on_step_end(self, args, state, control, **kwargs):
        self.masks[state.global_step] = {
            f"{name}.{adapter}": digest(layer._masks[adapter]._kept[0])
            for name, layer in self.layers.items()
            for adapter in layer._masks
        }
        self.counts[state.global_step] = [int(layer.pst_pruned["default"]) for layer in self.layers.values()]


@contextmanager
def dtypes_of_selections() -> Iterator[set[tuple[str, str]]]:
    """Of the weights that a forward had, and of the scores that its mask was selected from."""
    module = importlib.import_module("peft_sparse.ops.pst_mask")
    scores_of, found = module._scores, set()

    def scores(weight, factors, scales):
        result = scores_of(weight, factors, scales)
        found.add((str(weight.dtype), str(result.dtype)))
        return result

    module._scores = scores
    try:
        yield found
    finally:
        module._scores = scores_of


def make_model(settings: dict):
    """The model, pruned where the tuner wants it to be, and the config of an adapter for it."""
    is_classifier = settings["model"] == "tiny_bert"
    if settings["path"] is None:
        model = getattr(models, settings["model"])(settings["seed"])
        if settings["tuner"].startswith("spp"):
            prune_magnitude(model, pattern="2:4")
        model = model.to(getattr(torch, settings["dtype"]))
    else:
        auto = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
        model = auto.from_pretrained(settings["path"], dtype=getattr(torch, settings["dtype"]))
    if is_classifier:
        model.accepts_loss_kwargs = False  # its loss is a mean, see docs/distributed.md
    torch.manual_seed(settings["seed"])
    task = {"task_type": "SEQ_CLS"} if is_classifier else {}
    return model, CONFIGS[settings["tuner"]](**task, **settings["config"])


def save_model(folder: Path, **settings) -> None:
    """Leave the model of these settings in a folder, for `path`."""
    make_model(DEFAULTS | settings)[0].save_pretrained(folder)


def wants(engine: str) -> bool:
    """Whether `accelerate launch` was asked for "FSDP" or "DEEPSPEED"."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false") == "true"


def make_arguments(settings: dict) -> TrainingArguments:
    """With them the processes find each other, so they come before the model."""
    if settings["late"] is not None and started_again() and settings["late"]["rank"] == int(os.environ["RANK"]):
        time.sleep(settings["late"]["seconds"])
    # DeepSpeed is left out where `use_cpu` is asked for, and without it gloo has to be.
    device = {"ddp_backend": "gloo"} if wants("DEEPSPEED") else {"use_cpu": True}
    arguments = TrainingArguments(
        output_dir=settings["output_dir"], max_steps=settings["steps"], learning_rate=1e-2, report_to=[], seed=1,
        per_device_train_batch_size=settings["batch_size"], disable_tqdm=True, logging_steps=1,
        **device, **settings["arguments"],
    )  # fmt: skip
    assert arguments.device.type == "cpu"
    if wants("FSDP"):
        # accelerate shards on accelerators only, and would train with DDP here without a word. Told that these
        # processes are GPUs, it does with gloo and CPU memory all that it does with nccl.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if wants("DEEPSPEED"):
        # ZeRO-3 keeps parameters whole that are as small as all of these are
        zero = arguments.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0
    return arguments


def started_again() -> bool:
    """Whether this process is there because `accelerate launch --max_restarts` saw one die."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def kill_callbacks(kill: dict | None) -> list[TrainerCallback]:
    """Have a process die as `kill` says: which "rank", at its "file" or in its "step" number n, and with "everyone"
    all others with it. Once: not when it was started again."""
    if kill is None or started_again() or kill["rank"] != int(os.environ["RANK"]):
        return []
    everyone = kill.get("everyone", False)
    if "step" in kill:
        return [KillInStep(kill["step"], everyone)]
    kill_at_file(kill["file"], everyone)
    return []


def make_teacher(settings: dict):
    """None if the model teaches itself; else one that is made here, or one from a folder, which ZeRO-3 shards."""
    if settings["teacher"] == "itself":
        return None
    if settings["teacher"] == "dense":
        return getattr(models, settings["model"])(settings["seed"])
    return AutoModelForCausalLM.from_pretrained(settings["teacher"])


def make_trainer(settings: dict, callbacks=()) -> Trainer:
    arguments = make_arguments(settings)
    base, config = make_model(settings)
    model = get_peft_model(base, config)
    if settings["second"] is not None:
        model.add_adapter("second", CONFIGS[settings["second"]](**settings["config"]))
        model.base_model.set_adapter(["default", "second"])
    callbacks = [Recorder(model), *callbacks, *kill_callbacks(settings["kill"])]
    if "pst" in settings["tuner"] or settings["tuner"] in ("movement", "magnitude"):
        callbacks.append(SparsityCallback())
    if settings["teacher"] is not None:
        callbacks.append(DistillationCallback(make_teacher(settings), temperature=2.0))
    data = Sentences(base, settings["size"], order=settings["order"])
    other = Sentences(base, settings["size"])
    return Trainer(model, arguments, train_dataset=data, eval_dataset=other, callbacks=callbacks)


DEFAULTS = {
    "tuner": "pst", "model": "tiny_llama", "dtype": "float32", "seed": 0, "steps": 6, "batch_size": 2, "resume": None,
    "arguments": {"save_strategy": "no"}, "merge": False, "path": None, "config": {}, "second": None, "size": 48,
    "kill": None, "late": None, "order": None, "teacher": None,
}  # fmt: skip


def train(settings: dict, callbacks=()) -> Trainer:
    """One training, from its settings to the adapter in `output_dir`/final."""
    settings = DEFAULTS | settings
    if settings["resume"] == "last":
        callbacks = [CheckpointCallback(), *callbacks]
    output = Path(settings["output_dir"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(settings, callbacks)
        plugin = trainer.accelerator.state.fsdp_plugin if wants("FSDP") else None
        resume = settings["resume"]
        if resume == "last":
            resume = last_complete_checkpoint(settings["output_dir"])
        with dtypes_of_selections() as dtypes:
            trainer.train(resume_from_checkpoint=resume)
    recorder = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Recorder))
    report = {
        "losses": {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row},
        "masks": recorder.masks,
        "counts": recorder.counts,
        "final_masks": {name: digest(layer.get_mask("default")) for name, layer in recorder.layers.items()},
        "read": trainer.train_dataset.read,
        "dtypes": sorted(dtypes),
        "engine": str(trainer.accelerator.distributed_type),
        "shares": sum(is_share(parameter) for parameter in trainer.model.parameters()),
        "warnings": [str(w.message) for w in caught if "peft_sparse" in str(w.filename)],
    }
    if plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")  # else `save_model` saves nothing
    trainer.save_model(str(output / "final"))
    if settings["merge"]:
        trainer.evaluate()  # FSDP2 keeps the outermost unit's weights after a forward
        report["sparsity"] = sparsity_report(trainer.model).total_sparsity
        report |= merge_and_unmerge(trainer.model)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"rank-{trainer.args.process_index}.json").write_text(json.dumps(report))
    return trainer


def base_digests(model) -> dict[str, str]:
    """Digests of all base weights that are whole in every process, by their name without adapters."""
    return {
        name.removeprefix("base_model.model.").replace("base_layer.", ""): digest(whole_parameter(parameter))
        for name, parameter in model.named_parameters()
        if "base_layer.weight" in name
    }


def digest(tensor: torch.Tensor) -> str:
    # a copy: memory that numpy has seen cannot be resized, as FSDP2 does with a whole weight
    return hashlib.sha256(tensor.detach().clone().numpy().tobytes()).hexdigest()[:16]


def merge_and_unmerge(model) -> dict:
    """Merge where the weights are shares, and take it back."""
    before = base_digests(model)
    model.merge_adapter()
    merged = base_digests(model)
    model.unmerge_adapter()
    return {"merged": merged, "restored": base_digests(model) == before}


def do_not_compile() -> None:
    """DeepSpeed would compile its own all-reduce for CPUs, which takes minutes, where it finds a compiler."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main(runs: list[dict]) -> None:
    torch.set_num_threads(1)
    if wants("DEEPSPEED"):
        do_not_compile()
    for settings in runs:
        train(settings)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End the process, without what an interpreter does at its end.

    A thread of gloo that lets go of its last message then waits for the GIL, is ended instead, and takes the process
    with it: "terminate called without an active exception", after all was written. With DDP destroying the process
    group first ends those threads; with FSDP2 the meshes in torch's caches keep the group.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    leave(0)
