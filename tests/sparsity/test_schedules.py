"""Schedules at their boundaries, against the closed formula, and against the authors' code."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_sparse.sparsity import SCHEDULES, sparsity_at


@pytest.mark.parametrize("schedule", ["cubic", "linear"])
def test_boundaries(schedule: str):
    at = [sparsity_at(schedule, step, 100, 0.1, 0.9, 0.2, 0.3) for step in range(121)]
    assert at[0] == at[20] == 0.1
    assert 0.1 < at[21] < at[69] < 0.9
    assert at[70] == pytest.approx(0.9, abs=1e-12)
    assert at[71] == at[100] == at[120] == 0.9


@pytest.mark.parametrize(("schedule", "power"), [("cubic", 3), ("linear", 1)])
def test_closed_formula_in_between(schedule: str, power: int):
    for step in (21, 40, 69):
        expected = 0.9 - 0.8 * (1 - (step - 20) / 50) ** power
        assert sparsity_at(schedule, step, 100, 0.1, 0.9, 0.2, 0.3) == pytest.approx(expected)


def test_constant():
    assert sparsity_at("constant", 0, 100, 0.0, 0.9) == 0.9


@pytest.mark.parametrize("schedule", ["cubic", "linear"])
def test_warm_ups_that_leave_no_ramp(schedule: str):
    at = [sparsity_at(schedule, step, 10, 0.0, 0.5, 0.5, 0.5) for step in range(11)]
    assert at == [0.0] * 6 + [0.5] * 5


@pytest.mark.parametrize("schedule", ["cubic", "linear"])
def test_a_single_step(schedule: str):
    assert sparsity_at(schedule, 0, 1, 0.0, 0.5) == 0.0
    assert sparsity_at(schedule, 1, 1, 0.0, 0.5) == 0.5


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.sampled_from(SCHEDULES),
    total=st.integers(1, 300),
    ends=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).map(sorted),
    warmups=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
)
def test_never_falls_and_stays_between_the_ends(schedule, total, ends, warmups):
    low, high = ends
    at = [sparsity_at(schedule, step, total, low, high, *warmups) for step in range(total + 2)]
    assert all(earlier <= later + 1e-12 for earlier, later in pairwise(at))
    assert all(low - 1e-12 <= value <= high + 1e-12 for value in at)
    assert at[-1] == high


def test_values_of_the_authors(oracles):
    for case in oracles.cases["schedule"]:
        ends = (case["initial_sparsity"], case["final_sparsity"], case["initial_warmup"], case["final_warmup"])
        for step, expected in enumerate(case["values"]):
            assert sparsity_at("cubic", step, case["total"], *ends) == pytest.approx(expected, abs=1e-9), (case, step)
