"""What a report says."""

import json

import pytest

from peft_sparse.inference import AccelerationReport, LayerChoice, TokenChoice


def layer(name, choices, form="dense", reason=""):
    found = tuple(TokenChoice(tokens, chosen, ratios, None, "because") for tokens, chosen, ratios in choices)
    return LayerChoice(name, (8, 4), "float32", "cpu", 0.75, form, found, 128, 10 if found else 0, reason)


def test_table_and_json():
    fast = layer("a.0.up", [(1, "csr", {"dense": 1.0, "csr": 0.25}), (8, "dense", {"dense": 1.0, "csr": 1.5})])
    dense = layer("a.0.down", [], reason="nothing is faster")
    report = AccelerationReport([fast, dense], threads=2, notes=["A note."])
    assert str(report).splitlines() == [
        "layer     shape  zeros  1 token   8 tokens  why not",
        "a.0.up    8 x 4    75%  csr 4.0x  dense",
        "a.0.down  8 x 4    75%                      nothing is faster",
        "1 of 2 layers accelerated, with 2 threads; weights 0.0 MB and beside them 0.0 MB",
        "A note.",
    ]
    found = json.loads(report.to_json())
    assert found == report.to_dict() and found["accelerated"] == 1 and found["added_bytes"] == 10
    assert found["layers"][0]["choices"][0] == {
        "tokens": 1, "chosen": "csr", "ratios": {"dense": 1.0, "csr": 0.25}, "again": None, "reason": "because",
        "speed_up": 4.0,
    }  # fmt: skip


def test_a_way_that_failed_when_it_was_measured_again_is_json_too():
    choice = TokenChoice(1, "dense", {"dense": 1.0, "csr": 0.5}, float("inf"), "because")
    report = AccelerationReport([LayerChoice("a", (8, 4), "float32", "cpu", 0.75, "dense", (choice,), 128, 0, "")], 1)
    strict = {"parse_constant": lambda name: pytest.fail(name)}
    assert json.loads(report.to_json(), **strict)["layers"][0]["choices"][0]["again"] is None


def test_many_layers_are_summed_up():
    layers = [
        layer(f"a.{i}.up", [(1, "csr" if i else "dense", {"dense": 1.0, "csr": 1 / (i + 1)})]) for i in range(50)
    ]
    lines = str(AccelerationReport(layers, threads=1)).splitlines()
    assert len(lines) == 3 and lines[1].split("  ")[-1] == "dense, csr 2.0x to 50.0x"


def test_a_packed_layer_that_stays_so_is_not_accelerated():
    assert not layer("a", [(1, "packed", {})], form="packed").accelerated
    assert layer("a", [(1, "packed", {}), (2, "csr", {})], form="packed").accelerated
    assert layer("a", [(1, "packed", {})], form="packed").choices[0].speed_up is None
