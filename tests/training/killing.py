"""Ways for a process to die in the middle of a training, as by SIGKILL from outside: no handler, no clean-up."""

import os
import shutil
import signal
from pathlib import Path

import peft.peft_model
import psutil
import torch
import transformers.trainer_callback
from transformers import TrainerCallback

from peft_sparse.training import checkpoint_callback
from peft_sparse.training.checkpoints import MANIFEST


def die(everyone: bool = False) -> None:
    """SIGKILL for this process, and before it for all others that its parent has started."""
    if everyone:
        for process in psutil.Process().parent().children():
            if process.pid != os.getpid():
                process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_file(number: int, everyone: bool = False) -> None:
    """Die when half of this process's file number `number` is written, or, for a deletion, half of that is done."""
    left = [number]

    def counted(function, path_of):
        def wrapper(*args, **kwargs):
            path = path_of(*args, **kwargs)
            left[0] -= isinstance(path, (str, Path))
            if left[0] or not isinstance(path, (str, Path)):
                return function(*args, **kwargs)
            path = Path(path)
            if path.is_dir():  # a checkpoint that is rotated away
                next(file for file in path.iterdir() if file.is_file()).unlink()
            else:
                function(*args, **kwargs)
                os.truncate(path, path.stat().st_size // 2)
            die(everyone)

        return wrapper

    torch.save = counted(torch.save, lambda data, path, **_: path)
    peft.peft_model.safe_save_file = counted(peft.peft_model.safe_save_file, lambda data, path, **_: path)
    state = transformers.trainer_callback.TrainerState
    state.save_to_json = counted(state.save_to_json, lambda self, path: path)
    shutil.rmtree = counted(shutil.rmtree, lambda path, *_, **__: path)
    write_manifest = checkpoint_callback.write_manifest
    checkpoint_callback.write_manifest = counted(write_manifest, lambda folder: Path(folder) / MANIFEST)


class KillInStep(TrainerCallback):
    """Die when the gradients of a step are there and the optimizer has not used them."""

    def __init__(self, step: int, everyone: bool = False):
        self.step, self.everyone = step, everyone

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            die(self.everyone)
