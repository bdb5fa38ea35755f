"""Writes tests/checkpoint/samples: checkpoints in the sparse layouts that compressed-tensors had up to 0.14.

For an environment of its own, with torch, transformers and

    pip install --no-deps compressed-tensors==0.14.0.1 && pip install pydantic loguru

then `python tests/checkpoint/make_samples.py`. Each sample is a random Llama of 1,740 parameters, pruned, in a folder
as llm-compressor left it, with the dense tensors beside it in dense.safetensors. One weight has no zeros, one nothing
else; widths are no multiples of 8, so that the last byte of a row has bits to spare.
"""

from pathlib import Path

import torch
from compressed_tensors import ModelCompressor
from compressed_tensors.config import SparsityCompressionConfig
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SAMPLES = Path(__file__).resolve().parent / "samples"
CONFIG = LlamaConfig(
    vocab_size=16,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=16,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def prune(model: LlamaForCausalLM, two_of_four: bool) -> list[str]:
    """Zeros in every linear of the block; the names of these linears."""
    names = [name for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)]
    for name in names:
        weight = model.model.get_submodule(name).weight.data
        if two_of_four:
            smallest = weight.abs().view(-1, 4).topk(2, largest=False).indices
            weight.view(-1, 4).scatter_(1, smallest, 0)
        else:
            weight[torch.rand_like(weight.float()) < 0.7] = 0
    block = model.model.layers[0]
    block.mlp.down_proj.weight.data[3:7] = 0  # a group without anything to keep
    if not two_of_four:
        block.self_attn.k_proj.weight.data.fill_(0.5)
        block.self_attn.v_proj.weight.data.zero_()
    return [f"model.{name}" for name in names]


def main() -> None:
    for layout, dtype in (("sparse-bitmask", torch.float32), ("sparse-24-bitmask", torch.bfloat16)):
        torch.manual_seed(0)
        model = LlamaForCausalLM(CONFIG).to(dtype)
        targets = prune(model, two_of_four=layout == "sparse-24-bitmask")
        folder = SAMPLES / layout
        dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        sparsity = SparsityCompressionConfig.load_from_registry(
            layout, targets=["Linear"], ignore=["lm_head"], global_sparsity=0.5
        )
        compressor = ModelCompressor(sparsity_config=sparsity)
        compressed = compressor.compress(model, {name: tensor.clone() for name, tensor in dense.items()})
        assert all(f"{name}.compressed" in compressed for name in targets), sorted(compressed)
        model.config.architectures, model.config.dtype = [type(model).__name__], dtype
        model.config.save_pretrained(folder)
        compressor.update_config(str(folder))
        save_file(compressed, folder / "model.safetensors", metadata={"format": "pt"})
        save_file(dense, folder / "dense.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
