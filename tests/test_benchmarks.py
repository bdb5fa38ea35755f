"""The benchmarks: every script runs at a tiny size and writes its columns; the runner's arithmetic; the gate.

Measuring functions are called below the gate, which has no bypass; the gate itself is run once, in a slow test.
"""

import contextlib
import csv
import os
import statistics
from functools import partial

import pytest
import torch

from benchmarks import (
    authors,
    check,
    check_pruning,
    compile_step,
    decode_step,
    generate,
    gpu_decode_step,
    layer_step,
    memory,
    model_step,
    models,
    never_slower,
    packed_step,
    peers,
    plot,
    pruning_layers,
    pruning_quality,
    pruning_step,
    report,
    runner,
    selection,
    sparse_step,
    stacks,
    storage,
)
from peft_sparse import accelerate_sparse, ops
from peft_sparse.linears.operands import CsrOperand
from peft_sparse.native import unavailable

TIME = ["median_ms", "spread_ms"]
COLUMNS = {
    layer_step: [
        "out", "in", "tokens", "peer", *TIME, "ratio_floor", "ratio_lora", "ratio_hira", "ratio_authors",
        "ratio_authors_checkpoint", "saved_bytes_beyond_x", "saved_bytes_per_weight", "peak_tensors_mb",
        "peak_step_mb", "trainable",
    ],
    selection: [
        "out", "in", "tokens", "sparsity", "variant", *TIME, "ratio_forward_matmul", "ratio_kthvalue",
        "ratio_argsort",
    ],
    model_step: [
        "model", "tokens", "peer", *TIME, "ratio_lora", "ratio_hira", "ratio_authors", "ratio_authors_checkpoint",
        "peak_tensors_mb", "peak_step_mb", "peak_total_mb", "peak_step_ratio_lora",
        "peak_total_ratio_lora", "saved_mb", "trainable",
    ],
    sparse_step: [
        "out", "in", "tokens", "sparsity", "variant", *TIME, "ratio_floor", "ratio_lora", "ratio_dense",
    ],
    packed_step: [
        "model", "tokens", "sparsity", "variant", *TIME, "ratio_dense", "weights_mb", "weights_ratio_dense",
        "largest_layer_mb", "peak_tensors_mb", "loss",
    ],
    compile_step: [
        "model", "tokens", "backend", "variant", *TIME, "ratio_eager", "first_step_s", "loss_after_first_step",
    ],
    decode_step: [
        "out", "in", "tokens", "sparsity", "variant", *TIME, "ratio_dense", "ratio_bf16", "ratio_bf16_mv",
        "ratio_cached", "ratio_spread", "speed_up", "chosen",
    ],
    gpu_decode_step: [
        "out", "in", "tokens", "sparsity", "variant", *TIME, "ratio_dense", "ratio_spread", "graph_ms", "ratio_graph",
        "chosen",
    ],
    generate: [
        "model", "tokens", "new_tokens", "sparsity", "variant", *TIME, "ratio_dense", "speed_up", "layers_accelerated",
        "layers", "linears_mb", "same_tokens",
    ],
    never_slower: [
        "model", "sparsity", "tokens", "variant", "chosen", "left", "layers", "median_ms", "ratio_dense",
        "ratio_control", "ratio_cached", "ratio_cached_control", "ratio_spread",
    ],
    pruning_step: [
        "case", "sequences", "tokens", "method", "pattern", "sparsity", "peer", *TIME, "ratio_authors",
        "peak_tensors_mb", "peak_step_mb",
    ],
    storage: [
        "model", "sparsity", "variant", "linears_ratio_dense", "files_mb", "files_ratio_dense",
        *(
            f"{files}_{column}"
            for files in ("warm", "cold")
            for column in (
                "load_ms", "load_ratio_dense", "read_ms", "read_ratio_dense", "token_ms", "token_ratio_dense",
                "peak_mb", "peak_ratio_dense",
            )
        ),
    ],
}  # fmt: skip
CPU = torch.device("cpu")
_spp_csr = ops.spp_csr_linear


def measure(script, path, *options) -> list[dict[str, str]]:
    """A script without its gate; the rows that its CSV has."""
    threads = str(torch.get_num_threads())
    args = runner.prepare(script.options().parse_args(["--quick", "--rounds", "2", "--threads", threads, *options]))
    rows = [row | report.metadata(args) for row in script.measure(args)]
    report.write(rows, path)
    report.print_table(rows)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def by(rows, column):
    return {row[column]: row for row in rows}


def test_layer_step(tmp_path):
    rows = measure(layer_step, tmp_path / "a.csv", "--no-memory")
    assert list(rows[0]) == [*COLUMNS[layer_step], *report.METADATA]
    found = by(rows, "peer")
    assert list(found) == list(peers.LAYER_PEERS)
    assert found["lora"]["ratio_lora"] == found["floor"]["ratio_floor"] == "1"
    assert found["spp_authors"]["ratio_authors"] == found["pst_authors"]["ratio_authors"] == "1"
    assert found["lora"]["ratio_authors"] == "" and found["pst"]["ratio_authors_checkpoint"] == ""
    out, columns, _ = layer_step.QUICK_CASE
    saved = {name: int(row["saved_bytes_beyond_x"]) for name, row in found.items() if name != "floor"}
    assert saved["full"] == saved["spp"] == saved["spp_authors_checkpoint"] == 0
    assert saved["pst"] == out * columns // 8
    assert saved["hira"] == 4 * out * columns
    assert min(saved["spp_reference"], saved["pst_reference"], saved["spp_authors"]) >= 2 * 4 * out * columns


def test_selection(tmp_path):
    rows = measure(selection, tmp_path / "a.csv")
    assert list(rows[0]) == [*COLUMNS[selection], *report.METADATA]
    assert {row["sparsity"] for row in rows} == {"0.5", "0.9"}


def test_sparse_step(tmp_path):
    rows = measure(sparse_step, tmp_path / "a.csv")
    assert list(rows[0]) == [*COLUMNS[sparse_step], *report.METADATA]
    assert len(rows) == len(sparse_step.VARIANTS) * len(sparse_step.SPARSITIES)
    assert {row["variant"]: row["ratio_dense"] for row in rows}["spp_dense"] == "1"


def test_sparse_step_computes_as_it_says(monkeypatch):
    taken = []
    monkeypatch.setattr(ops, "spp_csr_linear", lambda *args, **kwargs: taken.append("csr") or _spp_csr(*args))
    for peer, expected in (("spp_csr", ["csr"]), ("spp_dense", [])):
        taken.clear()
        peers.layer_step(peer, 16, 8, 4, torch.float32, CPU, sparsity=0.9)()
        assert taken == expected


def test_ways_to_select_agree():
    scores = torch.randn(40, 30)
    expected = selection.select_mask(scores, 600, 1200)
    assert torch.equal(selection.argsort_mask(scores, 600), expected)
    assert torch.equal(selection.kthvalue_mask(scores, 600), expected)


def test_model_step(tmp_path):
    rows = measure(model_step, tmp_path / "a.csv", "--no-memory", "--peers", "lora", "spp", "pst", "pst_authors")
    assert list(rows[0]) == [*COLUMNS[model_step], *report.METADATA]
    assert list(by(rows, "peer")) == ["lora", "spp", "pst", "pst_authors"]
    assert rows[0]["model"] == "random Llama 32x2" and rows[0]["peak_step_mb"] == ""


def test_packed_step(tmp_path):
    rows = measure(packed_step, tmp_path / "a.csv", "--cases", "0.9", "2:4")
    assert list(rows[0]) == [*COLUMNS[packed_step], *report.METADATA]
    assert [(row["sparsity"], row["variant"]) for row in rows] == [
        (case, variant) for case in ("0.9", "2:4") for variant in ("dense", "packed")
    ]
    for dense, packed in (rows[:2], rows[2:]):
        assert dense["loss"] == packed["loss"] and dense["weights_ratio_dense"] == "1"
    assert float(rows[1]["weights_ratio_dense"]) < 0.2 < 0.5 < float(rows[3]["weights_ratio_dense"]) < 0.6


@pytest.mark.slow
def test_compile_step(tmp_path):
    rows = measure(compile_step, tmp_path / "a.csv", "--backend", "aot_eager")
    assert list(rows[0]) == [*COLUMNS[compile_step], *report.METADATA]
    assert list(by(rows, "variant")) == ["spp_eager", "spp_compiled", "pst_eager", "pst_compiled"]


def test_storage(tmp_path):
    rows = measure(storage, tmp_path / "a.csv", "--sparsities", "0.75", "--scratch", str(tmp_path))
    assert list(rows[0]) == [*COLUMNS[storage], *report.METADATA]
    found = by(rows, "variant")
    assert list(found) == ["dense", "packed", "packed_unverified"]
    assert found["dense"]["linears_ratio_dense"] == found["dense"]["warm_load_ratio_dense"] == "1"
    assert 0.25 < float(found["packed"]["linears_ratio_dense"]) < 0.36


def test_compile_step_says_that_there_is_no_compiler(monkeypatch, capsys):
    monkeypatch.setattr(compile_step.shutil, "which", lambda name: None)
    assert compile_step.measure(runner.prepare(compile_step.options().parse_args(["--quick"]))) == []
    assert "needs a C++ compiler" in capsys.readouterr().out


@pytest.mark.slow
def test_peak_memory_in_a_child_process():
    def peak(peer):
        build, tiny = (partial(peers.layer_step, peer, size, size, 8, torch.float32, CPU) for size in (4096, 32))
        return memory.peak(build, tiny, CPU, threads=1)

    weight_mb = 4 * 4096**2 / memory.MB
    full, spp, authors_spp = peak("full"), peak("spp"), peak("spp_authors")
    assert full.built == pytest.approx(weight_mb, rel=0.3)
    # Gradient, two moments, temporaries of AdamW. What libraries take differs by 20 MB between machines, which is why
    # the weight is a large one.
    assert 2.9 * weight_mb < full.step < 7 * weight_mb
    assert spp.step < authors_spp.step


def test_pruning_step(tmp_path):
    rows = measure(pruning_step, tmp_path / "a.csv", "--no-memory")
    assert list(rows[0]) == [*COLUMNS[pruning_step], *report.METADATA]
    assert {(row["method"], row["pattern"], row["peer"]) for row in rows} == {
        (method, pattern, peer)
        for method in pruning_layers.METHODS
        for pattern, _ in pruning_step.SETTINGS
        for peer in pruning_layers.PEERS
    }
    assert all(row["ratio_authors"] == "1" for row in rows if row["peer"] == "authors")


def test_linears_of_a_block_that_share_an_input():
    shapes = pruning_step.block_shapes(models.TINY)
    layers = pruning_step.make_layers(shapes, 2, 5, torch.float32, CPU)
    assert layers["q"][1] is layers["v"][1] is not layers["o"][1] and layers["gate"][1] is layers["up"][1]
    expected = {name: tuple(linear.weight.shape) for name, linear in models.block_linears(llama_block()).items()}
    assert {f"{name}_proj" for name in shapes} == {name.rsplit(".", 1)[-1] for name in expected}
    for name, shape in expected.items():
        assert shape == shapes[name.rsplit(".", 1)[-1].removesuffix("_proj")][:2]


def llama_block() -> torch.nn.Module:
    return models.LlamaForCausalLM(models.LlamaConfig(**models.TINY | {"num_hidden_layers": 1}))


@pytest.mark.parametrize("method", pruning_layers.METHODS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_pruning_step_prunes_the_dense_weights_each_time(method, pattern):
    shapes = {"a": (24, 32, "x"), "b": (16, 32, "x"), "c": (16, 24, "y")}
    results = []
    for peer in (*pruning_layers.PEERS, "ours"):
        layers = pruning_step.make_layers(shapes, 2, 60, torch.float32, CPU)
        step = pruning_layers.PruningStep(peer, method, pattern, 0.5, layers)
        step()
        once = {name: linear.weight.detach().clone() for name, (linear, _) in layers.items()}
        step()
        assert all(torch.equal(linear.weight, once[name]) for name, (linear, _) in layers.items())
        results.append(once)
    for name in shapes:
        zeros = [result[name] == 0 for result in results]
        assert zeros[0].sum() == zeros[0].numel() // 2 and torch.equal(zeros[0], zeros[2])
        extra = int((zeros[1] & ~zeros[0]).sum())  # the authors' SparseGPT takes one more
        assert extra <= (pattern == "unstructured") * (method == "sparsegpt")


def test_pruners_that_differ_are_not_timed(monkeypatch):
    monkeypatch.setattr(check_pruning.layers, "wanda_importance", lambda weight, norms: weight.abs())
    with pytest.raises(SystemExit, match=r"prune differently.\n.*: wanda unstructured 0.5, ours: other zeros"):
        pruning_step.measure(runner.prepare(pruning_step.options().parse_args(["--quick"])))


def test_recorded_results_are_among_what_is_checked(oracles):
    assert check_pruning.check() == sum(".wanda." in key or ".sparsegpt." in key for key in oracles.tensors) - len(
        [key for key in oracles.tensors if key.endswith("wanda.score")]
    )


QUALITY = ["--quick", "--threads", "1", "--methods", "magnitude", "sparsegpt", "--settings", "50", "2:4"]


def test_pruning_quality_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    argv = [*QUALITY, "--out", str(path)]
    real, calls = pruning_quality.prune_magnitude, []

    def stops(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setitem(pruning_quality.METHODS, "magnitude", pruning_quality.Method(stops, False, "layer"))
    with pytest.raises(KeyboardInterrupt):
        pruning_quality.main(argv)
    before = path.read_text()
    assert [row["method"] for row in csv.DictReader(before.splitlines())] == ["dense", "magnitude", "sparsegpt"]
    monkeypatch.setitem(pruning_quality.METHODS, "magnitude", pruning_quality.Method(real, False, "layer"))
    assert pruning_quality.main(argv) == 0
    assert path.read_text().startswith(before)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["setting"]) for row in rows] == [
        ("dense", ""), ("magnitude", "50"), ("sparsegpt", "50"), ("magnitude", "2:4"), ("sparsegpt", "2:4"),
    ]  # fmt: skip
    assert [float(row["achieved_sparsity"]) for row in rows] == [0, 0.5, 0.5, 0.5, 0.5]
    assert all(float(row["perplexity"]) > 1 for row in rows) and set(report.METADATA) < set(rows[0])
    assert rows[0]["prune_seconds"] == "" and float(rows[2]["prune_seconds"]) > 0
    assert pruning_quality.main(argv) == 0 and len(path.read_text().splitlines()) == 6
    assert set(plot.charts(plot.read(path))["random Llama 32x2"]) == {"perplexity at 50", "perplexity at 2:4"}


def test_pruning_quality_starts_each_row_from_the_dense_model(tmp_path):
    """A row is the same whatever was measured before it."""
    values = []
    for methods in (["wanda", "ria"], ["ria"]):
        path = tmp_path / f"{len(methods)}.csv"
        argv = ["--quick", "--threads", "1", "--settings", "75", "--methods", *methods, "--out", str(path)]
        assert pruning_quality.main(argv) == 0
        with path.open(newline="") as file:
            values.append({row["method"]: row["perplexity"] for row in csv.DictReader(file)})
    assert values[0]["ria"] == values[1]["ria"] != values[0]["wanda"] and values[0]["dense"] == values[1]["dense"]


def test_pruning_quality_of_owl(tmp_path):
    path = tmp_path / "a.csv"
    assert pruning_quality.main(["--quick", "--threads", "1", "--settings", "60-owl", "--out", str(path)]) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["dense", *pruning_quality.METHODS]
    for row in rows[1:]:
        assert float(row["achieved_sparsity"]) == pytest.approx(0.6, abs=5e-3) and float(row["allocation_seconds"]) > 0


def test_pruning_quality_needs_a_model():
    with pytest.raises(SystemExit, match="got no-such-folder, which is none"):
        pruning_quality.main(["--model", "no-such-folder"])


def test_calibration_windows_do_not_overlap():
    drawn = pruning_quality.windows(torch.arange(103), 10, 10)
    assert sorted(int(batch["input_ids"][0, 0]) for batch in drawn) == list(range(0, 100, 10))
    assert all(batch["input_ids"].shape == (1, 10) for batch in drawn)
    with pytest.raises(SystemExit, match="takes 11 windows of 10 tokens, the text has 10"):
        pruning_quality.windows(torch.arange(103), 11, 10)


def decode_variants():
    variants = ["dense", "control", "csr", "bitmask", "chosen", "dense_bf16", "bitmask_bf16"]
    return variants if unavailable() is None else [name for name in variants if not name.startswith("bitmask")]


def test_decode_step(tmp_path):
    rows = measure(decode_step, tmp_path / "a.csv", "--sparsities", "0.5", "0.9")
    assert list(rows[0]) == [*COLUMNS[decode_step], *report.METADATA]
    variants = [*decode_variants(), "dense_bf16_mv"]
    assert {(row["sparsity"], row["variant"]) for row in rows} == {(s, v) for s in ("0.5", "0.9") for v in variants}
    assert len(rows) == 2 * len(variants)
    first = {row["variant"]: row for row in rows if row["sparsity"] == "0.5"}
    assert first["dense"]["ratio_dense"] == first["dense_bf16"]["ratio_bf16"] == "1"
    assert first["dense"]["chosen"] == "" and first["chosen"]["chosen"] in ("dense", "csr", "bitmask")


def test_gpu_decode_step_where_there_is_no_gpu(tmp_path):
    rows = measure(gpu_decode_step, tmp_path / "a.csv", "--sparsities", "2:4", "0.9")
    assert list(rows[0]) == [*COLUMNS[gpu_decode_step], *report.METADATA]
    variants = [name for name in decode_variants() if not name.endswith("bf16")]
    assert [(row["sparsity"], row["variant"]) for row in rows] == [(s, v) for s in ("2:4", "0.9") for v in variants]
    assert {row["ratio_graph"] for row in rows} == {""} and rows[-1]["chosen"] in ("dense", "csr", "bitmask")


def test_decode_step_of_several_tokens(tmp_path):
    rows = measure(decode_step, tmp_path / "a.csv", "--sparsities", "0.9", "--tokens", "5")
    assert sorted(row["variant"] for row in rows) == sorted(decode_variants())
    assert {row["tokens"] for row in rows} == {"5"} and rows[0]["ratio_bf16_mv"] == ""


def test_a_wrong_kernel_is_not_timed(tmp_path, monkeypatch):
    right = CsrOperand.__call__
    monkeypatch.setattr(CsrOperand, "__call__", lambda self, x, bias: 1.01 * right(self, x, bias))
    with pytest.raises(SystemExit, match="No benchmark is reported: csr differs from dense"):
        measure(decode_step, tmp_path / "a.csv")


def test_generate(tmp_path, monkeypatch):
    rows = measure(generate, tmp_path / "a.csv", "--sparsities", "0.9")
    assert list(rows[0]) == [*COLUMNS[generate], *report.METADATA]
    assert [row["variant"] for row in rows] == ["dense", "accelerated", "packed"]
    assert {row["same_tokens"] for row in rows} == {"1"} and rows[0]["ratio_dense"] == "1"
    assert {row["new_tokens"] for row in rows} == {"3"}

    def breaks(model, **options):
        model.lm_head.weight.data *= 1.1
        return accelerate_sparse(model, **options)

    monkeypatch.setattr(generate, "accelerate_sparse", breaks)
    with pytest.raises(SystemExit, match="the logits of accelerated differ"):
        measure(generate, tmp_path / "b.csv", "--sparsities", "0.9")


def test_never_slower(tmp_path, monkeypatch):
    monkeypatch.setattr(never_slower, "TOKENS", (1, 3))
    rows = measure(never_slower, tmp_path / "a.csv", "--sparsities", "0.9")
    assert list(rows[0]) == [*COLUMNS[never_slower], *report.METADATA]
    assert len(rows) == len(never_slower.TOKENS) * (7 + 1)
    assert [row["variant"] for row in rows[:3]] == ["q_proj", "k_proj", "v_proj"] and rows[-1]["variant"] == "*"
    assert {row["layers"] for row in rows} == {"2"} and {row["chosen"] for row in rows} <= {"dense", "csr"}
    assert {row["left"] for row in rows} == {"True"}  # too small to gain


def test_layers_are_compared_in_stacks(monkeypatch):
    monkeypatch.setattr(stacks, "CALLS", 2)
    args = runner.prepare(runner.parser("").parse_args(["--rounds", "1"]))
    order = []
    ways = {name: [partial(order.append, f"{name}{place}") for place in range(2)] for name in ("dense", "csr")}
    times = stacks.compare(ways, args)
    dense, csr = 2 * ["dense0", "dense1"], 2 * ["csr0", "csr1"]  # untimed, and timed
    assert order == dense + dense + csr + csr + dense + dense  # the second dense is the control
    assert list(times.seconds) == ["dense", "control", "csr"]
    order.clear()
    stacks.compare_cached(ways, args)
    assert order == 8 * ["dense0"] + 8 * ["csr0"] + 8 * ["dense0"]
    linear = torch.nn.Linear(3, 2)
    assert stacks.twin(linear).weight is linear.weight and stacks.twin(linear).to("meta") and linear.weight.is_cpu


def test_a_ratio_is_the_median_of_paired_ratios():
    times = runner.Times({"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 4.0]})
    assert times.ratio("a", "b") == 2 and times.ratio("a", "c") is None
    assert times.ratio_spread("a", "b") == 2
    assert times.median_ms("a") == 4000 and times.spread_ms("b") == 9000
    assert times.columns("a", {"ratio_b": "b"})["ratio_b"] == statistics.median([2, 3, 1])


def test_variants_take_turns():
    order = []
    steps = {name: partial(order.append, name) for name in "abc"}
    times = runner.interleave(steps, rounds=2, device=CPU, warmup=1)
    assert order == list("abccbaabc") and all(len(seconds) == 2 for seconds in times.seconds.values())
    order.clear()
    runner.interleave(steps, rounds=1, device=CPU, warmup=0, settle=1)
    assert order == list("aabbcc")


def test_saved_bytes_counts_each_storage_once():
    weight, x = torch.nn.Parameter(torch.randn(6, 4)), torch.randn(5, 4)

    def forward():
        y = (x @ weight.T).sigmoid()  # saves x, weight and its result
        return y.T.T * y  # saves two views of that result

    assert memory.saved_bytes(forward, (x, weight)) == 4 * 5 * 6


def test_peak_of_tensors(monkeypatch):
    def step():
        x = torch.empty(1000, dtype=torch.uint8)
        del x
        return torch.empty(300, dtype=torch.uint8).clone()

    assert memory.tensor_peak(step, CPU) * memory.MB == 1000
    monkeypatch.setattr(torch.profiler, "record_function", lambda name: contextlib.nullcontext())  # as if lost
    assert memory.tensor_peak(step, CPU) is None


def test_append_adds_rows_of_the_same_columns_only(tmp_path):
    path = tmp_path / "a.csv"
    for value in (1.0, 2.0):
        report.write([{"x": value, "y": None}], path, append=True)
    assert path.read_text() == "x,y\n1,\n2,\n"
    with pytest.raises(SystemExit, match="same columns"):
        report.write([{"z": 1}], path, append=True)
    report.write([{"z": 1}], path)
    assert path.read_text() == "z\n1\n"


def test_authors_formulations_compute_what_the_reference_computes():
    check.check_formulations()


@pytest.mark.parametrize("kind", ["spp", "pst"])
def test_authors_formulations_compute_the_authors_numbers(oracles, kind):
    for case in oracles.cases[kind]:
        t = {k.removeprefix(case["prefix"]): v for k, v in oracles.tensors.items() if k.startswith(case["prefix"])}
        out, columns = t["weight"].shape
        if kind == "spp" and out % len(t["row_factors"]):
            continue  # their code does not run
        linear = torch.nn.Linear(columns, out, bias=kind == "pst").requires_grad_(False)
        linear.weight.data = t["weight"]
        if kind == "spp":
            module = authors.AuthorsSpp(linear, len(t["row_factors"]), case["scaling"])
            names = {"A": "row_factors", "B": "column_factor"}
        else:
            linear.bias.data = t["bias"]
            scales = (case["beta"], case["alpha1"], case["alpha2"])
            names = {"U": "weight_U", "V": "weight_V"} | {n: f"mask_scores_{n}" for n in "ABRC"}
            module = authors.AuthorsPst(linear, sparsity=case["sparsity"], scales=scales)
        for name, key in names.items():
            parameter = getattr(module, name)
            parameter.data = t[key].reshape(-1, 1) if (kind, name) == ("spp", "B") else t[key].clone()
        x = t["x"].clone().requires_grad_()
        y = module(x)
        y.backward(t["dy"])
        found = {"y": y, "grad.x": x.grad} | {f"grad.{key}": getattr(module, n).grad for n, key in names.items()}
        for name, value in found.items():
            assert (value.reshape(t[name].shape) - t[name]).norm() <= 1e-5 * t[name].norm(), (case["prefix"], name)


@pytest.mark.parametrize("dtype", check.TOLERANCE, ids=str)
def test_fused_ops_on_the_device_of_the_benchmark(dtype):
    check.check_on_device(CPU, dtype)


@pytest.mark.parametrize("script", [layer_step, model_step])
def test_triton_rows_need_a_gpu(script):
    with pytest.raises(SystemExit, match="--device cuda"):
        runner.prepare(script.options().parse_args(["--quick", "--peers", "spp", "spp_triton"]))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="`make test-triton` runs it")
def test_triton_rows_under_the_interpreter(tmp_path):
    """What a GPU would do: the gate with the kernels, then their rows beside PyTorch's."""
    check.check_on_device(CPU, torch.float32, triton=True)
    with pytest.raises(AssertionError, match=r"do not take torch\.float64"):
        check.check_on_device(CPU, torch.float64, triton=True)
    names = ["spp", "spp_triton", "pst", "pst_triton"]
    args = runner.prepare(layer_step.options().parse_args(["--quick", "--no-memory", "--peers", *names[::2]]))
    args.peers = names
    found = by(layer_step.measure(args), "peer")
    for name in names[::2]:
        assert found[f"{name}_triton"]["saved_bytes_beyond_x"] == found[name]["saved_bytes_beyond_x"]
        assert found[f"{name}_triton"]["trainable"] == found[name]["trainable"]


def test_a_wrong_op_is_not_reported(tmp_path, monkeypatch, capsys):
    right = check.ops.spp_linear
    monkeypatch.setattr(check.ops, "spp_linear", lambda x, *rest: 1.001 * right(x, *rest))
    path = tmp_path / "a.csv"
    argv = ["--quick", "--no-memory", "--threads", "1", "--out", str(path)]
    assert runner.main("layer_step", layer_step.options(), layer_step.measure, argv) == 2
    assert "correctness check failed" in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.slow
def test_gate_and_script_together(tmp_path):
    path = tmp_path / "a.csv"
    argv = ["--quick", "--no-memory", "--threads", "1", "--out", str(path)]
    assert runner.main("selection", selection.options(), selection.measure, argv) == 0
    assert path.exists()


def test_charts_of_a_csv(tmp_path):
    path = tmp_path / "a.csv"
    rows = [
        {"out": 8, "in": 4, "tokens": 2, "peer": peer, "ratio_lora": ratio, "ratio_authors": None, "date": date}
        for date, peer, ratio in [("1", "spp", 9.0), ("2", "lora", 1.0), ("2", "spp", 1.25)]
    ]
    report.write(rows, path)
    assert plot.charts(plot.read(path)) == {"out 8, in 4, tokens 2": {"ratio_lora": {"lora": 1.0, "spp": 1.25}}}


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.csv"
    measure(selection, path)
    assert plot.main([str(path)]) == 0
    assert (tmp_path / "a.png").stat().st_size > 0


def test_sizes_are_those_of_the_names():
    """The stand-in for SmolLM2-135M has its number of parameters, without making them."""
    with torch.device("meta"):
        model = models.LlamaForCausalLM(models.LlamaConfig(**models.SMOLLM2_135M))
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008


def test_plot_over_sparsity(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "sparse_step.csv"
    measure(sparse_step, path)
    assert plot.main([str(path)]) == 0
    assert path.with_suffix(".png").stat().st_size > 1000


def test_plot_of_many_cases(tmp_path):
    """Cases that no line joins share a chart, named by what differs between them."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.csv"
    origin = {"tokens": 2, "date": "1", "hardware": "h", "threads": 1, "dtype": "d", "torch": "t", "commit": "c"}
    cases = [(out, peer) for out in (8, 16, 24, 32) for peer in ("lora", "spp")]
    report.write([{"out": out, "peer": peer, "ratio_lora": 1.0, **origin} for out, peer in cases], path)
    figure = plot.figure_of(path)
    [axis] = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["8", "16", "24", "32"]
    assert len(axis.patches) == len(cases)
