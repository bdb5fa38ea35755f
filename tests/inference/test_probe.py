"""The timing: paired, in turns, and of the machine's clock alone."""

import time

import torch

from peft_sparse.inference import probe

CPU = torch.device("cpu")


def waits(seconds):
    def run():
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        return torch.ones(1)

    return run


def test_ratios_are_to_the_baseline():
    found = probe.measure_ratios({"a": waits(2e-3), "b": waits(1e-3), "c": waits(4e-3)}, "a", CPU)
    assert found["a"] == 1
    assert found["b"] < 0.8 and found["c"] > 1.3


def test_ways_take_turns_and_short_ones_are_called_several_times():
    order = []
    probe.measure_ratios({name: lambda n=name: order.append(n) for name in "ab"}, "a", CPU)
    assert order[:3] == ["a", "b", "a"]  # warm-up, and a look at how long it takes
    calls = probe.MAX_CALLS
    assert order[3 : 3 + 4 * calls] == ["a"] * calls + ["b"] * calls + ["b"] * calls + ["a"] * calls


def test_a_slow_way_is_timed_a_few_times_only(monkeypatch):
    monkeypatch.setattr(probe, "BUDGET_SECONDS", 0.01)
    order = []

    def run():
        order.append(None)
        waits(5e-3)()

    probe.measure_ratios({"a": run}, "a", CPU)
    assert len(order) == 2 + probe.MIN_ROUNDS


def test_example_inputs_are_the_same_every_time():
    before = torch.random.get_rng_state()
    first, second = (probe.example_input(3, 5, torch.float64, CPU) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (1, 3, 5) and first.dtype == torch.float64
    assert torch.equal(torch.random.get_rng_state(), before)
