"""The linear over listed non-zeros against its plain twin."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_sparse import ops
from peft_sparse.ops.csr_linear import CHUNK, FEW
from peft_sparse.sparsity import PackedWeight, csr_tensor

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def sparse(out, columns, zeros, dtype=torch.float32):
    weight = torch.randn(out, columns, dtype=dtype)
    return weight.masked_fill_(torch.rand(out, columns) < zeros, 0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    batch=st.sampled_from([(1,), (1, 1), (), (2,), (FEW,), (2, 3), (FEW + 1,), (CHUNK,), (2, CHUNK), (CHUNK + 1,)]),
    zeros=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    packed=st.booleans(),
)
def test_equals_reference(dtype, bias, shape, batch, zeros, packed):
    torch.manual_seed(0)
    weight = sparse(*shape, zeros, dtype)
    csr = csr_tensor(PackedWeight.of(weight) if packed else weight)
    x, b = torch.randn(*batch, shape[1], dtype=dtype), torch.randn(shape[0], dtype=dtype) if bias else None
    with torch.no_grad():
        y = ops.csr_linear(x, csr, b)
        expected = ops.reference.csr_linear(x, csr, b)
        with ops.use_reference():
            assert torch.equal(ops.csr_linear(x, csr, b), expected)
    assert y.shape == (*batch, shape[0]) and y.is_contiguous()
    torch.testing.assert_close(expected, torch.nn.functional.linear(x, weight, b))
    tolerance = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(y, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("tokens", [1, 2, 7, 70])
def test_any_strides(tokens):
    weight, bias = sparse(19, 12, 0.5), torch.randn(38)[::2]
    csr = csr_tensor(weight.T.contiguous().T)
    for x in (torch.randn(tokens, 24)[:, ::2], torch.randn(12, tokens).T, torch.ones(1).expand(tokens, 12)):
        torch.testing.assert_close(ops.csr_linear(x, csr, bias), torch.nn.functional.linear(x, weight, bias))


def test_no_token():
    assert ops.csr_linear(torch.ones(2, 0, 4), csr_tensor(torch.eye(4)), torch.ones(4)).shape == (2, 0, 4)


def test_where_the_weight_is_zero_nothing_passes():
    weight = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    for tokens in (1, 3, 9):
        x = torch.tensor([[float("inf"), 1.0]]).expand(tokens, 2)
        assert torch.equal(ops.csr_linear(x, csr_tensor(weight), None), torch.tensor([[2.0, 0.0]]).expand(tokens, 2))


@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_in_inference_mode(tokens):
    csr, x = csr_tensor(torch.eye(4)), torch.randn(tokens, 4)
    with torch.inference_mode():
        assert torch.equal(ops.csr_linear(x, csr, None), x)
