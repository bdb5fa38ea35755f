"""Training in several processes, started by `accelerate launch` with the files of configs/accelerate/: gloo and CPU
memory in place of nccl and GPUs, all else is what users run.

Each is compared with one process that sees the same global batches.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from peft_sparse import sparsity_report, verify_sparsity
from peft_sparse.linears import block_linears, gathered, get_weight, is_share, whole_parameter
from peft_sparse.sparsity import sparsity_at
from peft_sparse.tuners.pst import PstLinear

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parents[1] / "configs" / "accelerate"
sys.path.insert(0, str(HERE))
import train_script  # noqa: E402


def launch(engine: str | Path, runs: list[dict], num_processes: int = 2, **config: str) -> None:
    """Train in several processes.

    Args:
        engine: name of a file in configs/accelerate/, or a path.
        runs: settings of `train_script`, one training after the other.
        config: what is different from the file.
    """
    file = engine if isinstance(engine, Path) else CONFIGS / f"{engine}.yaml"
    if config:
        text = file.read_text()
        for key, value in config.items():
            lines = [line for line in text.splitlines() if line.strip().startswith(f"{key}:")]
            assert len(lines) == 1, f"{key} is not in {file.name}"
            text = text.replace(lines[0], f"{lines[0].partition(':')[0]}: {value}")
        file = Path(runs[0]["output_dir"]).parent / f"{engine}.yaml"
        file.write_text(text)
    path = os.pathsep.join([str(HERE.parent), *sys.path])
    process = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file),
            "--num_processes", str(num_processes), "--main_process_port", "0",
            str(HERE / "train_script.py"), json.dumps(runs),
        ],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-6000:]


def reports(folder: Path, num_processes: int = 2) -> list[dict]:
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(num_processes)]


def one_process(folder: Path, num_processes: int = 2, **settings) -> dict:
    """The report of a training in this process, of the same global batches as `num_processes` have together."""
    train_script.train({"output_dir": str(folder), "batch_size": 2 * num_processes, **settings})
    return json.loads((folder / "rank-0.json").read_text())


def check(folder: Path, alone: dict, engine: str, sharded: bool, num_processes: int = 2, tolerance: float = 1e-4):
    """Same losses as one process, the same masks in all processes, and the schedule's counts."""
    found = reports(folder, num_processes)
    assert all(engine in report["engine"] for report in found)
    assert all((report["shares"] > 0) == sharded for report in found)
    for report in found:
        assert report["losses"].keys() == alone["losses"].keys()
        for step, loss in alone["losses"].items():
            assert report["losses"][step] == pytest.approx(loss, abs=tolerance), f"loss of step {step}"
        assert report["counts"] == alone["counts"]
        assert report["masks"] == found[0]["masks"]
        assert report["final_masks"] == found[0]["final_masks"]
    assert not found[0]["warnings"]


def check_adapter(folder: Path, tuner: str, model: str = "tiny_llama") -> dict[str, str]:
    """What was saved works in one process: sparsity exact, and merging keeps it.

    Returns:
        Digests of the merged weights.
    """
    base, _ = train_script.make_model(train_script.DEFAULTS | {"tuner": tuner, "model": model})
    tuned = PeftModel.from_pretrained(base, folder / "final")
    report = sparsity_report(tuned)
    merged = tuned.merge_and_unload()
    if tuner.startswith("spp") or tuner == "pst-2:4":
        assert verify_sparsity(merged, pattern="2:4").ok
    for name, linear in block_linears(merged).items():
        weight = get_weight(linear)
        expected = 0.5 if tuner.startswith("spp") or tuner == "pst-2:4" else 0.75
        assert int((weight == 0).sum()) == int(expected * weight.numel()), name
    assert report.total_sparsity == sparsity_report(merged).total_sparsity
    return {
        f"{name}.weight": train_script.digest(linear.weight.detach()) for name, linear in block_linears(merged).items()
    }


def test_the_masks_follow_the_schedule(tmp_path):
    """What all other tests compare with."""
    alone = one_process(tmp_path)
    numel = 32 * 32  # of the first layer, a query
    counts = [alone["counts"][str(step)][0] for step in range(1, 7)]
    # a callback that comes before SparsityCallback sees what the forward of this step used
    assert counts == [int(numel * sparsity_at("cubic", step - 1, 6, 0.0, 0.75)) for step in range(1, 7)]


def test_ddp(tmp_path):
    runs = [{"tuner": tuner, "output_dir": str(tmp_path / tuner)} for tuner in ("pst", "spp")]
    launch("ddp", runs)
    for run in runs:
        alone = one_process(tmp_path / "alone" / run["tuner"], tuner=run["tuner"])
        check(tmp_path / run["tuner"], alone, "MULTI_CPU", sharded=False)
        check_adapter(tmp_path / run["tuner"], run["tuner"])


def test_fsdp2(tmp_path):
    """Losses, masks, the saved adapter, and merging the shares, which has to give what one process merges."""
    runs = [{"tuner": tuner, "output_dir": str(tmp_path / tuner), "merge": True} for tuner in ("pst", "spp")]
    launch("fsdp2", runs)
    for run in runs:
        alone = one_process(tmp_path / "alone" / run["tuner"], tuner=run["tuner"])
        check(tmp_path / run["tuner"], alone, "FSDP", sharded=True)
        merged = check_adapter(tmp_path / run["tuner"], run["tuner"])
        for report in reports(tmp_path / run["tuner"]):
            assert report["restored"] and report["merged"] == merged
            assert report["sparsity"] == (0.75 if run["tuner"] == "pst" else 0.5)


@pytest.mark.slow
def test_fsdp2_with_three_processes_and_other_models(tmp_path):
    """Rows that do not divide by three; Conv1D; the other kinds of PST."""
    runs = [
        {"tuner": "pst-2:4", "model": "tiny_gpt2"},
        {"tuner": "movement", "model": "tiny_llama"},
        {"tuner": "magnitude", "model": "tiny_llama"},
        {"tuner": "spp", "model": "tiny_gpt2"},
    ]
    runs = [run | {"output_dir": str(tmp_path / str(i)), "merge": True} for i, run in enumerate(runs)]
    launch("fsdp2", runs, num_processes=3)
    for i, run in enumerate(runs):
        settings = {"tuner": run["tuner"], "model": run["model"]}
        alone = one_process(tmp_path / "alone" / str(i), 3, **settings)
        check(tmp_path / str(i), alone, "FSDP", sharded=True, num_processes=3)
        merged = check_adapter(tmp_path / str(i), **settings)
        for report in reports(tmp_path / str(i), 3):
            assert report["restored"] and report["merged"] == merged


def whole_and_resumed(folder: Path, tuner: str) -> list[dict]:
    whole = {"tuner": tuner, "output_dir": str(folder / tuner)}
    whole["arguments"] = {"save_strategy": "steps", "save_steps": 3}
    return [whole, whole | {"output_dir": f"{folder / tuner}-resumed", "resume": str(folder / tuner / "checkpoint-3")}]


@pytest.mark.slow
def test_fsdp2_resumes(tmp_path):
    launch("fsdp2", whole_and_resumed(tmp_path, "pst") + whole_and_resumed(tmp_path, "spp"))
    check_resumed(tmp_path, ("pst", "spp"))


@pytest.mark.slow
def test_fsdp2_resumes_from_shards(tmp_path):
    tuner = "pst"
    # two launches: the script changes the type of state dict at the end of a run, to save the adapter
    for run in whole_and_resumed(tmp_path, tuner):
        launch("fsdp2", [run], fsdp_state_dict_type="SHARDED_STATE_DICT")
    assert list((tmp_path / tuner / "checkpoint-3").rglob("*.distcp"))
    check_resumed(tmp_path, (tuner,))


def check_resumed(folder: Path, tuners: tuple[str, ...]) -> None:
    for tuner in tuners:
        whole, resumed = (load_file(folder / name / "final" / "adapter_model.safetensors")
                          for name in (tuner, f"{tuner}-resumed"))  # fmt: skip
        assert whole.keys() == resumed.keys()
        for name, tensor in whole.items():
            torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=0)
        found, expected = reports(folder / f"{tuner}-resumed"), reports(folder / tuner)
        for step in ("4", "5", "6"):
            assert [report["masks"][step] for report in found] == [report["masks"][step] for report in expected]


@pytest.mark.slow
def test_fsdp2_loads_in_the_first_process_only(tmp_path):
    """`fsdp_cpu_ram_efficient_loading`, which moves the model to the meta device in between."""
    runs = [{"tuner": tuner, "output_dir": str(tmp_path / tuner)} for tuner in ("pst", "spp")]
    launch("fsdp2", runs, fsdp_cpu_ram_efficient_loading="true")
    for run in runs:
        alone = one_process(tmp_path / "alone" / run["tuner"], tuner=run["tuner"])
        check(tmp_path / run["tuner"], alone, "FSDP", sharded=True)
        check_adapter(tmp_path / run["tuner"], run["tuner"])


@pytest.mark.slow
def test_bf16_base_weights(tmp_path):
    """Factors stay in float32 beside them."""
    runs = [{"tuner": tuner, "dtype": "bfloat16", "output_dir": str(tmp_path / tuner)} for tuner in ("pst", "spp")]
    launch("fsdp2", runs)
    for run in runs:
        alone = one_process(tmp_path / "alone" / run["tuner"], tuner=run["tuner"], dtype="bfloat16")
        check(tmp_path / run["tuner"], alone, "FSDP", sharded=True, tolerance=2e-2)


@pytest.fixture
def shares():
    """A model that FSDP2 has sharded over one process, here."""
    from torch.distributed.fsdp import fully_shard

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield fully_shard
    finally:
        torch.distributed.destroy_process_group()


def test_a_share_is_not_taken_for_a_weight(shares, tiny_llama):
    linear = tiny_llama.model.layers[0].self_attn.q_proj
    before = linear.weight.detach().clone()
    shares(tiny_llama)
    assert is_share(linear.weight)
    with pytest.raises(RuntimeError, match=r"gathered\(module\)"):
        get_weight(linear)
    with gathered(linear):
        assert torch.equal(get_weight(linear), before)
        get_weight(linear).data.zero_()  # not written back
    assert torch.equal(whole_parameter(linear.weight), before)
    with gathered(tiny_llama, write=[linear]):
        get_weight(linear).data.zero_()
    assert int(whole_parameter(linear.weight).count_nonzero()) == 0


def test_an_error_inside_leaves_the_shares(shares, tiny_llama):
    linear = tiny_llama.model.layers[0].self_attn.q_proj
    before = linear.weight.detach().clone()
    shares(tiny_llama)
    with pytest.raises(KeyError), gathered(linear, write=[linear]):
        get_weight(linear).data.zero_()
        raise KeyError
    assert is_share(linear.weight) and torch.equal(whole_parameter(linear.weight), before)


@pytest.mark.parametrize("tuner", ["pst", "spp"])
def test_merging_shares_after_a_forward(shares, tuner):
    """FSDP2 keeps the outermost unit's weights after a forward, and drops what is written into them."""
    from peft import get_peft_model

    expected, model = (
        get_peft_model(*train_script.make_model(train_script.DEFAULTS | {"tuner": tuner})) for _ in range(2)
    )
    for peft_model in (expected, model):
        torch.manual_seed(1)
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        for layer in (m for m in peft_model.modules() if isinstance(m, PstLinear)):
            layer.set_sparsity_step("default", 9, 10)
    ids = torch.arange(3, 11)[None]
    shares(model)  # the PeftModel itself is the unit: the tuner inside does not know of it
    unmerged = model(ids).logits
    model.merge_adapter()
    model.reshard()
    torch.testing.assert_close(model(ids).logits, unmerged, atol=1e-4, rtol=1e-4)
    expected.merge_adapter()
    assert train_script.base_digests(model) == train_script.base_digests(expected)
    model.unmerge_adapter()
    expected.unmerge_adapter()
    assert train_script.base_digests(model) == train_script.base_digests(expected)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="unmerge_adapter"), model.disable_adapter():
        model(ids)
