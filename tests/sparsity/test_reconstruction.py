"""SparseGPT's update against a plain loop over columns in float64, the authors' numbers, and laws about its zeros."""

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_sparse.sparsity import (
    NM,
    Hessian,
    Pattern,
    Unstructured,
    factorize_,
    fit_block_size,
    parse_pattern,
    prune_and_reconstruct,
    select_mask,
)

DAMPING = 0.01


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    return 2 * x.T @ x / len(x)


def pruned(weight, hessian, pattern, sparsity, block_size=128, damping=DAMPING, **options) -> torch.Tensor:
    size = fit_block_size(pattern, block_size)
    factor = factorize_(hessian.clone(), hessian.diagonal().clone(), damping, size)
    assert factor is not None
    return prune_and_reconstruct(weight, factor, pattern, sparsity, **options)


def twin(weight, hessian, pattern: Pattern, sparsity: float, block_size: int = 128) -> torch.Tensor:
    """Algorithm 1 of the paper, one column at a time, with the inverse of the Hessian in float64."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    U = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    rows, width = weight.shape
    gone = torch.zeros(weight.shape, dtype=torch.bool)

    def choose(first: int, last: int) -> None:
        scores = (weight[:, first:last] / U.diagonal()[first:last]).square()
        scores[:, dead[first:last]] = 0
        if isinstance(pattern, NM):
            kept = select_mask(scores, pattern.m - pattern.n, pattern.m)
        elif pattern.group == "row":
            kept = select_mask(scores, int(sparsity * last) - int(sparsity * first), last - first)
        else:
            count = int(sparsity * rows * last) - int(sparsity * rows * first)
            kept = select_mask(scores, count, scores.numel())
        gone[:, first:last] = ~kept

    step = pattern.m if isinstance(pattern, NM) else block_size
    for j in range(width):
        if j % step == 0:
            choose(j, min(j + step, width))
        error = weight[:, j].where(gone[:, j], 0) / U[j, j]
        weight[:, j + 1 :] -= error[:, None] * U[j, j + 1 :]
        weight[gone[:, j], j] = 0
    return weight


@pytest.mark.parametrize("pattern", ["unstructured", "row", "2:4", "4:8", "1:3", "2:10", "7:20"])
@pytest.mark.parametrize(("rows", "width", "block_size"), [(40, 60, 32), (33, 300, 128), (5, 120, 1), (1, 60, 60)])
def test_same_as_the_plain_loop(pattern: str, rows: int, width: int, block_size: int):
    pattern = Unstructured("row") if pattern == "row" else parse_pattern(pattern)
    sparsity = pattern.resolve_sparsity(None, 0.6)
    if isinstance(pattern, NM):
        width -= width % pattern.m
    x = torch.randn(2 * width, width, dtype=torch.float64) @ torch.randn(width, width, dtype=torch.float64)
    weight = torch.randn(rows, width, dtype=torch.float64)
    found = pruned(weight, hessian_of(x), pattern, sparsity, block_size)
    expected = twin(weight, hessian_of(x), pattern, sparsity, block_size)
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_numbers_of_the_authors(oracles):
    """All cases and patterns in the file of their code's results: zeros to the last one, the rest to float32's
    rounding. A pattern is written "2:4", or "unstructured50" for 50%.
    """
    compared = 0
    for case in oracles.cases["prune"]:
        hessian = Hessian(case["in_features"])
        for index in range(case["batches"]):
            hessian.update(oracles.tensors[f"{case['prefix']}x{index}"])
        weight, start = oracles.tensors[f"{case['prefix']}weight"], f"{case['prefix']}sparsegpt."
        for key in (key for key in oracles.tensors if key.startswith(start)):
            percent = re.fullmatch(r"unstructured(\d+)", key.removeprefix(start))
            pattern = parse_pattern("unstructured" if percent else key.removeprefix(start))
            sparsity = int(percent[1]) / 100 if percent else pattern.resolve_sparsity(None)
            found = pruned(weight, hessian.matrix, pattern, sparsity, match_authors=True)
            assert torch.equal(found == 0, oracles.tensors[key] == 0), key
            torch.testing.assert_close(
                found, oracles.tensors[key], rtol=1e-4, atol=2e-5, msg=lambda m, k=key: f"{k} {m}"
            )
            compared += 1
    assert compared >= 3


@given(
    rows=st.integers(1, 12),
    width=st.integers(1, 40),
    block_size=st.integers(1, 50),
    sparsity=st.floats(0, 0.999),
    group=st.sampled_from(["layer", "row"]),
    seed=st.integers(0, 9),
)
@settings(max_examples=80, deadline=None)
def test_exact_count(rows, width, block_size, sparsity, group, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    x = torch.randn(3 + width, width, generator=generator)
    zeros = pruned(weight, hessian_of(x), Unstructured(group), sparsity, block_size) == 0
    if group == "row":
        assert (zeros.sum(1) == int(sparsity * width)).all()
    else:
        assert zeros.sum() == int(sparsity * rows * width)


@given(m=st.integers(2, 40), groups=st.integers(1, 6), block_size=st.integers(1, 50), data=st.data())
@settings(max_examples=60, deadline=None)
def test_n_m_in_every_group(m, groups, block_size, data):
    n = data.draw(st.integers(1, m - 1))
    generator = torch.Generator().manual_seed(m * groups + n)
    weight, x = (torch.randn(rows, m * groups, generator=generator) for rows in (5, 3 + m * groups))
    found = pruned(weight, hessian_of(x), NM(n, m), 1 - n / m, block_size)
    assert ((found != 0).reshape(-1, m).sum(1) == n).all()


def test_sparsity_of_zero_changes_nothing():
    weight, x = torch.randn(7, 50), torch.randn(60, 50)
    assert torch.equal(pruned(weight, hessian_of(x), Unstructured(), 0.0), weight)


def test_the_caller_keeps_its_tensors():
    weight, x = torch.randn(7, 50), torch.randn(60, 50)
    before, hessian = weight.clone(), hessian_of(x)
    factor = factorize_(hessian, hessian.diagonal().clone(), DAMPING)
    carry = factor.carry.clone()
    first, second = (prune_and_reconstruct(weight, factor, Unstructured(), 0.5) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(weight, before) and torch.equal(factor.carry, carry)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_error_is_smaller_than_without_the_update(pattern: str):
    """The output error of the same mask with the weights left as they were is what the update makes smaller."""
    x = torch.randn(400, 12) @ torch.randn(12, 64) + 0.3 * torch.randn(400, 64)  # inputs that resemble each other
    weight, pattern = torch.randn(48, 64), parse_pattern(pattern)
    found = pruned(weight, hessian_of(x), pattern, 0.5)
    plain = weight.where(found != 0, 0)
    errors = [(x @ (w - weight).T).norm() for w in (found, plain)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_dead_inputs_go_first_and_count(pattern: str):
    x, weight, dead = torch.randn(200, 32), 10 * torch.randn(16, 32), [1, 6, 7, 30]
    x[:, dead] = 0
    found = pruned(weight, hessian_of(x), parse_pattern(pattern), 0.5)
    assert (found[:, dead] == 0).all()
    assert (found == 0).sum() == found.numel() // 2 and found.isfinite().all()
    alive = [j for j in range(32) if j not in dead]
    expected = twin(weight, hessian_of(x), parse_pattern(pattern), 0.5).float()
    torch.testing.assert_close(found[:, alive], expected[:, alive], rtol=1e-3, atol=1e-3)


def test_more_dead_inputs_than_zeros():
    """The count holds; only the authors' way zeroes all of them."""
    x, weight = torch.randn(200, 16), torch.randn(8, 16)
    x[:, :12] = 0
    found = pruned(weight, hessian_of(x), Unstructured(), 0.5)
    assert (found == 0).sum() == 64 and torch.equal(found[:, 12:], weight[:, 12:])
    assert (pruned(weight, hessian_of(x), Unstructured(), 0.5, match_authors=True)[:, :12] == 0).all()
    nothing = torch.zeros(16, 16)
    assert (pruned(weight, nothing, NM(2, 4), 0.5) == 0).sum() == 64


def test_authors_prune_one_more_in_every_block():
    x, weight = torch.randn(300, 100), torch.randn(10, 100)
    for block_size, blocks in ((25, 4), (100, 1), (64, 2)):
        found = pruned(weight, hessian_of(x), Unstructured(), 0.5, block_size, match_authors=True)
        assert (found == 0).sum() == 500 + blocks


@pytest.mark.parametrize("width", [1, 5, 128, 129, 300])
def test_the_factor(width: int):
    x = torch.randn(2 * width + 3, width, dtype=torch.float64)
    hessian = hessian_of(x)
    junk_above = hessian.tril(-1) + torch.full_like(hessian, 7.0).triu()
    factor = factorize_(junk_above, hessian.diagonal().clone(), DAMPING)
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(width)
    U = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(factor.diagonal, 1 / U.diagonal())
    for start, other in itertools.product(range(0, width, 128), repeat=2):
        K, J = slice(other, other + 128), slice(start, start + 128)
        if start == other:
            torch.testing.assert_close(factor.carry[K, K], U[K, K] / U[K, K].diagonal()[:, None])
        elif start < other:
            torch.testing.assert_close(factor.carry[J, K], torch.linalg.inv(U)[J, K] @ U[K, K])


def test_a_failed_factorisation_can_be_tried_again_with_more_damping():
    ones = torch.ones(300, 300)  # of rank 1: a zero on the diagonal after the first column
    diagonal = ones.diagonal().clone()
    assert factorize_(ones, diagonal, 0.0) is None
    again, fresh = factorize_(ones, diagonal, 0.1), factorize_(torch.ones(300, 300), diagonal, 0.1)
    assert torch.equal(again.carry.triu(), fresh.carry.triu()) and torch.equal(again.diagonal, fresh.diagonal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    weight, x = torch.randn(9, 40).to(dtype), torch.randn(60, 40)
    found = pruned(weight, hessian_of(x), NM(2, 4), 0.5)
    assert found.dtype == torch.float32
    assert torch.equal(found, pruned(weight.float(), hessian_of(x), NM(2, 4), 0.5))


@pytest.mark.parametrize(("pattern", "size"), [("2:4", 128), ("1:3", 126), ("3:7", 126), ("64:200", 200)])
def test_blocks_hold_whole_groups(pattern: str, size: int):
    assert fit_block_size(parse_pattern(pattern)) == size
    assert fit_block_size(Unstructured(), 17) == 17
