"""The fused PST linear against its plain twin and against the authors' numbers."""

import pytest
import torch

from peft_sparse import ops
from peft_sparse.ops import PstFactors, PstScales
from peft_sparse.sparsity import pack_mask, select_mask

SCALES = PstScales(beta=0.7, alpha1=0.5, alpha2=0.3)
KINDS = {
    "pst, low rank": "UVABRC",
    "pst, full": "DABRC",
    "pst, none": "ABRC",
    "movement, low rank": "UVS",
    "movement, full": "DS",
    "movement, none": "S",
    "magnitude, low rank": "UV",
    "magnitude, full": "D",
}


def make(kind, out, columns, dtype=torch.float32, rank=3):
    shapes = {
        "U": (out, rank), "V": (rank, columns), "D": (out, columns), "A": (out, rank), "B": (rank, columns),
        "R": (out,), "C": (columns,), "S": (out, columns),
    }  # fmt: skip
    factor_dtype = torch.promote_types(dtype, torch.float32)
    factors = {name: torch.randn(shapes[name], dtype=factor_dtype) for name in KINDS[kind]}
    weight = torch.randn(out, columns, dtype=dtype)
    return weight, torch.randn(out, dtype=dtype), PstFactors(**factors)


def mask_of(weight, factors, sparsity=0.5, scales=SCALES):
    updated = ops.reference.pst_updated_weight(weight, factors, scales)
    scores = ops.reference.pst_scores(updated, factors, scales)
    return select_mask(scores, int(weight.numel() * sparsity), weight.numel())


def run(impl, x, weight, bias, mask, factors, dy, scales=SCALES):
    x = x.clone().requires_grad_()
    factors = PstFactors(*(None if t is None else t.clone().requires_grad_() for t in factors))
    y = impl(x, weight, bias, pack_mask(mask), factors, scales)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad} | {n: t.grad for n, t in factors._asdict().items() if t is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(16, 12), (13, 7), (1, 5)], ids=str)
@pytest.mark.parametrize("batch", [(6,), (2, 5)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_fused_equals_reference(kind, shape, batch, dtype, tolerance):
    weight, bias, factors = make(kind, *shape, dtype)
    mask = mask_of(weight, factors)
    x, dy = torch.randn(*batch, shape[1], dtype=dtype), torch.randn(*batch, shape[0], dtype=dtype)
    expected = run(ops.reference.pst_linear, x, weight, bias, mask, factors, dy)
    found = run(ops.pst_linear, x, weight, bias, mask, factors, dy)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        atol = tolerance * max(value.abs().max().item(), 1.0)
        torch.testing.assert_close(found[name], value, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_blocks_give_the_same(monkeypatch):
    weight, bias, factors = make("pst, low rank", 13, 7)
    mask, x, dy = mask_of(weight, factors), torch.randn(4, 7), torch.randn(4, 13)
    whole = run(ops.pst_linear, x, weight, bias, mask, factors, dy)
    monkeypatch.setattr("peft_sparse.ops.blocks.BLOCK_ELEMENTS", 7 * 4)
    monkeypatch.setattr("peft_sparse.ops.blocks.MIN_ROWS", 1)
    for name, value in run(ops.pst_linear, x, weight, bias, mask, factors, dy).items():
        torch.testing.assert_close(value, whole[name])


@pytest.mark.parametrize("kind", KINDS)
def test_equations_of_the_backward(kind):
    """The closed forms of the design, in float64, on random factors that are not zero."""
    weight, _, f = make(kind, 9, 7, torch.float64)
    beta, alpha1, alpha2 = SCALES
    mask, x, dy = mask_of(weight, f), torch.randn(5, 7).double(), torch.randn(5, 9).double()
    found = run(ops.pst_linear, x, weight, None, mask, f, dy)
    updated = ops.reference.pst_updated_weight(weight, f, SCALES)
    G = dy.T @ x
    dS = G * updated
    dW = G * (mask + updated.abs()) if f.A is not None else G * mask
    expected = {"x": dy @ (mask * updated)}
    if f.U is not None:
        expected |= {"U": beta * dW @ f.V.T, "V": beta * f.U.T @ dW}
    if f.D is not None:
        expected |= {"D": dW}
    if f.A is not None:
        expected |= {
            "A": alpha1 * dS @ f.B.T,
            "B": alpha1 * f.A.T @ dS,
            "R": alpha2 * dS.sum(1),
            "C": alpha2 * dS.sum(0),
        }
    if f.S is not None:
        expected |= {"S": dS}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")


def test_gradcheck_of_the_differentiable_part():
    """With magnitude scores no gradient is straight-through, so the numeric one is the whole of it."""
    weight, bias, factors = make("magnitude, low rank", 6, 4, torch.float64)
    mask = mask_of(weight, factors)
    x = torch.randn(3, 4, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, weight, bias, factors.U, factors.V)]

    def function(x, weight, bias, U, V):
        return ops.pst_linear(x, weight, bias, pack_mask(mask), PstFactors(U=U, V=V), SCALES)

    assert torch.autograd.gradcheck(function, inputs)


def test_first_step_moves_what_starts_at_zero():
    """U and A meet zero partners, so V, B, R and C move first."""
    weight, bias, factors = make("pst, low rank", 8, 8)
    start = factors._replace(V=factors.V * 0, B=factors.B * 0, R=factors.R * 0, C=factors.C * 0)
    mask = torch.ones_like(weight, dtype=torch.bool)
    grads = run(ops.pst_linear, torch.randn(4, 8), weight, bias, mask, start, torch.randn(4, 8))
    assert all((grads[name] == 0).all() for name in "UA")
    assert all((grads[name] != 0).any() for name in "VBRC")


def test_autocast():
    weight, bias, factors = make("pst, low rank", 12, 8)
    mask, x, dy = mask_of(weight, factors), torch.randn(3, 8), torch.randn(3, 12).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = run(ops.pst_linear, x, weight, bias, mask, factors, dy)
        expected = run(ops.reference.pst_linear, x, weight, bias, mask, factors, dy)
    assert found["y"].dtype == torch.bfloat16
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=0.05 * value.abs().max().item(), rtol=0)


def test_authors_numbers(oracles):
    for case in oracles.cases["pst"]:
        t = {k.removeprefix(case["prefix"]): v for k, v in oracles.tensors.items() if k.startswith(case["prefix"])}
        names = {"U": "weight_U", "V": "weight_V"} | {n: f"mask_scores_{n}" for n in "ABRC"}
        factors = PstFactors(**{name: t[key] for name, key in names.items()})
        scales = PstScales(case["beta"], case["alpha1"], case["alpha2"])
        mask = mask_of(t["weight"], factors, case["sparsity"], scales)
        found = run(ops.pst_linear, t["x"], t["weight"], t["bias"], mask, factors, t["dy"], scales)
        expected = {"y": t["y"], "x": t["grad.x"]} | {name: t[f"grad.{key}"] for name, key in names.items()}
        for name, value in expected.items():
            assert (found[name] - value).norm() <= 1e-5 * value.norm(), (case["prefix"], name)
        merged = ops.reference.pst_weight(t["weight"], mask, factors, scales)
        torch.testing.assert_close(merged, t["merged_weight"], rtol=1e-5, atol=1e-6)
