"""`peft-sparse`, to be started by `accelerate launch` on CPUs; a user with GPUs starts `-m peft_sparse_cli` itself."""

import importlib
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

import peft_sparse_cli

from train_script import do_not_compile, leave, wants


def shard_on_cpus() -> None:
    """As in `train_script.make_arguments`: accelerate shards on accelerators only."""
    module = importlib.import_module("peft_sparse.training.finetune")
    make_arguments = module.training_arguments

    def training_arguments(recipe):
        arguments = make_arguments(recipe)
        assert arguments.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return arguments

    module.training_arguments = training_arguments


if __name__ == "__main__":
    if wants("DEEPSPEED"):
        do_not_compile()
    if wants("FSDP"):
        shard_on_cpus()
    code = peft_sparse_cli.main(sys.argv[1:])
    asked = [name for name in ("FSDP", "DEEPSPEED") if wants(name)]
    expected = DistributedType[asked[0] if asked else "MULTI_CPU"]
    assert AcceleratorState().distributed_type == expected
    leave(code)
