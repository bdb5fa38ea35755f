"""ZeRO-3 with two and three processes on CPUs, with configs/accelerate/zero3.yaml: through `accelerate launch`, or
forked with the environment that it would give them. It needs DeepSpeed, which `make test-deepspeed` puts beside the
environment.

The model is sharded while `from_pretrained` loads it, so that adapters are made, and zeros counted, where no process
has a whole weight.
"""

import pytest

import train_script
from forking import fork
from launching import (
    check,
    check_adapter,
    check_recipe,
    check_resumed,
    check_uneven,
    launch,
    one_process,
    reports,
    uneven_runs,
    whole_and_resumed,
)

pytest.importorskip("deepspeed", reason="DeepSpeed is not there: `make test-deepspeed`")
pytestmark = pytest.mark.slow


def from_folder(folder, name: str, **settings) -> dict:
    """Settings of a run whose model is loaded by `from_pretrained`."""
    train_script.save_model(folder / f"{name}-base", **settings)
    return settings | {"output_dir": str(folder / name), "path": str(folder / f"{name}-base")}


def check_runs(runs: dict[str, dict], folder, num_processes: int = 2) -> None:
    """Compare what was run in several processes with one."""
    for name, run in runs.items():
        alone = one_process(
            folder / "alone" / name, num_processes, **run | {"output_dir": str(folder / "alone" / name)}
        )
        check(folder / name, alone, "DEEPSPEED", sharded=True, num_processes=num_processes)
        if run.get("merge"):
            merged = check_adapter(folder / name, run["tuner"], run.get("model", "tiny_llama"))
            for report in reports(folder / name, num_processes):
                assert report["restored"] and report["merged"] == merged


def test_zero3(tmp_path):
    """Losses, masks, the saved adapter, merging what is sharded; and resuming, which ends bit for bit the same."""
    runs = {
        "llama-pst": from_folder(tmp_path, "llama-pst", tuner="pst", merge=True),
        "llama-spp": from_folder(tmp_path, "llama-spp", tuner="spp", merge=True),
        "gpt2": from_folder(tmp_path, "gpt2", tuner="pst-2:4", model="tiny_gpt2", merge=True),
        "bert": from_folder(tmp_path, "bert", tuner="pst", model="tiny_bert"),
    }
    resumed = whole_and_resumed(tmp_path / "resuming", "pst") + whole_and_resumed(tmp_path / "resuming", "spp")
    launch("zero3", [*runs.values(), *resumed])
    check_runs(runs, tmp_path)
    check_resumed(tmp_path / "resuming", ("pst", "spp"))


def test_with_a_teacher(tmp_path):
    """PST's own dense model, whose forward is inside of the student's, and others, whole and in shards."""
    train_script.save_model(tmp_path / "dense", seed=1)
    runs = {
        "itself": from_folder(tmp_path, "itself", tuner="pst", teacher="itself"),
        "whole": from_folder(tmp_path, "whole", tuner="spp", teacher="dense"),
        "shards": from_folder(tmp_path, "shards", tuner="spp", teacher=str(tmp_path / "dense")),
    }
    fork("zero3", list(runs.values()))
    check_runs(runs, tmp_path)


def test_three_processes(tmp_path):
    """Rows that do not divide by three, fewer rows than processes, accumulation, several adapters."""
    accumulating = {"save_strategy": "no", "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    runs = {
        "4:8": from_folder(tmp_path, "4:8", tuner="pst-4:8", model="tiny_gpt2", merge=True),
        "accumulating": from_folder(tmp_path, "accumulating", tuner="movement", arguments=accumulating),
        "two": from_folder(tmp_path, "two", tuner="pst", second="pst", config={"r": 2, "score_r": 1}, merge=False),
        "spp": from_folder(tmp_path, "spp", tuner="spp", config={"r": 2, "modules_to_save": ["lm_head"]}),
    }
    fork("zero3", list(runs.values()), num_processes=3)
    check_runs(runs, tmp_path, num_processes=3)


def test_rows_that_do_not_fill_the_last_batch(tmp_path):
    train_script.save_model(tmp_path / "base", tuner="spp")
    runs = uneven_runs(tmp_path, path=str(tmp_path / "base"))
    fork("zero3", list(runs.values()))
    check_uneven(tmp_path, runs, "DEEPSPEED", sharded=True)


def test_a_recipe(tmp_path):
    check_recipe(tmp_path, "zero3", ddp_backend="gloo")
