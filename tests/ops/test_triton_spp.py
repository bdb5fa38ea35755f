"""SPP's Triton kernels against the plain twin of the op, on a GPU or under the interpreter: see conftest.py."""

import os

import pytest
import torch
from torch import nn

from peft_sparse import ops
from peft_sparse.sparsity import PackedWeight

pytest.importorskip("triton", reason="triton is not installed; `make test-triton` installs it")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("no GPU; test_triton_interpreted.py runs this file under the interpreter", allow_module_level=True)

SCALING = 2.0
SHAPES = {  # out, in, groups: contiguous, as equal as possible, so that most end inside of a tile
    "several tiles": (70, 37, 16),
    "uneven groups": (37, 40, 5),
    "one group": (33, 17, 1),
    "one group per row": (19, 18, 19),
    "more groups than rows": (5, 20, 9),
    "groups of whole tiles": (64, 32, 4),
    "one weight": (1, 1, 1),
}
# float32 on a GPU is not rounded to tf32 (that is PyTorch's default too). The interpreter cuts bfloat16 off instead of
# rounding it, and the twin rounds G, which the kernels do not.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def tensors(out, columns, groups, device, dtype=torch.float32):
    weight = torch.randn(out, columns) * (torch.rand(out, columns) < 0.5)
    A, B = torch.randn(groups, columns), torch.randn(out)
    return weight.to(device, dtype), torch.randn(out).to(device, dtype), A.to(device), B.to(device)


def run(impl, x, weight, bias, A, B, dy):
    inputs = [t.detach().clone().requires_grad_() for t in (x, A, B)]
    y = impl(inputs[0], weight, bias, *inputs[1:], SCALING)
    return {"y": y.detach()} | dict(zip(("x", "A", "B"), torch.autograd.grad(y, inputs, dy), strict=True))


def compare(found, expected, tolerance):
    for name, value in expected.items():
        atol = tolerance * max(value.abs().max().item() if value.numel() else 0.0, 1.0)
        torch.testing.assert_close(found[name], value, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def calls(monkeypatch):
    """The names of the kernels' entrances, as they are called."""
    from peft_sparse.ops import triton_spp

    seen = []
    for name in ("forward", "gradients"):
        original = getattr(triton_spp, name)
        monkeypatch.setattr(triton_spp, name, lambda *a, n=name, f=original, **k: seen.append(n) or f(*a, **k))
    return seen


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("batch", [(18,), (2, 5)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_reference(use_triton, calls, shape, batch, dtype):
    weight, bias, A, B = tensors(*shape, use_triton, dtype)
    x, dy = (torch.randn(*batch, n).to(use_triton, dtype) for n in (shape[1], shape[0]))
    expected = run(ops.reference.spp_linear, x, weight, bias, A, B, dy)
    assert calls == []
    compare(run(ops.spp_linear, x, weight, bias, A, B, dy), expected, TOLERANCE[dtype])
    assert calls == ["forward", "gradients"]


@pytest.mark.parametrize("shape", [(70, 37, 16), (37, 40, 5)], ids=str)
def test_a_packed_weight(use_triton, calls, shape):
    weight, bias, A, B = tensors(*shape, use_triton)
    packed = PackedWeight.of(weight)
    packed = packed._replace(starts=packed.starts.to(use_triton))
    x, dy = (torch.randn(9, n).to(use_triton) for n in (shape[1], shape[0]))
    expected = run(ops.reference.spp_linear, x, weight, bias, A, B, dy)
    compare(run(ops.spp_linear, x, packed, bias, A, B, dy), expected, 1e-5)
    assert calls == ["forward", "gradients"]


def test_update_alone(use_triton, calls):
    weight, _, A, B = tensors(37, 19, 4, use_triton)
    x, dy = torch.randn(4, 19).to(use_triton), torch.randn(4, 37).to(use_triton)

    def without_bias(impl):
        return lambda x, weight, _, A, B, scaling: impl(x, weight, A, B, scaling)

    expected = run(without_bias(ops.reference.spp_linear_update), x, weight, None, A, B, dy)
    compare(run(without_bias(ops.spp_linear_update), x, weight, None, A, B, dy), expected, 1e-5)
    assert len(calls) == 2


def test_any_strides(use_triton):
    """A weight stored as (in, out), an input that is a part of another, a gradient that is one number expanded."""
    weight, bias, A, B = tensors(37, 19, 4, use_triton)
    x, dy = torch.randn(5, 2, 40).to(use_triton)[:, :, 1:39:2], torch.ones((), device=use_triton).expand(5, 2, 37)
    A, B = A.T.contiguous().T, torch.stack([B, B], 1)[:, 1]
    expected = run(ops.reference.spp_linear, x, weight, bias, A, B, dy)
    compare(run(ops.spp_linear, x, weight.T.contiguous().T, bias, A, B, dy), expected, 1e-5)


def test_half_precision_factors(use_triton, calls):
    weight, bias, A, B = tensors(20, 18, 3, use_triton, torch.bfloat16)
    A, B = A.bfloat16(), B.bfloat16()
    x, dy = torch.randn(6, 18).to(use_triton, torch.bfloat16), torch.randn(6, 20).to(use_triton, torch.bfloat16)
    found, expected = (run(impl.spp_linear, x, weight, bias, A, B, dy) for impl in (ops, ops.reference))
    assert found["A"].dtype == found["B"].dtype == torch.bfloat16
    compare(found, expected, 3e-2)
    assert len(calls) == 2


def test_autocast(use_triton, calls):
    weight, bias, A, B = tensors(20, 18, 3, use_triton)
    x, dy = torch.randn(6, 18).to(use_triton), torch.randn(6, 20).to(use_triton, torch.bfloat16)
    with torch.autocast(use_triton.type, torch.bfloat16):
        found, expected = (run(impl.spp_linear, x, weight, bias, A, B, dy) for impl in (ops, ops.reference))
    assert found["y"].dtype == torch.bfloat16 and found["A"].dtype == torch.float32
    compare(found, expected, 5e-2)
    assert len(calls) == 2


def test_zeros_of_the_weight_add_nothing(use_triton):
    weight, _, A, B = tensors(20, 18, 3, use_triton)
    weight[4], weight[:, 7] = 0, 0
    x = torch.eye(18, device=use_triton)
    effective = ops.spp_linear(x, weight, None, A, B, SCALING).T
    assert torch.equal(effective == 0, weight == 0)
    torch.testing.assert_close(effective, ops.reference.spp_weight(weight, A, B, SCALING))


def test_same_in_every_run(use_triton):
    weight, bias, A, B = tensors(70, 37, 16, use_triton)
    x, dy = torch.randn(50, 37).to(use_triton), torch.randn(50, 70).to(use_triton)
    first, second = (run(ops.spp_linear, x, weight, bias, A, B, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_what_needs_a_gradient_gets_one(use_triton, calls):
    weight, bias, A, B = tensors(12, 8, 4, use_triton)
    x = torch.randn(3, 8).to(use_triton)
    bias.requires_grad_()
    ops.spp_linear(x, weight, bias, A, B.requires_grad_(), SCALING).sum().backward()
    assert x.grad is None and A.grad is None and B.grad is not None
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 3))
    assert calls == ["forward", "gradients"]


def test_output_may_be_edited_in_place_and_layer_used_twice(use_triton):
    weight, _, A, B = tensors(8, 8, 4, use_triton)
    x = torch.randn(3, 8).to(use_triton)

    def twice(impl, x, weight, _, A, B, scaling):
        hidden = impl(x, weight, None, A, B, scaling)
        hidden += 1
        return impl(hidden, weight, None, A, B, scaling)

    dy = torch.randn(3, 8).to(use_triton)
    found, expected = (
        run(lambda *args, i=impl: twice(i.spp_linear, *args), x, weight, None, A, B, dy)
        for impl in (ops, ops.reference)
    )
    compare(found, expected, 1e-5)


def test_saves_nothing_of_the_weights_size(use_triton):
    weight, bias, A, B = tensors(64, 48, 16, use_triton)
    x, saved = nn.Parameter(torch.randn(5, 48).to(use_triton)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.spp_linear(x, weight, bias, A, B, SCALING)
    own = {t.untyped_storage().data_ptr() for t in (x, weight, A, B)}
    assert saved and all(t.untyped_storage().data_ptr() in own for t in saved)


@pytest.mark.parametrize("case", ["float64", "no tokens", "compiled", "reference", "off"])
def test_what_the_kernels_do_not_take(use_triton, calls, case):
    weight, bias, A, B = tensors(12, 8, 4, use_triton)
    x, dy = torch.randn(3, 8).to(use_triton), torch.randn(3, 12).to(use_triton)
    function = ops.spp_linear
    if case == "float64":
        x, weight, bias, A, B, dy = (t.double() for t in (x, weight, bias, A, B, dy))
    elif case == "no tokens":
        x, dy = x[:0], dy[:0]
    elif case == "compiled":
        function = torch.compile(ops.spp_linear, backend="eager", fullgraph=True)
    with ops.use_reference(case == "reference"), ops.use_triton(case != "off"):
        found = run(function, x, weight, bias, A, B, dy)
    compare(found, run(ops.reference.spp_linear, x, weight, bias, A, B, dy), 1e-5)
    assert calls == []


def test_a_weight_that_is_trained_gets_its_gradient_from_pytorch(use_triton, calls):
    weight, bias, A, B = tensors(12, 8, 4, use_triton)
    x = torch.randn(3, 8).to(use_triton)
    found, expected = (
        torch.autograd.grad(impl.spp_linear(x, weight.requires_grad_(), bias, A, B, SCALING).sum(), weight)
        for impl in (ops, ops.reference)
    )
    torch.testing.assert_close(found, expected)
    assert calls == ["forward"]
