"""The counts of pruned weights, on the way through the meta device that accelerate takes to shard a model."""

import pytest
import torch
from peft import get_peft_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from peft_sparse import PstConfig
from peft_sparse.tuners.pst import PstLinear

from models import tiny_llama


@pytest.fixture
def model():
    model = get_peft_model(tiny_llama(), PstConfig(sparsity=0.75))
    model.base_model.set_sparsity_step(9, 10)
    return model


def counts(model) -> list[int]:
    return [int(m.pst_pruned["default"]) for m in model.modules() if isinstance(m, PstLinear)]


def test_the_meta_device_does_not_take_them(model):
    expected = counts(model)
    model.to("meta")
    assert counts(model) == expected and min(expected) > 0
    assert all(parameter.is_meta for parameter in model.parameters())


def test_they_are_in_the_state(model):
    names = [name for name in model.state_dict() if "pst_pruned" in name]
    assert len(names) == len(counts(model))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = get_peft_model(tiny_llama(), PstConfig(sparsity=0.75))
    other.load_state_dict(state)
    assert counts(other) == counts(model)
    del state[names[0]]
    with pytest.raises(RuntimeError, match="pst_pruned"):
        other.load_state_dict(state)


def test_they_follow_casts_and_copies(model):
    expected = counts(model)
    assert counts(model.to(torch.bfloat16)) == expected
    layer = next(m for m in model.modules() if isinstance(m, PstLinear))
    assert layer.pst_pruned["default"].dtype == torch.int64


def test_an_average_of_the_weights_has_them(model):
    """With `use_buffers=True`, as Lightning has it by default, it averages the counts: docs/troubles.md says what to
    do."""
    ema = get_ema_multi_avg_fn(0.9)
    averages = [AveragedModel(model, multi_avg_fn=ema, use_buffers=use_buffers) for use_buffers in (False, True)]
    model.base_model.set_sparsity_step(0, 10)
    for step in range(4):
        model.base_model.set_sparsity_step(step * 3 + 1, 10)
        for average in averages:
            average.update_parameters(model)
    plain, with_buffers = (average.module for average in averages)
    assert counts(plain) == counts(model) != counts(with_buffers)
    with_buffers.base_model.set_sparsity_step(1, 1)
    assert counts(with_buffers) == counts(model)
