"""Trainer's own options together with SparsityCallback: each run ends at the final sparsity, the schedule driven once
for each optimizer step."""

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_sparse import PstConfig, SparsityCallback, SppConfig, prune_magnitude, verify_sparsity
from peft_sparse.tuners.pst import PstLinear

from models import tiny_bert, tiny_llama

OPTIONS = {
    "accumulation": {"gradient_accumulation_steps": 3},
    "clipping": {"max_grad_norm": 0.1},
    "no clipping": {"max_grad_norm": 0.0},
    "checkpointing, reentrant": {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "bf16": {"bf16": True},
    "bf16_full_eval": {"bf16_full_eval": True, "eval_strategy": "steps", "eval_steps": 4},
    "group by length": {"train_sampling_strategy": "group_by_length"},
    "adafactor": {"optim": "adafactor"},
    "sgd": {"optim": "sgd"},
    "fused adamw": {"optim": "adamw_torch_fused"},
    "rmsprop": {"optim": "rmsprop"},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "neftune": {"neftune_noise_alpha": 5.0},
    "eval_on_start": {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 4},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "save_only_model": {"save_strategy": "steps", "save_steps": 4, "save_only_model": True},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    "epochs": {"max_steps": -1, "num_train_epochs": 2},
    "drop last": {
        "max_steps": -1, "num_train_epochs": 2, "dataloader_drop_last": True, "gradient_accumulation_steps": 2,
    },
    "weight decay": {"weight_decay": 0.1},
}  # fmt: skip


class Recorder(TrainerCallback):
    """Weights pruned in each layer that each forward of training sees."""

    def __init__(self):
        self.seen, self.steps = [], 0

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.seen.append([int(layer.pst_pruned["default"]) for layer in pst_layers(model)])

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.steps += 1


def pst_layers(model):
    return [module for module in model.modules() if isinstance(module, PstLinear)]


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 1, "logging_strategy": "no",
        "save_strategy": "no",
    } | changes  # fmt: skip
    return TrainingArguments(**settings)


def rows(count=22, length=8):
    ids = torch.randint(3, 90, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def classes(count=22):
    ids = torch.randint(3, 90, (count, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": int(row[0] > 45)} for row in ids]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_pst_reaches_its_sparsity(options, tmp_path):
    torch.manual_seed(0)
    model, recorder = get_peft_model(tiny_llama(), PstConfig(sparsity=0.75)), Recorder()
    trainer = Trainer(
        model, arguments(tmp_path, **options), train_dataset=rows(), eval_dataset=rows(4),
        callbacks=[SparsityCallback(), recorder],
    )  # fmt: skip
    trainer.train()
    assert recorder.steps == trainer.state.max_steps == len(recorder.seen) == trainer.state.global_step
    for counts in zip(*recorder.seen, strict=True):
        assert list(counts) == sorted(counts) and counts[0] == 0
    for layer in pst_layers(model):
        assert int((~layer.get_mask("default")).sum()) == int(0.75 * layer.base_weight.numel())
        assert all(factor.isfinite().all() for factor in layer.factors("default") if factor is not None)
    merged = model.merge_and_unload()
    for name, parameter in merged.named_parameters():
        if "_proj" in name:
            assert int((parameter == 0).sum()) == int(0.75 * parameter.numel())


@pytest.mark.slow  # the quick suite has SPP in test_trainer.py
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_spp_keeps_its_zeros(options, tmp_path):
    torch.manual_seed(0)
    base = prune_magnitude(tiny_llama(), pattern="2:4")
    reference = prune_magnitude(tiny_llama(), pattern="2:4")
    model = get_peft_model(base, SppConfig(r=4))
    Trainer(model, arguments(tmp_path, **options), train_dataset=rows(), eval_dataset=rows(4)).train()
    assert all(layer.spp_B["default"].abs().sum() > 0 for layer in model.base_model.sparse_layers())
    report = verify_sparsity(model.merge_and_unload(), reference=reference)
    assert report.exit_status == 0 and all(layer.gained == 0 for layer in report.layers)


@pytest.mark.parametrize("best_at_final", [False, True])
@pytest.mark.parametrize("save_only_model", [False, True])
def test_the_best_model_comes_back_with_the_sparsity_it_had(save_only_model, best_at_final, tmp_path):
    """The metric gets worse with every evaluation: the first one allowed wins."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_bert(), PstConfig(task_type="SEQ_CLS", sparsity=0.75))
    scores = iter(range(100, 0, -1))
    trainer = Trainer(
        model,
        arguments(
            tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
            load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
            save_only_model=save_only_model, gradient_accumulation_steps=2, eval_on_start=False,
        ),
        train_dataset=classes(), eval_dataset=classes(4), compute_metrics=lambda _: {"score": float(next(scores))},
        callbacks=[SparsityCallback(best_at_final_sparsity=best_at_final)],
    )  # fmt: skip
    trainer.train()
    step = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    pruned = {int(layer.pst_pruned["default"]) / layer.base_weight.numel() for layer in pst_layers(model)}
    assert step == (6 if best_at_final else 2)
    assert pruned == {0.75} if best_at_final else max(pruned) < 0.75


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_resumed_run_sees_the_same_sparsities(accumulation, tmp_path):
    seen = {}
    for resume in (False, True):
        torch.manual_seed(0)
        recorder, model = Recorder(), get_peft_model(tiny_llama(), PstConfig(sparsity=0.75))
        trainer = Trainer(
            model, arguments(tmp_path, save_strategy="steps", save_steps=3, gradient_accumulation_steps=accumulation),
            train_dataset=rows(), callbacks=[SparsityCallback(), recorder],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        seen[resume] = recorder.seen
    assert seen[True] == seen[False][3:]


def test_a_batch_size_that_is_found_starts_the_schedule_anew(tmp_path):
    """`auto_find_batch_size` runs the training loop again after an error of memory, from step 0 of other steps."""
    torch.manual_seed(0)
    model, recorder = get_peft_model(tiny_llama(), PstConfig(sparsity=0.75)), Recorder()

    class OutOfMemoryOnce(TrainerCallback):
        raised = False

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3 and not self.raised:
                self.raised = True
                raise RuntimeError("CUDA out of memory.")

    trainer = Trainer(
        model, arguments(tmp_path, auto_find_batch_size=True, max_steps=-1, num_train_epochs=2), train_dataset=rows(),
        callbacks=[SparsityCallback(), recorder, OutOfMemoryOnce()],
    )  # fmt: skip
    trainer.train()
    assert recorder.seen[0] == recorder.seen[3] == [0] * 14
    for layer in pst_layers(model):
        assert int((~layer.get_mask("default")).sum()) == int(0.75 * layer.base_weight.numel())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pst", "spp"])
def test_torch_compile(kind, tmp_path):
    """The losses of a compiled run are those of an eager one."""
    losses = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        base = tiny_llama(num_blocks=1)  # each is compiled anew
        base = base if kind == "pst" else prune_magnitude(base, pattern="2:4")
        model = get_peft_model(base, PstConfig(sparsity=0.75) if kind == "pst" else SppConfig(r=4))
        trainer = Trainer(
            model, arguments(tmp_path, torch_compile=compiled, logging_strategy="steps", logging_steps=1, max_steps=4),
            train_dataset=rows(), callbacks=[SparsityCallback()] if kind == "pst" else [],
        )  # fmt: skip
        trainer.train()
        losses[compiled] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[True] == pytest.approx(losses[False], abs=1e-3)
