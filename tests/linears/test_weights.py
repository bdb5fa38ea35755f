"""A weight is (out, in) however it is stored, and writes reach the parameter."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_sparse.linears import as_stored, get_weight, in_out_features, is_linear, set_weight, unwrap

LINEARS = [lambda: nn.Linear(6, 4), lambda: Conv1D(4, 6)]


@pytest.mark.parametrize("factory", LINEARS, ids=["Linear", "Conv1D"])
def test_out_comes_before_in(factory):
    linear, x = factory(), torch.randn(3, 6)
    assert in_out_features(linear) == (6, 4)
    assert get_weight(linear).shape == (4, 6)
    assert torch.allclose(linear(x), x @ get_weight(linear).T + linear.bias, atol=1e-6)
    assert torch.equal(as_stored(linear, get_weight(linear)), linear.weight)


@pytest.mark.parametrize("factory", LINEARS, ids=["Linear", "Conv1D"])
def test_writing_keeps_the_parameter_and_its_dtype(factory):
    linear, new = factory().to(torch.bfloat16), torch.randn(4, 6)
    parameter, address = linear.weight, linear.weight.data_ptr()
    set_weight(linear, new)
    assert linear.weight is parameter and parameter.data_ptr() == address
    assert torch.equal(get_weight(linear), new.to(torch.bfloat16))
    with torch.no_grad():
        get_weight(linear).masked_fill_(new > 0, 0)
    assert (linear.weight == 0).sum() == (new > 0).sum()


def test_gradients_reach_the_parameter():
    conv = Conv1D(4, 6)
    (get_weight(conv) * torch.arange(6.0)).sum().backward()
    assert torch.equal(conv.weight.grad, torch.arange(6.0)[:, None].expand(6, 4))


def test_what_is_a_linear():
    assert all(is_linear(factory()) for factory in LINEARS)
    attention = nn.MultiheadAttention(4, 2)
    for other in (nn.Embedding(3, 4), nn.LayerNorm(4), nn.Conv1d(2, 2, 1), attention, attention.out_proj):
        assert not is_linear(other)
    quantized = nn.Linear(4, 4)
    quantized.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    assert not is_linear(quantized)


def test_unwrap_goes_through_nested_layers():
    inner = nn.Linear(4, 4)
    middle, outer = nn.Module(), nn.Module()
    middle.base_layer, outer.base_layer = inner, middle
    assert unwrap(outer) is unwrap(inner) is inner
