"""Memory levers: gradient checkpointing of both kinds and activations kept elsewhere change no number."""

import pytest
import torch
from peft import get_peft_model
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from transformers import Trainer, TrainingArguments

from peft_sparse import PstConfig, SparsityCallback, SppConfig, pack_model, prune_magnitude

from models import tiny_bert, tiny_gpt2, tiny_llama

IDS = torch.arange(24).view(2, 12) * 3 + 5
CONFIGS = {
    "spp": lambda: SppConfig(r=4, init_weights=False),
    "spp dropout": lambda: SppConfig(r=4, init_weights=False, spp_dropout=0.3),
    "pst": lambda: PstConfig(sparsity=0.5, init_weights=False, schedule="constant", initial_warmup=0.0),
    "pst movement": lambda: PstConfig(
        sparsity=0.5, importance="movement", weight_update="full", init_weights=False, schedule="constant",
        initial_warmup=0.0,
    ),
}  # fmt: skip
BUILDS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert}


def make(config, build=tiny_llama, packed=False):
    torch.manual_seed(0)
    base = build()
    if "spp" in config:
        base = prune_magnitude(base, pattern="2:4")
    model = get_peft_model(pack_model(base) if packed else base, CONFIGS[config]()).train()
    if hasattr(model.base_model, "set_sparsity_step"):
        model.base_model.set_sparsity_step(10, 10)
    return model


def gradients(model, context=None):
    torch.manual_seed(5)  # of dropout
    labels = torch.tensor([0, 1]) if "Bert" in type(model.get_base_model()).__name__ else IDS
    with context or torch.enable_grad():
        loss = model(input_ids=IDS, labels=labels).loss
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same(found, expected):
    assert found.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize("config", CONFIGS)
def test_gradient_checkpointing(config, build, reentrant):
    model, plain = make(config, build), make(config, build)
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        base.enable_input_require_grads()  # as Trainer does: else nothing before the first block asks for a gradient
    assert_same(gradients(model), gradients(plain))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_a_packed_base(reentrant):
    model = make("spp", packed=True)
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.get_base_model().enable_input_require_grads()
    assert_same(gradients(model), gradients(make("spp", packed=True)))


@pytest.mark.parametrize("config", CONFIGS)
def test_activations_saved_elsewhere(config):
    assert_same(gradients(make(config), save_on_cpu()), gradients(make(config)))


@pytest.mark.parametrize("config", CONFIGS)
def test_what_saved_tensors_hooks_see_is_activations_and_what_is_there_anyway(config):
    """Hooks that move tensors get one copy of each input; no effective weight is among what they see."""
    model, seen = make(config), []
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(tensor):
        seen.append(tensor)
        return tensor.detach().clone().half().float() if tensor.is_floating_point() else tensor

    gradients(model, saved_tensors_hooks(pack, lambda tensor: tensor))
    foreign = [t for t in seen if t.data_ptr() not in own and t.is_floating_point()]
    shapes = {tuple(p.shape) for n, p in model.named_parameters() if n.endswith("base_layer.weight")}
    assert foreign and not {tuple(t.shape) for t in foreign} & shapes


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("config", ["spp dropout", "pst"])
def test_trainer_with_gradient_checkpointing(config, reentrant, tmp_path):
    states = []
    for checkpointing in (True, False):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="no", seed=1, gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant} if checkpointing else None,
        )  # fmt: skip
        rows = torch.randint(3, 90, (16, 8), generator=torch.Generator().manual_seed(0))
        trainer = Trainer(
            make(config), arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            callbacks=[SparsityCallback()] if config == "pst" else [],
        )  # fmt: skip
        trainer.train()
        states.append({n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad})
    assert_same(*states)
