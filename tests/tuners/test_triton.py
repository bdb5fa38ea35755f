"""Whole models under `ops.use_triton`: the tuners give the same with the kernels. See tests/ops/conftest.py for where
these tests run."""

import os

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_sparse import PstConfig, SppConfig, ops
from peft_sparse.pruning import prune_magnitude

from models import tiny_gpt2, tiny_llama

pytest.importorskip("triton", reason="triton is not installed; `make test-triton` installs it")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU; `make test-triton` runs this file under the interpreter", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED else "cuda"
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}  # nn.Linear and Conv1D, whose weight is stored as (in, out)
CONFIGS = {
    "spp": lambda: SppConfig(r=5, init_weights=False),
    "spp, dropout": lambda: SppConfig(r=5, spp_dropout=0.3, init_weights=False),
    "pst": lambda: PstConfig(schedule="constant", sparsity=0.5, init_weights=False),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture
def launches(monkeypatch):
    """How often a kernel's entrance was called."""
    from peft_sparse.ops import triton_pst, triton_spp

    seen = []
    for module in (triton_spp, triton_pst):
        for name in ("forward", "gradients"):
            original = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, f=original, n=name, **k: seen.append(n) or f(*a, **k))
    return seen


def adapted(build, config) -> nn.Module:
    torch.manual_seed(0)
    model = build()
    if isinstance(config(), SppConfig):
        prune_magnitude(model, sparsity=0.5)
    return get_peft_model(model, config()).to(DEVICE).train()


def loss_and_grads(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    tokens = torch.arange(3, 33, device=DEVICE).reshape(2, 15)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return loss.detach(), grads


# Of a norm. Random factors amplify rounding from layer to layer: PyTorch's own gradients of these models are up to
# 1e-4 from those in float64, the kernels' up to 1.5e-4.
TOLERANCE = 5e-4


def compare(found, expected) -> None:
    torch.testing.assert_close(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert (found[1][name] - grad).norm() <= TOLERANCE * grad.norm(), name


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@each_config
def test_same_loss_and_gradients(build, config, launches):
    model = adapted(build, config)
    expected = loss_and_grads(model)
    assert launches == []
    with ops.use_triton():
        found = loss_and_grads(model)
    assert {"forward", "gradients"} == set(launches)
    compare(found, expected)


@each_config
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(config, reentrant, launches):
    model = adapted(tiny_llama, config)
    expected = loss_and_grads(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with ops.use_triton():
        found = loss_and_grads(model)
    assert launches.count("forward") > launches.count("gradients")  # once more in the backward
    compare(found, expected)


@each_config
def test_merged_model_computes_what_the_kernels_did(config, launches):
    model = adapted(tiny_llama, config).eval()
    tokens = torch.arange(3, 33, device=DEVICE).reshape(2, 15)
    with torch.no_grad(), ops.use_triton():
        tuned = model(input_ids=tokens).logits
        merged = model.merge_and_unload()(input_ids=tokens).logits
    assert launches
    torch.testing.assert_close(merged, tuned, atol=1e-5, rtol=1e-4)
