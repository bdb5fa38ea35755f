"""The Triton kernel of a packed weight and one token against the plain twin, on a GPU or under the interpreter: see
conftest.py."""

import os

import pytest
import torch
from torch import nn

from peft_sparse import accelerate_sparse, ops, pack_model
from peft_sparse.ops.triton_switch import triton_takes_bitmask
from peft_sparse.sparsity import PackedWeight

pytest.importorskip("triton", reason="triton is not installed; `make test-triton` installs it")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("no GPU; test_triton_interpreted.py runs this file under the interpreter", allow_module_level=True)

# The interpreter cuts bfloat16 off instead of rounding it.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SHAPES = [(1, 1), (9, 13), (4, 512), (5, 600)]


@pytest.fixture(params=["small tiles", "tiles"])
def device(request, monkeypatch):
    """The kernels switched on, once with tiles so small that each shape needs several; their device."""
    from peft_sparse.ops import triton_bitmask

    if request.param == "small tiles":
        monkeypatch.setattr(triton_bitmask, "ROWS", 2)
        monkeypatch.setattr(triton_bitmask, "BYTES", 16)
    with ops.use_triton():
        yield torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


def packed(out, columns, zeros, device, dtype=torch.float32):
    weight = torch.randn(out, columns).masked_fill_(torch.rand(out, columns) < zeros, 0).to(device, dtype)
    found = PackedWeight.of(weight)
    return found._replace(starts=found.starts.to(device))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("zeros", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_reference(device, shape, zeros, dtype):
    from peft_sparse.ops import triton_bitmask

    weight = packed(*shape, zeros, device, dtype)
    x = torch.randn(1, 1, shape[1]).to(device, dtype)
    b = torch.randn(shape[0]).to(device, dtype) if zeros else None
    assert triton_takes_bitmask(x, weight, b)
    y = triton_bitmask.forward(x, weight, b)
    expected = ops.reference.packed_linear(x.float(), weight._replace(values=weight.values.float()), None)
    expected = expected if b is None else expected + b.float()
    assert y.dtype == dtype and y.shape == (1, 1, shape[0])
    atol = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(y.float(), expected, atol=atol, rtol=0)


def test_strides_rows_that_are_empty_and_an_infinity(device):
    from peft_sparse.ops import triton_bitmask

    dense = torch.zeros(6, 20, device=device)
    dense[1, 3], dense[4] = 2.0, torch.arange(20.0)
    weight = PackedWeight.of(dense)
    weight = weight._replace(starts=weight.starts.to(device))
    x = torch.randn(40, device=device)[::2]
    torch.testing.assert_close(triton_bitmask.forward(x, weight, None), dense @ x)
    x[3] = float("inf")
    torch.testing.assert_close(triton_bitmask.forward(x, weight, None), dense @ x, equal_nan=True)


@pytest.mark.parametrize("case", ["two tokens", "float64", "another dtype", "compiled", "off"])
def test_what_the_kernel_does_not_take(device, case):
    weight = packed(4, 8, 0.5, device)
    x = torch.randn(2 if case == "two tokens" else 1, 8, device=device)
    if case == "float64":
        x, weight = x.double(), weight._replace(values=weight.values.double())
    if case == "another dtype":
        x = x.bfloat16()
    takes = triton_takes_bitmask
    if case == "compiled":
        takes = torch.compile(triton_takes_bitmask, backend="eager")
    with ops.use_triton(case != "off"):
        assert not takes(x, weight, None)


def test_a_model_that_uses_it(device):
    linear = nn.Linear(40, 24).to(device, torch.bfloat16).requires_grad_(False)
    linear.weight[torch.rand(linear.weight.shape, device=device) < 0.5] = 0
    x = torch.randn(1, 1, 40, device=device).bfloat16()
    for make in (lambda: nn.Sequential(linear), lambda: pack_model(nn.Sequential(linear), target_modules=["0"])):
        model = make()
        expected = linear(x).float()
        report = accelerate_sparse(model, kernel="bitmask")
        assert {choice.chosen for choice in report.layers[0].choices} == {"bitmask"}
        torch.testing.assert_close(model(x).float(), expected, atol=3e-2, rtol=3e-2)
        several = x.expand(2, 3, 40)  # the kernel takes one token; these are the layer's own business
        torch.testing.assert_close(model(several).float(), linear(several).float(), atol=3e-2, rtol=3e-2)
        linear.__class__ = nn.Linear
