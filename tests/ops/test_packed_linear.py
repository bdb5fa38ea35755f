"""The ops on a packed weight: equal to their plain twins, and to the last bit to what they are on the dense weight."""

import pytest
import torch
from torch import nn

from peft_sparse import ops
from peft_sparse.sparsity import PackedWeight, dense_weight

SCALING = 2.0
SHAPES = {"divisible": (32, 24, 16), "odd": (37, 19, 16), "one row": (1, 3, 1), "one group": (9, 4, 1)}
DTYPES = [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 3e-2)]

each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
each_dtype = pytest.mark.parametrize("dtype, tolerance", DTYPES, ids=["fp32", "fp64", "bf16"])


@pytest.fixture(params=[1 << 21, 19 * 8], ids=["one block", "blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr("peft_sparse.ops.blocks.BLOCK_ELEMENTS", request.param)
    monkeypatch.setattr("peft_sparse.ops.blocks.LARGE_BLOCK_ELEMENTS", request.param)
    monkeypatch.setattr("peft_sparse.ops.blocks.MIN_ROWS", 1)


def tensors(out, columns, groups, dtype):
    weight = torch.randn(out, columns, dtype=dtype)
    weight[torch.rand(out, columns) < 0.5] = 0
    weight[0, 0] = 1  # at least one entry
    wide = torch.promote_types(dtype, torch.float32)
    A, B = torch.randn(groups, columns, dtype=wide), torch.randn(out, dtype=wide)
    return PackedWeight.of(weight), torch.randn(out, dtype=dtype), A, B


def run(op, inputs, dy):
    """Output and gradients of an op of leaf tensors."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y = op(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


def assert_near(found, expected, tolerance):
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a, b, atol=tolerance * scale, rtol=0, msg=lambda m, i=index: f"{i}: {m}")


@each_shape
@each_dtype
@pytest.mark.parametrize("batch", [(6,), (2, 5), (0,)], ids=["2-D", "3-D", "empty"])
def test_linear_equals_reference(blocks, shape, dtype, tolerance, batch):
    packed, bias, *_ = tensors(*shape, dtype)
    x, dy = torch.randn(*batch, shape[1], dtype=dtype), torch.randn(*batch, shape[0], dtype=dtype)
    found, expected = (
        run(lambda x, v, b, i=impl: i.packed_linear(x, packed._replace(values=v), b), (x, packed.values, bias), dy)
        for impl in (ops, ops.reference)
    )
    assert_near(found, expected, tolerance)


@each_shape
@each_dtype
def test_spp_equals_reference_and_the_dense_op(blocks, shape, dtype, tolerance):
    packed, bias, A, B = tensors(*shape, dtype)
    x, dy = torch.randn(4, shape[1], dtype=dtype), torch.randn(4, shape[0], dtype=dtype)
    inputs = (x, packed.values, bias, A, B)
    found, expected = (
        run(lambda x, v, b, A, B, i=impl: i.spp_linear(x, packed._replace(values=v), b, A, B, SCALING), inputs, dy)
        for impl in (ops, ops.reference)
    )
    assert_near(found, expected, tolerance)
    weight = packed.dense()
    of_dense = run(lambda x, b, A, B: ops.spp_linear(x, weight, b, A, B, SCALING), (x, bias, A, B), dy)
    for a, b in zip((*found[:2], *found[3:]), of_dense, strict=True):
        assert torch.equal(a, b)


@each_shape
@each_dtype
def test_update_equals_the_dense_op(blocks, shape, dtype, tolerance):
    packed, _, A, B = tensors(*shape, dtype)
    x, dy = torch.randn(4, shape[1], dtype=dtype), torch.randn(4, shape[0], dtype=dtype)
    found, expected = (
        run(lambda x, A, B, w=weight: ops.spp_linear_update(x, w, A, B, SCALING), (x, A, B), dy)
        for weight in (packed, packed.dense())
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert_near(found, run(lambda x, A, B: ops.reference.spp_linear_update(x, packed, A, B, SCALING), (x, A, B), dy),
                tolerance)  # fmt: skip


@each_shape
@each_dtype
def test_effective_weight_is_the_dense_one_to_the_last_bit(blocks, shape, dtype, tolerance):
    packed, _, A, B = tensors(*shape, dtype)
    kept = packed.dense() != 0
    effective = ops.spp_weight(packed, A, B, SCALING)
    expected = ops.reference.spp_weight(packed.dense(), A, B, SCALING)
    assert effective.bitmask is packed.bitmask and effective.dtype == expected.dtype
    assert torch.equal(effective.dense(), expected)
    dy = torch.randn(shape[:2], dtype=expected.dtype)
    found = run(lambda v, A, B: ops.spp_weight(packed._replace(values=v), A, B, SCALING).values,
                (packed.values, A, B), dy[kept])  # fmt: skip
    plain = run(lambda v, A, B: ops.reference.spp_weight(packed._replace(values=v), A, B, SCALING),
                (packed.values, A, B), dy)  # fmt: skip
    assert_near(found[1:], plain[1:], tolerance)


@pytest.mark.parametrize("shape", [(6, 4, 3), (7, 5, 3)])
def test_gradcheck(shape):
    packed, bias, A, B = tensors(*shape, torch.float64)
    x = torch.randn(3, shape[1], dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x, packed.values.clone(), bias, A, B)]

    def of(values):
        return packed._replace(values=values)

    assert torch.autograd.gradcheck(lambda x, v, b, A, B: ops.packed_linear(x, of(v), b), leaves)
    assert torch.autograd.gradcheck(lambda x, v, b, A, B: ops.spp_linear(x, of(v), b, A, B, SCALING), leaves)
    assert torch.autograd.gradcheck(lambda x, v, b, A, B: ops.spp_weight(of(v), A, B, SCALING).values, leaves)
    twice = lambda x, v, b, A, B: ops.spp_linear(x, ops.spp_weight(of(v), A, B, 0.5), b, A, B, SCALING)  # noqa: E731
    assert torch.autograd.gradcheck(twice, leaves)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast(weight_dtype):
    packed, bias, A, B = tensors(12, 8, 4, weight_dtype)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = ops.packed_linear(x, packed, bias), nn.functional.linear(x, packed.dense(), bias)
        assert y.dtype == expected.dtype == torch.bfloat16 and torch.equal(y, expected)
        found, of_dense = (ops.spp_linear(x, weight, bias, A, B, SCALING) for weight in (packed, packed.dense()))
    assert found.dtype == torch.bfloat16 and torch.equal(found, of_dense)


def test_a_dense_weight_is_an_ordinary_linear():
    packed, bias, *_ = tensors(6, 4, 2, torch.float32)
    x, weight = torch.randn(3, 4), dense_weight(packed)
    assert torch.equal(ops.packed_linear(x, weight, bias), nn.functional.linear(x, weight, bias))


def test_use_reference_reaches_the_packed_ops(monkeypatch):
    packed, bias, A, B = tensors(6, 4, 2, torch.float32)
    monkeypatch.setattr("peft_sparse.sparsity.PackedWeight.rows", lambda *_: pytest.fail("the fused op ran"))
    with ops.use_reference():
        ops.packed_linear(torch.randn(2, 4), packed, bias)
        ops.spp_linear(torch.randn(2, 4), ops.spp_weight(packed, A, B, SCALING), bias, A, B, SCALING)


def test_saves_nothing_of_the_weights_size():
    packed, bias, A, B = tensors(64, 48, 16, torch.float32)
    x = nn.Parameter(torch.randn(5, 48))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.packed_linear(x, packed, bias)
        ops.spp_linear(x, packed, bias, A.requires_grad_(), B.requires_grad_(), SCALING)
        ops.spp_weight(packed, A, B, SCALING)
    own = {t.untyped_storage().data_ptr() for t in (x, packed.values, packed.bitmask, packed.starts, A, B)}
    assert all(t.untyped_storage().data_ptr() in own or t.numel() == 0 for t in saved)


def test_compiles(one_graph):
    packed, bias, A, B = tensors(12, 9, 5, torch.float32)
    x = torch.randn(3, 9, requires_grad=True)
    A.requires_grad_()

    def step(x, weight, bias, A, B):
        effective = ops.spp_weight(weight, A, B, 0.5)
        return ops.spp_linear(x, effective, bias, A, B, SCALING) + ops.packed_linear(x, weight, bias)

    y, expected = (
        f(x, packed, bias, A, B) for f in (torch.compile(step, fullgraph=one_graph, backend="aot_eager"), step)
    )
    torch.testing.assert_close(y, expected)
    found, wanted = (torch.autograd.grad(t.square().sum(), (x, A)) for t in (y, expected))
    torch.testing.assert_close(found, wanted)
