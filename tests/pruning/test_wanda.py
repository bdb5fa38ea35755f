"""Wanda: the authors' masks, exact counts in every row, and that it does its work on trained models."""

import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sparse.evaluation import perplexity
from peft_sparse.linears import block_linears, get_weight
from peft_sparse.pruning import prune_magnitude, prune_wanda

import models


def random_batches(count: int = 3, length: int = 10) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(3, models.VOCAB_SIZE, (2, length))} for _ in range(count)]


class OneBlock(nn.Module):
    """A block with a single linear, whose inputs are the batch itself."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data.copy_(weight)
        self.blocks = nn.ModuleList([nn.Sequential(linear)])

    def forward(self, x):
        return self.blocks[0](x)


def test_masks_of_the_authors(oracles):
    """All cases and patterns in the file of their code's results: "2:4", or "unstructured50" for 50%."""
    compared = 0
    for case in oracles.cases["prune"]:
        prefix = case["prefix"]
        batches = [{"x": oracles.tensors[f"{prefix}x{index}"]} for index in range(case["batches"])]
        for key, expected in oracles.tensors.items():
            name = re.fullmatch(rf"{re.escape(prefix)}wanda\.(unstructured(\d+)|\d+:\d+)", key)
            if name:
                arguments = ("unstructured", int(name[2]) / 100) if name[2] else (name[1], None)
                model = prune_wanda(OneBlock(oracles.tensors[f"{prefix}weight"]), batches, *arguments, progress=False)
                assert torch.equal(model.blocks[0][0].weight.data, expected), key
                compared += 1
    assert compared >= 2


@pytest.mark.parametrize("factory", [models.tiny_llama, models.tiny_gpt2, models.tiny_bert])
@pytest.mark.parametrize("sparsity", [None, 0.3, 0.9])
def test_exact_count_in_every_row(factory, sparsity):
    model, dense = factory(), factory()
    assert prune_wanda(model, random_batches(), sparsity=sparsity, progress=False) is model
    pruned = block_linears(model)
    for name, linear in block_linears(dense).items():
        before, after = get_weight(linear), get_weight(pruned[name])
        expected = int((0.5 if sparsity is None else sparsity) * before.shape[1])
        assert ((after == 0).sum(1) == expected).all(), name
        assert torch.equal(after[after != 0], before[after != 0])
    for name, tensor in dense.state_dict().items():
        assert name.removesuffix(".weight") in pruned or torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("pattern", ["2:4", "2:8"])
def test_n_m(tiny_gpt2, pattern: str):
    prune_wanda(tiny_gpt2, random_batches(), pattern, progress=False)
    n, m = map(int, pattern.split(":"))
    for linear in block_linears(tiny_gpt2).values():
        assert ((get_weight(linear) != 0).reshape(-1, m).sum(1) == n).all()


def test_bfloat16(tiny_llama):
    model = prune_wanda(tiny_llama.to(torch.bfloat16), random_batches(), sparsity=0.6, progress=False)
    for linear in block_linears(model).values():
        assert linear.weight.dtype == torch.bfloat16
        assert ((linear.weight == 0).sum(1) == int(0.6 * linear.weight.shape[1])).all()


def test_excluded_layers_and_a_whole_excluded_block(tiny_llama):
    prune_wanda(tiny_llama, random_batches(), exclude_modules=r".*(layers\.1\..*|q_proj)", progress=False)
    for name, linear in block_linears(tiny_llama).items():
        assert bool((linear.weight == 0).any()) is (".0." in name and not name.endswith("q_proj")), name


def test_batches_with_labels(tiny_bert):
    batches = [batch | {"labels": torch.tensor([0, 1])} for batch in random_batches()]
    other = prune_wanda(models.tiny_bert(), [{"input_ids": b["input_ids"]} for b in batches], progress=False)
    prune_wanda(tiny_bert, batches, progress=False)
    for tensor, expected in zip(tiny_bert.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, expected)


def test_training_mode_gradients_and_cache_stay(tiny_llama):
    tiny_llama.train()
    prune_wanda(tiny_llama, random_batches(), progress=False)
    assert all(module.training for module in tiny_llama.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in tiny_llama.parameters())
    assert tiny_llama.config.use_cache is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"lies in \[0, 1\), got 1.0"),
        ({"pattern": "0:4"}, "0 < N < M, got 0:4"),
        ({"pattern": "2:4", "sparsity": 0.25}, "fixes the sparsity at 0.5"),
        ({"pattern": "1:5"}, r"divisible by 5, got 32 in `model.layers.0.self_attn.q_proj`; .* `exclude_modules`"),
    ],
)
def test_errors_leave_the_model_untouched(tiny_llama, arguments, message: str):
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        prune_wanda(tiny_llama, random_batches(), progress=False, **arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_llama.state_dict().items())


def test_a_model_without_blocks():
    with pytest.raises(ValueError, match="no list of such blocks"):
        prune_wanda(nn.Sequential(nn.Linear(4, 4)), [{"input": torch.ones(1, 4)}])


def test_beats_magnitude_on_a_trained_model(llama_dir, shared):
    """On text that calibration has not seen; magnitude leaves a perplexity about twice as high."""
    ids = AutoTokenizer.from_pretrained(llama_dir)((shared / "data/tinystories/sample_a.txt").read_text()[:40000])
    ids = torch.tensor(ids["input_ids"])
    held_out, batches = ids[:1024], [{"input_ids": row[None]} for row in ids[2048 : 2048 + 8 * 256].split(256)]
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    magnitude = prune_magnitude(AutoModelForCausalLM.from_pretrained(llama_dir), sparsity=0.5)
    wanda = prune_wanda(AutoModelForCausalLM.from_pretrained(llama_dir), batches, sparsity=0.5, progress=False)
    dense, by_wanda, by_magnitude = (perplexity(m, held_out, progress=False) for m in (model, wanda, magnitude))
    assert dense < 6
    assert dense < by_wanda < 0.8 * by_magnitude


def test_a_trained_gpt2(gpt2_dir):
    model = AutoModelForCausalLM.from_pretrained(gpt2_dir)
    ids = torch.tensor(
        AutoTokenizer.from_pretrained(gpt2_dir)("To be, or not to be: that is the question. " * 5)["input_ids"]
    )
    prune_wanda(model, [{"input_ids": ids[None, :128]}], "2:4", progress=False)
    for linear in block_linears(model).values():
        assert ((get_weight(linear) != 0).reshape(-1, 4).sum(1) == 2).all()
