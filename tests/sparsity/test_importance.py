"""Scores against their formulas, in at least float32, and Wanda's against the authors'."""

import pytest
import torch

from peft_sparse.sparsity import (
    ColumnNorms,
    magnitude_importance,
    pst_importance,
    ria_importance,
    select_mask,
    wanda_importance,
)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_scores_have_at_least_float32(dtype, expected):
    weight = torch.randn(4, 6).to(dtype)
    assert magnitude_importance(weight).dtype == expected
    assert wanda_importance(weight, torch.ones(6)).dtype == expected
    assert torch.equal(magnitude_importance(weight), weight.abs().to(expected))


def test_wanda_scales_columns():
    scores = wanda_importance(torch.tensor([[1.0, -2.0], [-3.0, 0.0]]), torch.tensor([10.0, 1.0]))
    assert scores.tolist() == [[10.0, 2.0], [30.0, 0.0]]


def test_wanda_scores_and_masks_of_the_authors(oracles):
    for case in oracles.cases["prune"]:
        tensors = {
            name.removeprefix(case["prefix"]): tensor
            for name, tensor in oracles.tensors.items()
            if name.startswith(case["prefix"])
        }
        norms = ColumnNorms(case["in_features"])
        for index in range(case["batches"]):
            norms.update(tensors[f"x{index}"])
        weight = tensors["weight"]
        scores = wanda_importance(weight, norms.norms)
        assert torch.allclose(scores, tensors["wanda.score"], rtol=1e-5)
        half = select_mask(scores, case["in_features"] // 2, case["in_features"])
        assert torch.equal(weight * half, tensors["wanda.unstructured50"])
        assert torch.equal(weight * select_mask(scores, 2, 4), tensors["wanda.2:4"])


def test_pst_is_the_sum_of_its_parts():
    weight, A, B, R, C = (torch.randn(*shape) for shape in ((5, 7), (5, 2), (2, 7), (5,), (7,)))
    scores = pst_importance(weight, A, B, R, C, alpha1=0.3, alpha2=0.2)
    for i, j in ((0, 0), (4, 6), (2, 3)):
        expected = weight[i, j].abs() + 0.3 * (A[i] * B[:, j]).sum() + 0.2 * (R[i] + C[j])
        assert scores[i, j].item() == pytest.approx(expected.item(), rel=1e-5)


def test_pst_at_the_start_is_magnitude():
    weight, zeros = torch.randn(5, 7), torch.zeros
    scores = pst_importance(weight, torch.randn(5, 2), zeros(2, 7), zeros(5), zeros(7), alpha1=1.0, alpha2=1.0)
    assert torch.equal(scores, magnitude_importance(weight))


def test_pst_is_differentiable_in_the_weight_too():
    weight = torch.randn(3, 4, requires_grad=True)
    pst_importance(
        weight, torch.ones(3, 1), torch.zeros(1, 4), torch.zeros(3), torch.zeros(4), 1.0, 1.0
    ).sum().backward()
    assert torch.equal(weight.grad, weight.detach().sign())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ria_is_its_formula(dtype):
    weight, norms = torch.randn(5, 7).to(dtype), torch.rand(7)
    size = weight.double().abs()
    expected = torch.stack(
        [
            torch.stack(
                [(size[i, j] / size[:, j].sum() + size[i, j] / size[i].sum()) * norms[j] ** 0.5 for j in range(7)]
            )
            for i in range(5)
        ]
    )
    found = ria_importance(weight, norms)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(ria_importance(weight, norms, 0.0), ria_importance(weight, torch.ones(7)))


def test_ria_of_zero_rows_and_columns_is_zero():
    weight = torch.randn(4, 6)
    weight[1], weight[:, 2] = 0, 0
    scores = ria_importance(weight, torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0]))
    assert scores.isfinite().all()
    assert torch.equal(scores == 0, (weight == 0) | (torch.arange(6) == 3))
