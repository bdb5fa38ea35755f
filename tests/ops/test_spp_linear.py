"""The fused SPP linear against its plain twin and against the authors' numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from peft_sparse import ops

SCALING = 2.0


def tensors(out, columns, groups, dtype=torch.float32, zeros=0.5):
    weight = torch.randn(out, columns, dtype=dtype)
    weight[torch.rand(out, columns) < zeros] = 0
    factor_dtype = torch.promote_types(dtype, torch.float32)
    A, B = torch.randn(groups, columns, dtype=factor_dtype), torch.randn(out, dtype=factor_dtype)
    return weight, torch.randn(out, dtype=dtype), A.requires_grad_(), B.requires_grad_()


def run(impl, x, weight, bias, A, B, dy):
    inputs = [x.clone().requires_grad_(), A.detach().clone().requires_grad_(), B.detach().clone().requires_grad_()]
    y = impl(inputs[0], weight, bias, *inputs[1:], SCALING)
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


SHAPES = {
    "divisible": (32, 24, 16),
    "odd": (37, 19, 16),
    "one group per row": (7, 5, 7),
    "one group": (9, 4, 1),
    "one row": (1, 3, 1),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("batch", [(6,), (2, 5), (0,)], ids=["2-D", "3-D", "empty"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
def test_fused_equals_reference(shape, batch, dtype, tolerance):
    weight, bias, A, B = tensors(*shape, dtype)
    x, dy = torch.randn(*batch, shape[1], dtype=dtype), torch.randn(*batch, shape[0], dtype=dtype)
    expected = run(ops.reference.spp_linear, x, weight, bias, A, B, dy)
    found = run(ops.spp_linear, x, weight, bias, A, B, dy)
    for name, a, b in zip(("y", "dx", "dA", "dB"), found, expected, strict=True):
        scale = b.abs().max().item() if b.numel() else 1.0
        torch.testing.assert_close(a, b, atol=tolerance * max(scale, 1.0), rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("rows", [1, 3, 8, 16])  # parts of a group, and several groups
def test_blocks_give_the_same(monkeypatch, rows):
    weight, bias, A, B = tensors(37, 19, 5)
    x, dy = torch.randn(4, 19), torch.randn(4, 37)
    whole = run(ops.spp_linear, x, weight, bias, A, B, dy)
    monkeypatch.setattr("peft_sparse.ops.blocks.BLOCK_ELEMENTS", 19 * rows)
    monkeypatch.setattr("peft_sparse.ops.blocks.MIN_ROWS", 1)
    for a, b in zip(run(ops.spp_linear, x, weight, bias, A, B, dy), whole, strict=True):
        torch.testing.assert_close(a, b)


def test_update_alone():
    weight, _, A, B = tensors(10, 6, 3)
    x = torch.randn(4, 6, requires_grad=True)
    y = ops.spp_linear_update(x, weight, A, B, SCALING)
    torch.testing.assert_close(y, ops.reference.spp_linear_update(x, weight, A, B, SCALING))
    torch.testing.assert_close(y, ops.spp_linear(x, weight, None, A, B, SCALING) - x @ weight.T)
    expected = torch.autograd.grad(ops.reference.spp_linear_update(x, weight, A, B, SCALING).square().sum(), (x, A, B))
    for a, b in zip(torch.autograd.grad(y.square().sum(), (x, A, B)), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(6, 4, 3), (7, 5, 3)])
def test_gradcheck(shape):
    weight, bias, A, B = tensors(*shape, torch.float64)
    x = torch.randn(3, shape[1], dtype=torch.float64, requires_grad=True)
    weight.requires_grad_()
    bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: ops.spp_linear(*t, SCALING), (x, weight, bias, A, B))


def test_transposed_weight():
    weight, bias, A, B = tensors(12, 8, 4)
    x = torch.randn(3, 8)
    found = ops.spp_linear(x, weight.T.contiguous().T, bias, A, B, SCALING)
    torch.testing.assert_close(found, ops.spp_linear(x, weight, bias, A, B, SCALING))


def test_autocast():
    weight, bias, A, B = tensors(12, 8, 4)
    x = torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = (impl(x, weight, bias, A, B, SCALING) for impl in (ops.spp_linear, ops.reference.spp_linear))
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    for a, b in zip(
        torch.autograd.grad(y.sum(), (x, A, B)), torch.autograd.grad(expected.sum(), (x, A, B)), strict=True
    ):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=0.1, rtol=0.03)


def test_only_what_needs_a_gradient_gets_one():
    weight, bias, A, B = tensors(12, 8, 4)
    y = ops.spp_linear(torch.randn(3, 8), weight, bias, A.requires_grad_(False), B, SCALING)
    y.sum().backward()
    assert A.grad is None and weight.grad is None and B.grad is not None


def test_output_may_be_edited_in_place_and_layer_used_twice():
    weight, _, A, B = tensors(8, 8, 4)
    x = torch.randn(3, 8)
    hidden = ops.spp_linear(x, weight, None, A, B, SCALING)
    hidden += 1
    ops.spp_linear(hidden, weight, None, A, B, SCALING).sum().backward()
    found, A.grad, B.grad = (A.grad, B.grad), None, None
    hidden = ops.reference.spp_linear(x, weight, None, A, B, SCALING) + 1
    ops.reference.spp_linear(hidden, weight, None, A, B, SCALING).sum().backward()
    torch.testing.assert_close(found, (A.grad, B.grad))


@given(st.integers(0, 40), st.integers(1, 60))
def test_row_groups_are_contiguous_and_as_equal_as_possible(out, groups):
    index = ops.reference.row_groups(out, groups)
    sizes = index.bincount(minlength=groups)
    assert (index.diff() >= 0).all() and sizes.sum() == out
    assert sizes.max() - sizes.min() <= 1


def test_authors_numbers(oracles):
    for case in oracles.cases["spp"]:
        t = {k.removeprefix(case["prefix"]): v for k, v in oracles.tensors.items() if k.startswith(case["prefix"])}
        weight, A, B = t["weight"], t["row_factors"], t["column_factor"]
        y, dx, dA, dB = run(
            lambda x, w, b, A, B, _, s=case["scaling"]: ops.spp_linear(x, w, b, A, B, s),
            t["x"], weight, None, A, B, t["dy"],
        )  # fmt: skip
        merged = ops.reference.spp_weight(weight, A, B, case["scaling"])
        expected = {"y": y, "grad.x": dx, "grad.row_factors": dA, "grad.column_factor": dB, "merged_weight": merged}
        for name, found in expected.items():
            assert (found - t[name]).norm() <= 1e-5 * t[name].norm(), (case["prefix"], name)


def test_saves_nothing_of_the_weights_size():
    weight, bias, A, B = tensors(64, 48, 16)
    x = nn.Parameter(torch.randn(5, 48))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.spp_linear(x, weight, bias, A, B, SCALING)
    own = {t.untyped_storage().data_ptr() for t in (x, weight, A, B)}
    assert all(t.untyped_storage().data_ptr() in own for t in saved)
