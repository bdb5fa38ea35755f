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


def test_ratios_are_to_the_baseline_of_the_group():
    layers = [(7, {"a": waits(2e-3), "b": waits(1e-3)}), (9, {"a": waits(1e-3), "c": waits(4e-3)})]
    found = probe.measure_ratios(layers, "a", CPU)
    assert found[7].keys() == {"a", "b"} and found[9].keys() == {"a", "c"} and found[7]["a"] == found[9]["a"] == 1
    assert found[7]["b"] < 0.8 and found[9]["c"] > 1.3


def test_a_pass_goes_through_all_layers_and_short_ones_are_repeated():
    order = []
    layers = [
        (0, {name: lambda n=name: order.append(f"{n}0") for name in "ab"}),
        (1, {"a": lambda: order.append("a1")}),
    ]
    probe.measure_ratios(layers, "a", CPU)
    a, b = ["a0", "a1"], ["b0", "a1"]  # the second layer has no other way
    assert order[:6] == a + b + a  # warm-up, and a look at how long it takes
    passes = probe.MAX_PASSES
    assert order[6 : 6 + 8 * passes] == a * passes + b * passes + b * passes + a * passes


def test_a_slow_way_is_timed_a_few_times_only(monkeypatch):
    monkeypatch.setattr(probe, "BUDGET_SECONDS", 0.01)
    order = []

    def run():
        order.append(None)
        waits(5e-3)()

    probe.measure_ratios([(0, {"a": run})], "a", CPU)
    assert len(order) == 2 + probe.MIN_ROUNDS


def test_example_inputs_are_the_same_every_time():
    before = torch.random.get_rng_state()
    first, second = (probe.example_input(3, 5, torch.float64, CPU) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (1, 3, 5) and first.dtype == torch.float64
    assert torch.equal(torch.random.get_rng_state(), before)
