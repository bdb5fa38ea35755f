"""The timing: paired, in turns, and of the machine's clock alone."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from peft_sparse.inference import probe

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Runs that take as many seconds as they are told, by a clock that nothing else moves."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def made(seconds):
        def run():
            clock.now += seconds
            return torch.ones(1)

        return run

    return made


def test_ratios_are_to_the_baseline_of_the_group(waits):
    layers = [(7, {"a": waits(2e-3), "b": waits(1e-3)}), (9, {"a": waits(1e-3), "c": waits(4e-3)})]
    found = probe.measure_ratios(layers, "a", CPU)
    assert found[7].keys() == {"a", "b"} and found[9].keys() == {"a", "c"} and found[7]["a"] == found[9]["a"] == 1
    assert found[7]["b"] == pytest.approx(0.5) and found[9]["c"] == pytest.approx(4)


def test_a_pass_goes_through_all_layers_and_short_ones_are_repeated(waits):
    order = []

    def named(name):
        return lambda: order.append(name) or waits(1e-8)()

    layers = [(0, {"a": named("a0"), "b": named("b0")}), (1, {"a": named("a1")})]
    probe.measure_ratios(layers, "a", CPU)
    a, b = ["a0", "a1"], ["b0", "a1"]  # the second layer has no other way
    a, b = 3 * a[:1] + 3 * a[1:], 3 * b[:1] + b[1:]  # once, and twice more; what is not counted, once
    assert order[: 2 * len(a) + len(b)] == a + b + a  # warm-up, and a look at how long it takes
    passes = probe.MAX_PASSES
    timed = a * passes + b * passes + b * passes + a * passes
    assert order[2 * len(a) + len(b) :][: len(timed)] == timed


def test_a_slow_way_is_timed_a_few_times_only(monkeypatch, waits):
    monkeypatch.setattr(probe, "BUDGET_SECONDS", 0.01)
    order = []

    def run():
        order.append(None)
        waits(5e-3)()

    probe.measure_ratios([(0, {"a": run})], "a", CPU)
    assert len(order) == (2 + probe.MIN_ROUNDS) * (1 + probe.CACHED)


def test_what_wins_from_memory_alone_or_from_a_cache_alone_does_not_win(waits):
    def first_of_three(first, then):
        return itertools.cycle([waits(first), waits(then), waits(then)])

    for times, expected in [((1e-3, 3e-3), 1.5 * probe.CACHED_COUNTS), ((3e-3, 1e-3), 1.5)]:
        runs = first_of_three(*times)
        found = probe.measure_ratios([(0, {"a": waits(2e-3), "b": lambda runs=runs: next(runs)()})], "a", CPU)
        assert found[0]["b"] == pytest.approx(expected) and found[0]["b"] > 1


def test_example_inputs_are_the_same_every_time():
    before = torch.random.get_rng_state()
    first, second = (probe.example_input(3, 5, torch.float64, CPU) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (1, 3, 5) and first.dtype == torch.float64
    assert torch.equal(torch.random.get_rng_state(), before)
