"""Training in several processes, with the files of configs/accelerate/: gloo and CPU memory in place of nccl and GPUs,
all else is what users run. `accelerate launch` starts the quick ones and a recipe; the others are forked, with the
environment that it would give them.

Each is compared with one process that sees the same global batches. ZeRO-3 is in test_deepspeed.py.
"""

import json

import pytest
import torch

from peft_sparse.linears import gathered, get_weight, is_share, whole_parameter
from peft_sparse.sparsity import sparsity_at
from peft_sparse.training import finetune, load_recipe
from peft_sparse.tuners.pst import PstLinear

import train_script
from forking import fork
from launching import (
    CONFIGS,
    HERE,
    accelerate_launch,
    check,
    check_adapter,
    check_recipe,
    check_resumed,
    check_uneven,
    launch,
    make_recipe_file,
    one_process,
    reports,
    uneven_runs,
    whole_and_resumed,
)
from models import WORDS


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


NM_RUNS = [
    {"tuner": "pst-2:4", "model": "tiny_gpt2"},  # Conv1D: rows are inputs, so that shares cut through groups
    {"tuner": "pst-4:8", "model": "tiny_gpt2"},
]
OTHER_RUNS = [
    {"tuner": "movement", "model": "tiny_llama"},
    {"tuner": "magnitude", "model": "tiny_llama"},
    {"tuner": "spp", "model": "tiny_gpt2"},
]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "runs"), [(3, NM_RUNS + OTHER_RUNS), (4, NM_RUNS)])
def test_fsdp2_with_more_processes_and_other_models(tmp_path, number, runs):
    """Rows that do not divide by three; Conv1D; the other kinds of PST."""
    runs = [run | {"output_dir": str(tmp_path / str(i)), "merge": True} for i, run in enumerate(runs)]
    fork("fsdp2", runs, num_processes=number)
    for i, run in enumerate(runs):
        settings = {"tuner": run["tuner"], "model": run["model"]}
        alone = one_process(tmp_path / "alone" / str(i), number, **settings)
        check(tmp_path / str(i), alone, "FSDP", sharded=True, num_processes=number)
        merged = check_adapter(tmp_path / str(i), **settings)
        for report in reports(tmp_path / str(i), number):
            assert report["restored"] and report["merged"] == merged


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_with_a_teacher(tmp_path, engine):
    """PST's own dense model, whose forward is inside of the student's, and another model."""
    for tuner, teacher in (("pst", "itself"), ("spp", "dense")):
        fork(engine, [{"tuner": tuner, "teacher": teacher, "output_dir": str(tmp_path / tuner)}])
        alone = one_process(tmp_path / "alone" / tuner, tuner=tuner, teacher=teacher)
        assert alone["losses"] != one_process(tmp_path / "plain" / tuner, tuner=tuner)["losses"]
        check(tmp_path / tuner, alone, "MULTI_CPU" if engine == "ddp" else "FSDP", sharded=engine == "fsdp2")


@pytest.mark.slow
def test_fsdp2_resumes(tmp_path):
    fork("fsdp2", whole_and_resumed(tmp_path, "pst") + whole_and_resumed(tmp_path, "spp"))
    check_resumed(tmp_path, ("pst", "spp"))


@pytest.mark.slow
def test_fsdp2_resumes_from_shards(tmp_path):
    tuner = "pst"
    # two launches: the script changes the type of state dict at the end of a run, to save the adapter
    for run in whole_and_resumed(tmp_path, tuner):
        fork("fsdp2", [run], fsdp_state_dict_type="SHARDED_STATE_DICT")
    assert list((tmp_path / tuner / "checkpoint-3").rglob("*.distcp"))
    check_resumed(tmp_path, (tuner,))


@pytest.mark.slow
def test_fsdp2_loads_in_the_first_process_only(tmp_path):
    """`fsdp_cpu_ram_efficient_loading`, which moves the model to the meta device in between."""
    runs = [{"tuner": tuner, "output_dir": str(tmp_path / tuner)} for tuner in ("pst", "spp")]
    fork("fsdp2", runs, fsdp_cpu_ram_efficient_loading="true")
    for run in runs:
        alone = one_process(tmp_path / "alone" / run["tuner"], tuner=run["tuner"])
        check(tmp_path / run["tuner"], alone, "FSDP", sharded=True)
        check_adapter(tmp_path / run["tuner"], run["tuner"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_rows_that_do_not_fill_the_last_batch(tmp_path, engine):
    runs = uneven_runs(tmp_path)
    fork(engine, list(runs.values()))
    check_uneven(tmp_path, runs, "MULTI_CPU" if engine == "ddp" else "FSDP", sharded=engine == "fsdp2")


@pytest.mark.slow
def test_fsdp2_in_mixed_precision(tmp_path):
    """Forwards have bf16 shares, scores are float32 all the same; what is kept, merged and saved is float32."""
    tuners = ("pst", "pst-2:4", "spp")
    fork(
        "fsdp2", [{"tuner": t, "output_dir": str(tmp_path / t), "merge": True} for t in tuners], mixed_precision="bf16"
    )
    for tuner in tuners:
        alone = one_process(tmp_path / "alone" / tuner, tuner=tuner)
        check(tmp_path / tuner, alone, "FSDP", sharded=True, tolerance=0.0625)  # two steps of bf16 at 4.5
        merged = check_adapter(tmp_path / tuner, tuner)
        for report in reports(tmp_path / tuner):
            assert report["dtypes"] == ([] if tuner == "spp" else [["torch.bfloat16", "torch.float32"]])
            assert report["restored"] and report["merged"] == merged
            assert report["sparsity"] == (0.75 if tuner == "pst" else 0.5)


@pytest.mark.slow
def test_fsdp2_shards_of_another_number_of_processes(tmp_path):
    """A checkpoint of two is resumed by three, and one of those by two: they go on as one process does."""
    saving = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    shared = {"arguments": saving, "config": {"total_steps": 6}}
    resume = None
    for steps, number in ((2, 2), (4, 3), (6, 2)):
        run = {"output_dir": str(tmp_path / str(steps)), "steps": steps, "batch_size": 6 // number, "resume": resume}
        fork("fsdp2", [shared | run], number, fsdp_state_dict_type="SHARDED_STATE_DICT")
        resume = str(tmp_path / str(steps) / f"checkpoint-{steps}")
    alone = one_process(tmp_path / "alone", 3, **shared)
    alone["counts"] = {step: alone["counts"][step] for step in ("5", "6")}  # the log has the earlier losses too
    check(tmp_path / "6", alone, "FSDP", sharded=True)
    check_adapter(tmp_path / "6", "pst")


@pytest.mark.slow
def test_a_recipe(tmp_path):
    check_recipe(tmp_path, "fsdp2", use_cpu=True)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_recipe_evaluates(tmp_path, engine):
    """Rows of unlike lengths, whose number no batch and no process divides: to the digit what one process finds."""

    def recipe(folder, number):
        evaluating = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3, "learning_rate": 0.3}
        best = {"metric_for_best_model": "perplexity", "load_best_model_at_end": True}
        file = make_recipe_file(folder, number, use_cpu=True, **evaluating, **best)
        rows = [{"prompt": WORDS[n], "completion": " ".join(WORDS[: 3 + n])} for n in range(16)]
        (folder / "valid.jsonl").write_text("\n".join(map(json.dumps, rows[:13])))
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        files = {"train": str(folder / "train.jsonl"), "validation": str(folder / "valid.jsonl")}
        changed = json.loads(file.read_text())
        texts = {"prompt": "{prompt} ", "completion": "{completion}", "max_length": 32}
        changed["data"] = {"path": "json", "files": files, "validation_split": "validation", **texts}
        changed["evaluation"] = {"metrics": ["accuracy"]}
        file.write_text(json.dumps(changed))
        return file

    alone = finetune(load_recipe(recipe(tmp_path / "alone", 1)))
    command = [str(HERE / "command_script.py"), "finetune", "--json", str(recipe(tmp_path / engine, 2))]
    printed = accelerate_launch(CONFIGS / f"{engine}.yaml", "--num_processes", "2", *command)
    assert json.loads(printed)["metrics"].keys() == alone.metrics.keys()  # by one process
    found = json.loads((tmp_path / engine / "run" / "result.json").read_text())
    assert len(found["log"]) == len(alone.log)
    for entry, expected in zip(found["log"], alone.log, strict=True):
        names = {name for name in expected if name in ("eval_loss", "eval_perplexity", "eval_accuracy")}
        assert {name: entry[name] for name in names} == pytest.approx({name: expected[name] for name in names})
    assert 0 < alone.metrics["eval_accuracy"] < 1
    assert {"eval_loss", "eval_perplexity", "eval_accuracy"} <= alone.metrics.keys() == found["metrics"].keys()


@pytest.mark.slow
def test_bf16_base_weights(tmp_path):
    """Factors stay in float32 beside them. Compared with DDP, which rounds the same sums to bfloat16: one process adds
    up a batch that is not in halves, and PST's masks amplify the difference."""
    tuners = ("pst", "spp")
    for engine in ("ddp", "fsdp2"):
        fork(
            engine,
            [{"tuner": name, "dtype": "bfloat16", "output_dir": str(tmp_path / engine / name)} for name in tuners],
        )
    for name in tuners:
        whole = reports(tmp_path / "ddp" / name)[0]
        check(tmp_path / "fsdp2" / name, whole, "FSDP", sharded=True)


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
