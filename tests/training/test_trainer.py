"""PST and SPP through an unchanged transformers Trainer: schedule, accumulation, resume, best model."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from peft_sparse import PstConfig, SparsityCallback, SppConfig, pst_param_groups
from peft_sparse.pruning import prune_magnitude
from peft_sparse.sparsity import sparsity_at
from peft_sparse.tuners.pst import PstLinear

from models import tiny_bert, tiny_llama


class Sentences(Dataset):
    """Random token ids; the label is a function of the first one."""

    def __init__(self, size: int = 48):
        self.ids = torch.randint(3, 90, (size, 8), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.ids[index], "labels": (self.ids[index, 0] > 45).long()}


CONFIGS = {
    "pst": lambda: PstConfig(task_type="SEQ_CLS", sparsity=0.75),
    "pst 2:4": lambda: PstConfig(task_type="SEQ_CLS", pattern="2:4"),
    "movement": lambda: PstConfig(task_type="SEQ_CLS", sparsity=0.75, importance="movement", weight_update="full"),
    "magnitude": lambda: PstConfig(task_type="SEQ_CLS", sparsity=0.75, importance="magnitude", weight_update="full"),
}


def arguments(folder, **changes) -> TrainingArguments:
    settings = {
        "output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 1, "logging_strategy": "no",
        "save_strategy": "steps", "save_steps": 4, "dataloader_num_workers": 0,
    } | changes  # fmt: skip
    return TrainingArguments(**settings)


def trainer(folder, config, callbacks=(), **changes) -> Trainer:
    torch.manual_seed(0)
    model = get_peft_model(tiny_bert(), config())
    callbacks = [SparsityCallback(), *callbacks]
    return Trainer(
        model, arguments(folder, **changes), train_dataset=Sentences(), eval_dataset=Sentences(), callbacks=callbacks
    )


def pst_layers(model) -> list[PstLinear]:
    return [module for module in model.modules() if isinstance(module, PstLinear)]


def state_of(model) -> dict:
    return {name: tensor for name, tensor in model.state_dict().items() if "pst_" in name or "modules_to_save" in name}


def assert_same_state(found, expected) -> None:
    assert state_of(found).keys() == state_of(expected).keys()
    for name, tensor in state_of(expected).items():
        torch.testing.assert_close(state_of(found)[name], tensor, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    for layer, other in zip(pst_layers(found), pst_layers(expected), strict=True):
        assert torch.equal(layer.get_mask("default"), other.get_mask("default"))


class Recorder(TrainerCallback):
    """Pruned weights of the first layer, as the forward of each optimizer step sees them."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.seen.append(int(pst_layers(model)[0].pst_pruned["default"]))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_schedule_steps_once_per_optimizer_step(tmp_path, accumulation):
    recorder = Recorder()
    run = trainer(
        tmp_path,
        CONFIGS["pst"],
        [recorder],
        gradient_accumulation_steps=accumulation,
        save_strategy="no",
        max_steps=10,
    )
    run.train()
    numel = pst_layers(run.model)[0].base_weight.numel()
    expected = [int(numel * sparsity_at("cubic", step, 10, 0.0, 0.75)) for step in range(11)]
    assert recorder.seen == expected[:10]
    for layer in pst_layers(run.model):
        assert (~layer.get_mask("default")).sum() == int(0.75 * layer.base_weight.numel())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_resume_equals_the_uninterrupted_run(tmp_path, config):
    whole = trainer(tmp_path / "whole", config)
    whole.train()
    resumed = trainer(tmp_path / "resumed", config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same_state(resumed.model, whole.model)
    assert resumed.state.global_step == 8


@pytest.mark.parametrize("best", [4, 8])
def test_load_best_model_at_end(tmp_path, best):
    """The mask of the best checkpoint comes back with its parameters."""
    steps = []

    def metrics(prediction):
        steps.append(len(steps) * 4 + 4)
        return {"score": float(steps[-1] == best)}

    run = trainer(
        tmp_path, CONFIGS["pst"], eval_strategy="steps", eval_steps=4, load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    run.compute_metrics = metrics
    run.train()
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    saved = PeftModel.from_pretrained(tiny_bert(), tmp_path / f"checkpoint-{best}")
    assert_same_state(run.model, saved)
    at_the_end = {
        int(layer.pst_pruned["default"]) == int(0.75 * layer.base_weight.numel()) for layer in pst_layers(saved)
    }
    assert at_the_end == {best == 8}


@pytest.mark.parametrize("stopping", [[], [EarlyStoppingCallback(1)]], ids=["to the end", "stopped early"])
def test_best_at_final_sparsity_forgets_earlier_metrics(tmp_path, stopping):
    run = trainer(
        tmp_path, CONFIGS["pst"], eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    run.remove_callback(SparsityCallback)
    for callback in (SparsityCallback(best_at_final_sparsity=True), *stopping):
        run.add_callback(callback)
    scores = iter([4.0, 3.0, 2.0, 1.0])
    run.compute_metrics = lambda prediction: {"score": next(scores)}
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-6")
    for layer in pst_layers(run.model):
        assert int(layer.pst_pruned["default"]) == int(0.75 * layer.base_weight.numel())


def test_total_steps_of_the_config_wins(tmp_path):
    recorder = Recorder()
    config = lambda: PstConfig(task_type="SEQ_CLS", sparsity=0.75, total_steps=4)  # noqa: E731
    trainer(tmp_path, config, [recorder], save_strategy="no").train()
    final = max(recorder.seen)
    assert recorder.seen[4:] == [final] * 4 and recorder.seen[1] < final


def test_scores_have_their_own_learning_rate(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_bert(), CONFIGS["movement"]())
    optimizer = torch.optim.AdamW(pst_param_groups(model, lr=3e-5, score_lr=1e-2, weight_decay=0.1))
    run = Trainer(
        model, arguments(tmp_path, save_strategy="no", lr_scheduler_type="constant"), train_dataset=Sentences(),
        optimizers=(optimizer, None), callbacks=[SparsityCallback()],
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    run.train()
    moved = {
        name: (p.detach() - before[name]).abs().max().item() for name, p in model.named_parameters() if name in before
    }
    assert min(v for n, v in moved.items() if "pst_S" in n) > 10 * max(v for n, v in moved.items() if "pst_S" not in n)
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == {
        "scores": 1e-2, "weights": 3e-5, "others": 3e-5, "others_without_decay": 3e-5,
    }  # fmt: skip


def test_each_rate_is_logged_by_its_name(tmp_path):
    """Trainer logs the rate of the first group, which are the scores."""
    model = get_peft_model(tiny_bert(), PstConfig(task_type="SEQ_CLS"))
    optimizer = torch.optim.AdamW(pst_param_groups(model, lr=4e-5, score_lr=8e-2, head_lr=2e-3))
    run = Trainer(
        model, arguments(tmp_path, save_strategy="no", logging_strategy="steps", logging_steps=1),
        train_dataset=Sentences(), optimizers=(optimizer, None), callbacks=[SparsityCallback()],
    )  # fmt: skip
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(entries) == run.state.max_steps
    for entry in entries:
        left = 1 - (entry["step"] - 1) / len(entries)  # linear decay, as used by the step
        assert entry["learning_rate"] == pytest.approx(4e-5 * left)
        assert entry["score_learning_rate"] == pytest.approx(8e-2 * left)
        assert entry["head_learning_rate"] == pytest.approx(2e-3 * left)


def test_the_rate_of_movements_scores_makes_no_difference():
    """They start at zero, Adam's steps are in proportion to the rate, and the mask takes only their order."""

    def losses(score_lr: float) -> list[float]:
        torch.manual_seed(0)
        model = get_peft_model(tiny_bert(), CONFIGS["movement"]())
        optimizer = torch.optim.AdamW(pst_param_groups(model, lr=1e-3, score_lr=score_lr))
        batch = default_data_collator([Sentences()[index] for index in range(8)])
        found = []
        for step in range(8):
            model.base_model.set_sparsity_step(step, 8)
            found.append(model(**batch).loss)
            found[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        return [loss.item() for loss in found]

    low, high = losses(2.0**-12), losses(2.0**-4)  # powers of two: not even rounding differs
    assert low == high and len(set(low)) == len(low)


def test_every_trainable_parameter_is_in_one_group():
    for config in CONFIGS.values():
        model = get_peft_model(tiny_bert(), config())
        groups = pst_param_groups(model, lr=1.0, score_lr=2.0)
        grouped = [id(p) for group in groups for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
        rates = {g["name"]: g["lr"] for g in pst_param_groups(model, lr=1.0, score_lr=2.0, head_lr=3.0)}
        assert {name: rate for name, rate in rates.items() if "others" in name} == {
            "others": 3.0, "others_without_decay": 3.0,
        }  # fmt: skip
        assert rates.get("weights", 1.0) == 1.0 and rates.get("scores", 2.0) == 2.0
    with pytest.raises(ValueError, match="get_peft_model"):
        pst_param_groups(tiny_bert(), lr=1.0, score_lr=1.0)
    with pytest.raises(ValueError, match="trains nothing else; leave it out"):
        pst_param_groups(get_peft_model(tiny_bert(), PstConfig()), lr=1.0, score_lr=1.0, head_lr=1.0)


def test_callback_without_pst_layers_is_told_so(tmp_path):
    run = Trainer(tiny_bert(), arguments(tmp_path), train_dataset=Sentences(), callbacks=[SparsityCallback()])
    with pytest.raises(ValueError, match=r"get_peft_model\(model, PstConfig"):
        run.train()


@pytest.mark.usefixtures("transformers_adapters")
def test_callback_drives_an_adapter_of_transformers_own_api(tmp_path):
    model = tiny_bert()
    model.add_adapter(PstConfig(sparsity=0.75))
    Trainer(
        model, arguments(tmp_path, save_strategy="no"), train_dataset=Sentences(), callbacks=[SparsityCallback()]
    ).train()
    for layer in pst_layers(model):
        assert (~layer.get_mask("default")).sum() == int(0.75 * layer.base_weight.numel())


def test_spp_resume_and_zeros(tmp_path):
    def make(folder):
        torch.manual_seed(0)
        base = prune_magnitude(tiny_llama(), pattern="2:4")
        model = get_peft_model(base, SppConfig(spp_dropout=0.1))
        data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in Sentences()]
        return Trainer(model, arguments(folder), train_dataset=data)

    whole, resumed = make(tmp_path / "whole"), make(tmp_path / "resumed")
    zeros = {n: p == 0 for n, p in whole.model.named_parameters() if "base_layer" in n}
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    expected = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=0)
    merged = dict(whole.model.merge_and_unload().named_parameters())
    assert zeros
    for name, zero in zeros.items():
        key = name.removeprefix("base_model.model.").replace("base_layer.", "")
        assert torch.equal(merged[key] == 0, zero) and zero.float().mean() == 0.5


def test_callback_with_adapters_on_different_modules(tmp_path):
    """A layer is driven for the adapters that it has, each over its own number of steps."""
    model = get_peft_model(tiny_bert(), PstConfig(target_modules=["query"], sparsity=0.75), adapter_name="a")
    model.add_adapter("b", PstConfig(target_modules=["value"], sparsity=0.5, total_steps=4))
    model.base_model.set_adapter(["a", "b"])
    callback = SparsityCallback(best_at_final_sparsity=True)
    Trainer(model, arguments(tmp_path, save_strategy="no"), train_dataset=Sentences(), callbacks=[callback]).train()
    found = {name: int(count) for layer in pst_layers(model) for name, count in layer.pst_pruned.items()}
    assert found == {"a": int(0.75 * 32 * 32), "b": int(0.5 * 32 * 32)}
