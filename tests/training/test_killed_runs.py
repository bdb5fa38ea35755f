"""Runs of two processes that are killed, one of them or both, at chosen files, in chosen steps, at random moments:
what goes on from the last complete checkpoint ends with the parameters and masks of the run that was never killed.

The processes are forked, so that dying often takes seconds; one test lets `accelerate launch` itself start them again.
"""

import json
import os
import random
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from forking import HAS_DEEPSPEED, kill, start, wait
from launching import CONFIGS, launch, launched_environment

STEPS = 6
pytestmark = pytest.mark.slow


def settings(folder: Path, tuner: str = "pst", **kwargs) -> dict:
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    return {"tuner": tuner, "output_dir": str(folder), "steps": STEPS, "arguments": saving, "resume": "last"} | kwargs


def outcome(folder: Path) -> tuple[bytes, list[dict]]:
    """What a run ends with: the adapter, bit for bit, and the masks in each process."""
    masks = [json.loads((folder / f"rank-{rank}.json").read_text())["final_masks"] for rank in range(2)]
    assert masks[0] == masks[1]
    return (folder / "final" / "adapter_model.safetensors").read_bytes(), masks


def never_killed(environment: dict[str, str], folder: Path, **kwargs) -> tuple[bytes, list[dict]]:
    assert wait(start(environment, [settings(folder / "whole", **kwargs)])) == [0, 0]
    return outcome(folder / "whole")


# Of the first process a save of DDP has 6 to 8 files: adapter, arguments, optimizer, scheduler, random states, state,
# (an old checkpoint,) manifest. The second writes its random states. FSDP2 adds the sharded model's own.
KILLS = [
    {"rank": 0, "file": 3},  # of the first checkpoint, so that there is nothing to go on from
    {"rank": 1, "file": 2},
    {"rank": 0, "file": 8, "everyone": True},
    {"rank": 1, "step": 5},
    {"rank": 0, "step": 6, "everyone": True},
]


@pytest.mark.parametrize("tuner", ["pst", "spp-dropout"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_killed_at_a_file_or_in_a_step(tmp_path, engine, tuner):
    environment = launched_environment(CONFIGS / f"{engine}.yaml")
    expected = never_killed(environment, tmp_path, tuner=tuner)
    for death in KILLS:
        codes = wait(start(environment, [settings(tmp_path / "killed", tuner, kill=death)]))
        assert codes[death["rank"]] == -9 and codes[1 - death["rank"]] != 0, death
    assert wait(start(environment, [settings(tmp_path / "killed", tuner)])) == [0, 0]
    assert outcome(tmp_path / "killed") == expected


# The first process has 8 or 9 files then, two of DeepSpeed's among them, and the second one 3.
ZERO3_KILLS = [
    {"rank": 1, "file": 1},
    {"rank": 0, "file": 4, "everyone": True},
    {"rank": 1, "file": 5},
    {"rank": 0, "step": 5, "everyone": True},
]


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not there: `make test-deepspeed`")
def test_killed_under_zero3(tmp_path):
    environment = launched_environment(CONFIGS / "zero3.yaml")
    expected = never_killed(environment, tmp_path)
    for death in ZERO3_KILLS:
        codes = wait(start(environment, [settings(tmp_path / "killed", kill=death)]))
        assert codes[death["rank"]] == -9 and codes[1 - death["rank"]] != 0, death
    assert wait(start(environment, [settings(tmp_path / "killed")])) == [0, 0]
    assert outcome(tmp_path / "killed") == expected


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_killed_at_random_moments(tmp_path, engine):
    environment, moments = launched_environment(CONFIGS / f"{engine}.yaml"), random.Random(0)
    expected = never_killed(environment, tmp_path)
    folder = tmp_path / "killed"
    folder.mkdir()
    for victims in (slice(0, 2), slice(1, 2), slice(0, 1)):
        before = len(os.listdir(folder))
        processes = start(environment, [settings(folder)])
        while len(os.listdir(folder)) == before and all(process.is_alive() for process in processes):
            time.sleep(0.005)  # until it saves, or sets aside what the last one left
        time.sleep(moments.uniform(0, 0.5))
        kill(processes[victims])
        wait(processes)
    assert wait(start(environment, [settings(folder)])) == [0, 0]
    assert outcome(folder) == expected


# With torch 2.13 the processes that are started again find the store of those that died, keys and all, in the
# launcher: one that comes to `init_process_group` before rank 0 reads the address of the rank 0 that is gone, and gloo
# stops with "connectFullMesh failed ... Connection refused" (pytorch issue 135712). c10d and the variable below give
# each start a store of its own; without them this test fails, since it lets rank 0 come late.
AGAIN = ["--max_restarts", "1", "--rdzv_backend", "c10d", "--rdzv_conf", "store_type=file"]  # in no port of others


def test_accelerate_starts_it_again(tmp_path, monkeypatch):
    """With `--max_restarts` a run goes on by itself when one of its processes is killed."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    whole = settings(tmp_path / "whole")
    killed = settings(tmp_path / "killed", kill={"rank": 1, "file": 4}, late={"rank": 0, "seconds": 2})
    launch("ddp", [whole])
    launch("ddp", [killed], options=AGAIN)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    set_aside = [path.name for path in (tmp_path / "killed").iterdir() if path.name.startswith("incomplete")]
    assert set_aside == ["incomplete-checkpoint-4"]
    assert load_file(tmp_path / "killed" / "final" / "adapter_model.safetensors")
