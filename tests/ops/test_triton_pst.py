"""PST's Triton kernels against the plain twin of the op, on a GPU or under the interpreter: see conftest.py."""

import os

import pytest
import torch

from peft_sparse import ops
from peft_sparse.ops import PstFactors, PstScales
from peft_sparse.sparsity import pack_mask

pytest.importorskip("triton", reason="triton is not installed; `make test-triton` installs it")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("no GPU; test_triton_interpreted.py runs this file under the interpreter", allow_module_level=True)

SCALES = PstScales(beta=0.7, alpha1=0.5, alpha2=0.3)
SHAPES = {  # out, in, r, score_r
    "several tiles": (70, 37, 8, 8),
    "tall": (35, 5, 3, 1),
    "wide": (6, 49, 1, 4),
    "ranks of more than one tile": (33, 20, 17, 31),
    "one weight": (1, 1, 1, 1),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # see test_triton_spp.py


def make(out, columns, rank, score_rank, device, dtype=torch.float32):
    shapes = {"U": (out, rank), "V": (rank, columns), "A": (out, score_rank), "B": (score_rank, columns)}
    shapes |= {"R": (out,), "C": (columns,)}
    factors = PstFactors(**{name: torch.randn(shape).to(device) for name, shape in shapes.items()})
    packed = pack_mask(torch.rand(out, columns) < 0.5).to(device)
    return torch.randn(out, columns).to(device, dtype), torch.randn(out).to(device, dtype), packed, factors


def run(impl, x, weight, bias, packed, factors, dy):
    x = x.detach().clone().requires_grad_()
    factors = PstFactors(*(None if t is None else t.detach().clone().requires_grad_() for t in factors))
    y = impl.pst_linear(x, weight, bias, packed, factors, SCALES)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad} | {n: t.grad for n, t in factors._asdict().items() if t is not None}


def compare(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        atol = tolerance * max(value.abs().max().item() if value.numel() else 0.0, 1.0)
        torch.testing.assert_close(found[name], value, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def calls(monkeypatch):
    """The names of the kernels' entrances, as they are called."""
    from peft_sparse.ops import triton_pst

    seen = []
    for name in ("forward", "gradients"):
        original = getattr(triton_pst, name)
        monkeypatch.setattr(triton_pst, name, lambda *a, n=name, f=original, **k: seen.append(n) or f(*a, **k))
    return seen


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("batch", [(18,), (2, 5)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_reference(use_triton, calls, shape, batch, dtype):
    weight, bias, packed, factors = make(*shape, use_triton, dtype)
    x, dy = (torch.randn(*batch, n).to(use_triton, dtype) for n in (shape[1], shape[0]))
    expected = run(ops.reference, x, weight, bias, packed, factors, dy)
    assert calls == []
    compare(run(ops, x, weight, bias, packed, factors, dy), expected, TOLERANCE[dtype])
    assert calls == ["forward", "gradients"]


def test_any_strides(use_triton):
    """A weight stored as (in, out), an input that is a part of another, a gradient that is one number expanded."""
    weight, bias, packed, factors = make(37, 19, 3, 2, use_triton)
    x, dy = torch.randn(5, 2, 40).to(use_triton)[:, :, 1:39:2], torch.ones((), device=use_triton).expand(5, 2, 37)
    expected = run(ops.reference, x, weight, bias, packed, factors, dy)
    strided = PstFactors(
        **{name: torch.stack([t, t], -1)[..., 1] for name, t in factors._asdict().items() if t is not None}
    )
    strided = strided._replace(U=factors.U.T.contiguous().T)
    compare(run(ops, x, weight.T.contiguous().T, bias, packed, strided, dy), expected, 2e-5)


def test_pruned_weights_add_nothing(use_triton):
    weight, _, packed, factors = make(20, 19, 3, 2, use_triton)
    x = torch.eye(19, device=use_triton)
    masked = ops.pst_linear(x, weight, None, packed, factors, SCALES).T
    mask = ops.reference.unpack_mask(packed, 19)
    assert torch.equal(masked != 0, mask)
    torch.testing.assert_close(masked, ops.reference.pst_weight(weight, mask, factors, SCALES))


def test_autocast(use_triton, calls):
    weight, bias, packed, factors = make(20, 18, 3, 2, use_triton)
    x, dy = torch.randn(6, 18).to(use_triton), torch.randn(6, 20).to(use_triton, torch.bfloat16)
    with torch.autocast(use_triton.type, torch.bfloat16):
        found, expected = (run(impl, x, weight, bias, packed, factors, dy) for impl in (ops, ops.reference))
    assert found["y"].dtype == torch.bfloat16 and found["U"].dtype == torch.float32
    compare(found, expected, 5e-2)
    assert len(calls) == 2


def test_same_in_every_run(use_triton):
    weight, bias, packed, factors = make(70, 37, 8, 8, use_triton)
    x, dy = torch.randn(50, 37).to(use_triton), torch.randn(50, 70).to(use_triton)
    first, second = (run(ops, x, weight, bias, packed, factors, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_what_needs_a_gradient_gets_one(use_triton, calls):
    weight, bias, packed, factors = make(12, 9, 3, 2, use_triton)
    x = torch.randn(3, 9).to(use_triton).requires_grad_()
    ops.pst_linear(x, weight, bias, packed, factors, SCALES).sum().backward()
    assert x.grad is not None and calls == ["forward", "gradients"]
    factors.B.requires_grad_()
    ops.pst_linear(x.detach(), weight, bias, packed, factors, SCALES).sum().backward()
    assert calls[2:] == ["forward", "gradients"]
    assert {n for n, t in factors._asdict().items() if t is not None and t.grad is not None} == {"B"}


OTHERS = {
    "movement": "UVS",
    "magnitude": "UV",
    "full update": "DABRC",
    "no update": "ABRC",
    "large rank": "UVABRC",
    "float64": "UVABRC",
    "no tokens": "UVABRC",
    "reference": "UVABRC",
    "off": "UVABRC",
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_the_kernels_do_not_take(use_triton, calls, case):
    weight, bias, packed, factors = make(12, 9, 33 if case == "large rank" else 3, 2, use_triton)
    factors = factors._replace(D=torch.randn(12, 9).to(use_triton), S=torch.randn(12, 9).to(use_triton))
    factors = PstFactors(**{name: getattr(factors, name) for name in OTHERS[case]})
    x, dy = torch.randn(3, 9).to(use_triton), torch.randn(3, 12).to(use_triton)
    if case == "float64":
        x, weight, bias, dy = (t.double() for t in (x, weight, bias, dy))
        factors = PstFactors(*(None if t is None else t.double() for t in factors))
    elif case == "no tokens":
        x, dy = x[:0], dy[:0]
    with ops.use_reference(case == "reference"), ops.use_triton(case != "off"):
        found = run(ops, x, weight, bias, packed, factors, dy)
    compare(found, run(ops.reference, x, weight, bias, packed, factors, dy), 2e-5)
    assert calls == []


def test_authors_numbers(use_triton, oracles):
    for case in oracles.cases["pst"]:
        t = {k.removeprefix(case["prefix"]): v for k, v in oracles.tensors.items() if k.startswith(case["prefix"])}
        t = {name: value.to(use_triton) for name, value in t.items()}
        names = {"U": "weight_U", "V": "weight_V"} | {n: f"mask_scores_{n}" for n in "ABRC"}
        factors = PstFactors(**{name: t[key].clone().requires_grad_() for name, key in names.items()})
        scales = PstScales(case["beta"], case["alpha1"], case["alpha2"])
        group, pruned = t["weight"].numel(), int(t["weight"].numel() * case["sparsity"])
        packed = ops.reference.pst_mask(t["weight"], pruned, group, factors, scales)
        x = t["x"].clone().requires_grad_()
        y = ops.pst_linear(x, t["weight"], t["bias"], packed, factors, scales)
        y.backward(t["dy"])
        expected = {"y": t["y"], "x": t["grad.x"]} | {name: t[f"grad.{key}"] for name, key in names.items()}
        found = {"y": y.detach(), "x": x.grad} | {name: getattr(factors, name).grad for name in names}
        for name, value in expected.items():
            assert (found[name] - value).norm() <= 1e-5 * value.norm(), (case["prefix"], name)
