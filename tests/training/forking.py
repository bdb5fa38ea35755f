"""Processes that are forked from a server which has imported everything: one starts in a moment, where `python` and
`accelerate launch` take ten seconds of imports for each. They have the environment of `accelerate launch`.

The server has computed nothing, so that no thread is lost. There is one for all tests that a process of pytest runs.
"""

import importlib.util
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

import train_script
from launching import ENVIRONMENT, config_file, launched_environment

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train_script", "datasets", "peft_sparse", *["deepspeed"] * HAS_DEEPSPEED])


def forked_process(target: Callable[..., None], *args) -> ForkServerProcess:
    """One that is not started yet."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():  # up to Python 3.12 the server looks for modules there alone
            patch.setenv(name, value)
        forkserver.ensure_running()
    return CONTEXT.Process(target=target, args=args)


def train_as(rank: int, environment: dict[str, str], runs: list[dict], log: str) -> None:
    """The body of one of several processes; what it prints goes to the file `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    train_script.main(runs)


def start(environment: dict[str, str], runs: list[dict], num_processes: int = 2) -> list[ForkServerProcess]:
    """Begin `runs` of `train_script`, one after the other, in several processes.

    Args:
        environment: what `launched_environment` returns.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environment = environment | place | {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    processes = [
        forked_process(train_as, rank, environment, runs, log_of(runs, rank)) for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    return processes


def log_of(runs: list[dict], rank: int) -> str:
    return f"{runs[0]['output_dir']}-log-{rank}.txt"


def wait(processes: list[ForkServerProcess], seconds: float = 300) -> list[int]:
    """Until all are done; when one dies the others are killed, as `accelerate launch` does.

    Returns:
        Exit codes.
    """
    until = time.monotonic() + seconds
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes) or time.monotonic() > until:
            kill(processes)
        time.sleep(0.01)
    return [process.exitcode for process in processes]


def kill(processes: list[ForkServerProcess]) -> None:
    for process in processes:
        process.kill()
        process.join()


def fork(engine: str, runs: list[dict], num_processes: int = 2, **config: str) -> None:
    """What `launching.launch` does, in a fraction of its time."""
    Path(runs[0]["output_dir"]).parent.mkdir(parents=True, exist_ok=True)
    environment = launched_environment(config_file(engine, runs, **config))
    codes = wait(start(environment, runs, num_processes))
    if any(codes):
        logs = [Path(log_of(runs, rank)).read_text()[-3000:] for rank in range(num_processes)]
        pytest.fail("\n".join([f"exit codes {codes}", *logs]))
