"""What the tests of several processes share: start them with `accelerate launch` and the files of configs/accelerate/,
compare them with one process, look at what they saved."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from peft import PeftModel
from safetensors.torch import load_file

from peft_sparse import sparsity_report, verify_sparsity
from peft_sparse.linears import block_linears, get_weight
from peft_sparse.training import finetune, load_recipe

import train_script
from models import WORDS, save_with_tokenizer, tiny_llama

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parents[1] / "configs" / "accelerate"
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), *sys.path]),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
}


def launch(engine: str, runs: list[dict], num_processes: int = 2, options: Sequence[str] = (), **config: str) -> None:
    """Train in several processes.

    Args:
        engine: name of a file in configs/accelerate/.
        runs: settings of `train_script`, one training after the other.
        options: further ones for `accelerate launch`.
        config: what is different from the file.
    """
    command = [str(HERE / "train_script.py"), json.dumps(runs)]
    accelerate_launch(config_file(engine, runs, **config), "--num_processes", str(num_processes), *options, *command)


def config_file(engine: str, runs: list[dict], **config: str) -> Path:
    """The engine's file in configs/accelerate/, or a copy beside what `runs` write in which `config` is different."""
    file = CONFIGS / f"{engine}.yaml"
    if not config:
        return file
    text = file.read_text()
    for key, value in config.items():
        lines = [line for line in text.splitlines() if line.strip().startswith(f"{key}:")]
        assert len(lines) == 1, f"{key} is not in {file.name}"
        text = text.replace(lines[0], f"{lines[0].partition(':')[0]}: {value}")
    copy = Path(runs[0]["output_dir"]).parent / file.name
    copy.write_text(text)
    return copy


def accelerate_launch(file: Path, *arguments: str) -> str:
    """`accelerate launch` with a config file, in a port of its own. What it printed."""
    process = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file),
            "--main_process_port", "0", *arguments,
        ],
        env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-6000:]
    return process.stdout


def launched_environment(file: Path) -> dict[str, str]:
    """The environment in which `accelerate launch` with this config file starts its processes."""
    command = ["--config_file", str(file), str(HERE / "train_script.py")]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        return prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)


def reports(folder: Path, num_processes: int = 2) -> list[dict]:
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(num_processes)]


def one_process(folder: Path, num_processes: int = 2, **settings) -> dict:
    """The report of a training in this process, of the same global batches as `num_processes` have together."""
    train_script.train({**settings, "output_dir": str(folder), "batch_size": 2 * num_processes})
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
    pattern = "4:8" if tuner == "pst-4:8" else "2:4" if tuner.startswith("spp") or tuner == "pst-2:4" else None
    if pattern is not None:
        assert verify_sparsity(merged, pattern=pattern).ok
    for name, linear in block_linears(merged).items():
        weight = get_weight(linear)
        expected = 0.75 if pattern is None else 0.5
        assert int((weight == 0).sum()) == int(expected * weight.numel()), name
    assert report.total_sparsity == sparsity_report(merged).total_sparsity
    return {
        f"{name}.weight": train_script.digest(linear.weight.detach()) for name, linear in block_linears(merged).items()
    }


def uneven_runs(folder: Path, **settings) -> dict[str, dict]:
    """Fourteen rows in batches of four: the last one of an epoch is half full, and the last step has one batch of
    three. LoRA is beside them for what transformers itself does then."""
    several = {"save_strategy": "no", "gradient_accumulation_steps": 3}
    runs = {"pst": {}, "spp": {"arguments": several}, "lora": {"arguments": several}}
    shared = {"size": 14, **settings}
    return {name: {**shared, "tuner": name, "output_dir": str(folder / name), **run} for name, run in runs.items()}


def check_uneven(folder: Path, runs: dict[str, dict], engine: str, sharded: bool) -> None:
    """Same as one process that is given the same rows; which rows, accelerate decides for all tuners alike."""
    for name, run in runs.items():
        found = reports(folder / name)
        num_batches = min(len(report["read"]) // 2 for report in found)
        rows = [row for n in range(num_batches) for report in found for row in report["read"][2 * n : 2 * n + 2]]
        epochs = [rows[start : start + 16] for start in range(0, len(rows), 16)]
        assert all(set(range(14)) == set(epoch) for epoch in epochs[:-1])  # two are seen twice, no one is left out
        if name == "spp":
            assert [report["read"] for report in found] == [report["read"] for report in reports(folder / "lora")]
        arguments = run.get("arguments", {"save_strategy": "no"}) | {"train_sampling_strategy": "sequential"}
        again = {**run, "output_dir": str(folder / "alone" / name), "order": epochs, "arguments": arguments}
        check(folder / name, one_process(folder / "alone" / name, **again), engine, sharded)


def make_recipe_file(folder: Path, num_processes: int, **training) -> Path:
    """A recipe that prunes and tunes with SPP, four rows a step in `num_processes` together."""
    folder.mkdir(parents=True)
    (folder / "rows.txt").write_text("\n".join(" ".join(WORDS[(n * k) % 90] for k in range(1, 40)) for n in range(40)))
    recipe = {
        "model": {"path": save_with_tokenizer(tiny_llama(), folder / "llama")},
        "prune": {"method": "wanda", "pattern": "2:4", "calibration": {"num_sequences": 4, "length": 8}},
        "adapter": {"method": "spp", "r": 4},
        "data": {"path": str(folder / "rows.txt"), "text": "text", "max_length": 16},
        "training": {
            "output_dir": str(folder / "run"), "max_steps": 4, "per_device_train_batch_size": 4 // num_processes,
            "seed": 1, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "disable_tqdm": True, **training,
        },
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


def check_recipe(folder: Path, engine: str, **training) -> None:
    """`peft-sparse finetune` in two processes does what it does in one, ends, and can be resumed."""
    alone = finetune(load_recipe(make_recipe_file(folder / "alone", 1, use_cpu=True)))
    file = make_recipe_file(folder / engine, 2, **training)
    adapters, place = [], file.parent / "run"
    for resume in ([], ["--resume", str(place / "checkpoint-2")]):
        command = ["--num_processes", "2", str(HERE / "command_script.py"), "finetune", str(file), *resume]
        accelerate_launch(CONFIGS / f"{engine}.yaml", *command)
        written = place / "result.json"
        assert time.time() - written.stat().st_mtime < 90, "it had written its result and did not end"
        found = json.loads(written.read_text())
        losses, expected = ([row["loss"] for row in log if "loss" in row] for log in (found["log"], alone.log))
        assert losses == pytest.approx(expected, abs=1e-4) and len(losses) == 4
        assert found["sparsity"] == alone.sparsity == 0.5 and found["trainable"] == alone.trainable
        assert found["resumed_from"] == (resume[1] if resume else None)
        adapters.append(load_file(place / "adapter" / "adapter_model.safetensors"))
    assert all(torch.equal(adapters[1][name], tensor) for name, tensor in adapters[0].items())


def whole_and_resumed(folder: Path, tuner: str) -> list[dict]:
    whole = {"tuner": tuner, "output_dir": str(folder / tuner)}
    whole["arguments"] = {"save_strategy": "steps", "save_steps": 3}
    return [whole, whole | {"output_dir": f"{folder / tuner}-resumed", "resume": str(folder / tuner / "checkpoint-3")}]


def check_resumed(folder: Path, tuners: tuple[str, ...]) -> None:
    for tuner in tuners:
        whole, resumed = (load_file(folder / name / "final" / "adapter_model.safetensors")
                          for name in (tuner, f"{tuner}-resumed"))  # fmt: skip
        assert whole.keys() == resumed.keys()
        for name, tensor in whole.items():
            assert torch.equal(resumed[name], tensor), name
        found, expected = reports(folder / f"{tuner}-resumed"), reports(folder / tuner)
        for step in ("4", "5", "6"):
            assert [report["masks"][step] for report in found] == [report["masks"][step] for report in expected]
