"""The language models of the whole-model benchmarks, and a training step on them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.peers import TrainingStep, adapt
from peft_sparse import prune_magnitude
from peft_sparse.linears import block_linears

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO_MODEL = REPOSITORY / ".demo" / "data" / "smollm2-135m"  # where `make demo` puts it

SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SMALL = SMOLLM2_135M | {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4} | {
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
TINY = SMALL | {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def describe(model: Path | dict[str, int]) -> str:
    """For the CSV: where the weights are from, and the size."""
    if isinstance(model, Path):
        return f"pretrained {model.name}"
    return f"random Llama {model['hidden_size']}x{model['num_hidden_layers']}"


def load(model: Path | dict[str, int], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A causal language model from a transformers folder, or a random Llama of the given config."""
    torch.manual_seed(0)
    if isinstance(model, Path):
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device)
        for parameter in loaded.parameters():
            # Weights that are mapped from a file take memory when they are first read, which is not the step's doing.
            parameter.data = parameter.data.clone()
        return loaded
    with device:  # random numbers are quick to draw on a GPU
        return LlamaForCausalLM(LlamaConfig(**model)).to(device, dtype)


def prune(model: nn.Module, case: str, **targets: list[str]) -> nn.Module:
    """Magnitude pruned, in place.

    Args:
        case: a sparsity such as "0.75", or an N:M pattern.
        targets: `target_modules`, if not the linears of the blocks.
    """
    if ":" in case:
        return prune_magnitude(model, case, **targets)
    return prune_magnitude(model, sparsity=float(case), **targets)


def model_step(
    peer: str,
    model: Path | dict[str, int],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None = None,
) -> TrainingStep:
    """The step of a whole model on one sequence of `tokens` tokens, with every linear of its blocks adapted.

    Args:
        peer: see `peers.adapt`.
        model: see [`load`].
        backend: compile the model with this backend of torch.compile, as one graph; None: eager.
    """
    loaded = load(model, dtype, device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, loaded.config.vocab_size, (1, tokens), generator=generator).to(device)
    adapted = adapt(loaded, peer, block_linears(loaded))
    forward = adapted if backend is None else torch.compile(adapted, fullgraph=True, backend=backend)
    return TrainingStep(peer, adapted, (ids,), lambda: forward(input_ids=ids, labels=ids, use_cache=False).loss)
