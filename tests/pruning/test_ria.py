"""RIA: its formula by hand, exact counts, what its relative importance is for, and that it does its work."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sparse.evaluation import perplexity
from peft_sparse.linears import block_linears, get_weight
from peft_sparse.pruning import prune_magnitude, prune_ria

import models


def random_batches(count: int = 3, length: int = 10) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(3, models.VOCAB_SIZE, (2, length))} for _ in range(count)]


class Blocks(torch.nn.Module):
    """One block with a single linear, whose inputs are the batch itself."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data.copy_(weight)
        self.blocks = torch.nn.ModuleList([torch.nn.Sequential(linear)])

    def forward(self, x):
        return self.blocks[0](x)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("group", [None, "layer", "row"])
def test_masks_by_hand(group, exponent: float):
    weight, batches = torch.randn(6, 20), [{"x": torch.randn(2, 7, 20)} for _ in range(3)]
    model = prune_ria(Blocks(weight), batches, sparsity=0.4, group=group, exponent=exponent, progress=False)
    size = weight.double().abs()
    relative = size / size.sum(0, keepdim=True) + size / size.sum(1, keepdim=True)
    x = torch.cat([batch["x"].flatten(0, 1) for batch in batches]).double()
    scores = relative * x.norm(dim=0) ** exponent
    zeros = model.blocks[0][0].weight == 0
    for found, row in zip(zeros, scores, strict=True) if group == "row" else [(zeros.flatten(), scores.flatten())]:
        expected = torch.zeros_like(found)
        expected[row.argsort()[: int(0.4 * len(row))]] = True
        assert torch.equal(found, expected)


@pytest.mark.parametrize("factory", [models.tiny_llama, models.tiny_gpt2, models.tiny_bert])
@pytest.mark.parametrize("sparsity", [None, 0.3, 0.9])
def test_exact_count_in_every_layer(factory, sparsity):
    model, dense = factory(), factory()
    assert prune_ria(model, random_batches(), sparsity=sparsity, progress=False) is model
    pruned = block_linears(model)
    for name, linear in block_linears(dense).items():
        before, after = get_weight(linear), get_weight(pruned[name])
        assert (after == 0).sum() == int((0.5 if sparsity is None else sparsity) * before.numel()), name
        assert torch.equal(after[after != 0], before[after != 0])
    for name, tensor in dense.state_dict().items():
        assert name.removesuffix(".weight") in pruned or torch.equal(model.state_dict()[name], tensor), name


def test_what_was_done_is_in_the_config(tiny_llama, tmp_path):
    batches = random_batches()
    prune_ria(tiny_llama, batches, exponent=0.25, checkpoint_dir=tmp_path, measure_error=True, progress=False)
    facts = tiny_llama.config.peft_sparse["pruning"]
    assert (facts["method"], facts["group"], facts["settings"]) == ("ria", "layer", {"exponent": 0.25})
    again = prune_ria(
        models.tiny_llama(), batches, exponent=0.25, checkpoint_dir=tmp_path, measure_error=True, progress=False
    )
    assert all(map(torch.equal, again.state_dict().values(), tiny_llama.state_dict().values()))


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "5:8"])
def test_n_m(tiny_gpt2, pattern: str):
    prune_ria(tiny_gpt2, random_batches(), pattern, progress=False)
    n, m = map(int, pattern.split(":"))
    for linear in block_linears(tiny_gpt2).values():
        assert ((get_weight(linear) != 0).reshape(-1, m).sum(1) == n).all()


def test_no_row_or_column_is_lost_for_being_small():
    """A row and a column a thousand times smaller than the others keep some weights, which magnitude takes whole."""
    weight = torch.randn(32, 32)
    weight[3] *= 1e-3
    weight[:, 5] *= 1e-3
    by_ria = prune_ria(Blocks(weight), [{"x": torch.randn(4, 50, 32)}], progress=False).blocks[0][0].weight
    by_magnitude = prune_magnitude(Blocks(weight)).blocks[0][0].weight
    assert (by_magnitude[3] == 0).all() and (by_magnitude[:, 5] == 0).all()
    assert (by_ria[3] != 0).sum() >= 4 and (by_ria[:, 5] != 0).sum() >= 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zero_rows_columns_and_inputs(dtype):
    weight, x = torch.randn(8, 16), torch.randn(2, 30, 16)
    weight[2], weight[:, 3], x[..., 7] = 0, 0, 0
    model = prune_ria(Blocks(weight).to(dtype), [{"x": x.to(dtype)}], sparsity=0.5, progress=False)
    pruned = model.blocks[0][0].weight
    assert (pruned == 0).sum() == 64 and (pruned[:, 7] == 0).all()
    everything = prune_ria(Blocks(torch.zeros(8, 16)), [{"x": x}], progress=False).blocks[0][0].weight
    assert (everything == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"lies in \[0, 1\), got 1.0"),
        ({"pattern": "0:4"}, "0 < N < M, got 0:4"),
        ({"pattern": "1:5"}, r"divisible by 5, got 32 in `model.layers.0.self_attn.q_proj`; .* `exclude_modules`"),
        ({"exponent": -1}, "at least 0, got -1"),
        ({"exponent": torch.nan}, "at least 0, got nan"),
        ({"exponent": 10**400}, "at least 0, got 1000"),
        ({"exponent": 1e308}, r"finite scores, got \d+ .* in `model.layers.0.self_attn.q_proj`: .*smaller exponent"),
    ],
)
def test_errors_leave_the_model_untouched(tiny_llama, arguments, message: str):
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        prune_ria(tiny_llama, random_batches(), progress=False, **arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_llama.state_dict().items())


def test_beats_magnitude_on_a_trained_model(llama_dir, shared):
    """On text that calibration has not seen."""
    ids = AutoTokenizer.from_pretrained(llama_dir)((shared / "data/tinystories/sample_a.txt").read_text()[:40000])
    ids = torch.tensor(ids["input_ids"])
    held_out, batches = ids[:1024], [{"input_ids": row[None]} for row in ids[2048 : 2048 + 8 * 256].split(256)]
    magnitude = prune_magnitude(AutoModelForCausalLM.from_pretrained(llama_dir))
    ria = prune_ria(AutoModelForCausalLM.from_pretrained(llama_dir), batches, progress=False)
    by_magnitude, by_ria = (perplexity(m, held_out, progress=False) for m in (magnitude, ria))
    assert by_ria < 0.8 * by_magnitude
