"""SparseGPT on models: the authors' numbers, a naive walk, exact zeros, failures, memory, and what it is good for."""

import copy
import gc
import re
import warnings
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from peft_sparse.evaluation import perplexity
from peft_sparse.linears import block_linears, get_weight, set_weight
from peft_sparse.pruning import prune_magnitude, prune_sparsegpt, prune_wanda, sharing, sparsegpt
from peft_sparse.sparsity import Hessian, factorize_, fit_block_size, parse_pattern, prune_and_reconstruct

import models

SIZES = {"vocab_size": models.VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=models.VOCAB_SIZE, decoder_start_token_id=0, **sizes)).eval()


def opt():
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return OPTForCausalLM(
        OPTConfig(vocab_size=models.VOCAB_SIZE, max_position_embeddings=64, word_embed_proj_dim=32, **sizes)
    ).eval()


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=2)).eval()


ARCHITECTURES = {
    "llama": (models.tiny_llama, ["model.layers"]),
    "gpt2": (models.tiny_gpt2, ["transformer.h"]),
    "bert": (models.tiny_bert, ["bert.encoder.layer"]),
    "t5": (t5, ["encoder.block", "decoder.block"]),
    "opt": (opt, ["model.decoder.layers"]),
    "qwen2": (qwen2, ["model.layers"]),
}


def random_batches(count: int = 3, length: int = 20, **more) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(3, models.VOCAB_SIZE, (2, length)), **more} for _ in range(count)]


class OneBlock(nn.Module):
    """A block with a single linear, whose inputs are the batch itself."""

    def __init__(self, weight: torch.Tensor, kind: str = "linear") -> None:
        super().__init__()
        rows, columns = weight.shape
        linear = nn.Linear(columns, rows, bias=False) if kind == "linear" else Conv1D(rows, columns)
        set_weight(linear, weight)
        self.blocks = nn.ModuleList([nn.Sequential(linear)])

    @property
    def linear(self) -> nn.Module:
        return self.blocks[0][0]

    def forward(self, x):
        return self.blocks[0](x)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_numbers_of_the_authors(oracles, kind: str):
    for case in oracles.cases["prune"]:
        prefix = case["prefix"]
        batches = [{"x": oracles.tensors[f"{prefix}x{index}"]} for index in range(case["batches"])]
        for key in (key for key in oracles.tensors if key.startswith(f"{prefix}sparsegpt.")):
            name = key.removeprefix(f"{prefix}sparsegpt.")
            percent = re.fullmatch(r"unstructured(\d+)", name)
            arguments = ("unstructured", int(percent[1]) / 100) if percent else (name, None)
            model = OneBlock(oracles.tensors[f"{prefix}weight"], kind)
            prune_sparsegpt(model, batches, *arguments, match_authors=True, progress=False)
            found = get_weight(model.linear)
            assert torch.equal(found == 0, oracles.tensors[key] == 0), key
            torch.testing.assert_close(found, oracles.tensors[key], rtol=1e-4, atol=2e-5)
            # By default the count is exact instead.
            model = OneBlock(oracles.tensors[f"{prefix}weight"], kind)
            prune_sparsegpt(model, batches, *arguments, progress=False)
            assert (get_weight(model.linear) == 0).sum() == int((arguments[1] or 0.5) * found.numel())


def naive_sparsegpt(model: nn.Module, batches, pattern: str, block_lists: list[str]) -> None:
    """Block by block, with complete forwards of the whole model and a Hessian of its own for every linear."""
    parsed = parse_pattern(pattern)
    blocks = [block for name in block_lists for block in model.get_submodule(name)]
    for block in blocks:
        linears = [module for module in block.modules() if isinstance(module, (nn.Linear, Conv1D))]
        hessians = {linear: Hessian(get_weight(linear).shape[1]) for linear in linears}
        for batch in batches:
            mask = batch["attention_mask"].bool()

            def count(linear, args, mask=mask, hessians=hessians):
                x = args[0]
                if x.dim() == 2 and len(x) == mask.numel():  # OPT flattens
                    x = x.reshape(*mask.shape, -1)
                hessians[linear].update(x, mask if x.shape[:2] == mask.shape else None)

            hooks = [linear.register_forward_pre_hook(count) for linear in linears]
            with torch.no_grad():
                model(**batch)
            for hook in hooks:
                hook.remove()
        for linear, hessian in hessians.items():
            factor = factorize_(hessian.matrix, hessian.matrix.diagonal().clone(), 0.01, fit_block_size(parsed))
            set_weight(linear, prune_and_reconstruct(get_weight(linear).detach(), factor, parsed, 0.5))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_as_a_naive_walk(architecture: str, pattern: str):
    factory, block_lists = ARCHITECTURES[architecture]
    model = factory()
    batches = random_batches(attention_mask=torch.ones(2, 20, dtype=torch.long))
    for batch in batches:
        batch["attention_mask"] = batch["attention_mask"].clone()
        batch["attention_mask"][0, 15:] = 0
        if model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = torch.randint(3, models.VOCAB_SIZE, (2, 11))
    expected = copy.deepcopy(model)
    naive_sparsegpt(expected, batches, pattern, block_lists)
    prune_sparsegpt(model, batches, pattern, progress=False)
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter == 0, other == 0), name
        torch.testing.assert_close(parameter, other, rtol=1e-3, atol=1e-4)
    assert sum(int((linear.weight == 0).sum()) for linear in block_linears(model).values()) > 1000


@pytest.mark.parametrize("factory", [models.tiny_llama, models.tiny_gpt2, models.tiny_bert])
@pytest.mark.parametrize("sparsity", [None, 0.0, 0.37, 0.9])
def test_exact_count_in_every_layer(factory, sparsity):
    model, dense = factory(), factory()
    assert prune_sparsegpt(model, random_batches(), sparsity=sparsity, progress=False) is model
    pruned = block_linears(model)
    for name, linear in pruned.items():
        assert (linear.weight == 0).sum() == int((0.5 if sparsity is None else sparsity) * linear.weight.numel()), name
    for name, tensor in dense.state_dict().items():
        assert name.removesuffix(".weight") in pruned or torch.equal(model.state_dict()[name], tensor), name
        if sparsity == 0:
            assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8", "1:16"])
def test_n_m(tiny_gpt2, pattern: str):
    prune_sparsegpt(tiny_gpt2, random_batches(), pattern, progress=False)
    n, m = map(int, pattern.split(":"))
    for linear in block_linears(tiny_gpt2).values():
        assert ((get_weight(linear) != 0).reshape(-1, m).sum(1) == n).all()


@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 9),
    pattern=st.sampled_from(["unstructured", "2:4", "1:3", "5:6"]),
    group=st.sampled_from([None, "layer", "row"]),
    sparsity=st.floats(0, 0.99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    kind=st.sampled_from(["linear", "conv1d"]),
)
@settings(max_examples=50, deadline=None)
def test_counts_are_exact_for_any_layer(rows, groups, pattern, group, sparsity, dtype, kind):
    parsed = parse_pattern(pattern)
    m = 4 if pattern == "unstructured" else parsed.m
    model = OneBlock(torch.randn(rows, m * groups), kind).to(dtype)
    batches = [{"x": torch.randn(2, 30, m * groups).to(dtype)} for _ in range(2)]
    if pattern == "unstructured":
        prune_sparsegpt(model, batches, pattern, sparsity, group=group, progress=False)
        zeros = get_weight(model.linear) == 0
        expected = int(sparsity * zeros.numel()) if group != "row" else rows * int(sparsity * zeros.shape[1])
        assert zeros.sum() == expected
        assert group != "row" or (zeros.sum(1) == int(sparsity * zeros.shape[1])).all()
    else:
        prune_sparsegpt(model, batches, pattern, progress=False)
        assert ((get_weight(model.linear) != 0).reshape(-1, m).sum(1) == parsed.n).all()
    assert model.linear.weight.dtype == dtype


def test_bfloat16_weights_are_updated_in_float32():
    """The result is that of float32 with the same inputs and weights, rounded once."""
    weight, x = torch.randn(24, 64).bfloat16(), torch.randn(2, 100, 64).bfloat16()
    model, wide = OneBlock(weight).bfloat16(), OneBlock(weight.float())
    prune_sparsegpt(model, [{"x": x}], "2:4", progress=False)
    prune_sparsegpt(wide, [{"x": x.float()}], "2:4", progress=False)
    assert torch.equal(model.linear.weight, wide.linear.weight.bfloat16())


def test_a_weight_that_underflows_stays():
    """What an update leaves of float16's smallest numbers often rounds to zero, which would spoil the count."""
    weight = 2.0**-24 * torch.randint(1, 4, (32, 64)) * torch.randn(32, 64).sign()
    model, x = OneBlock(weight).half(), torch.randn(2, 100, 8) @ torch.randn(8, 64)
    prune_sparsegpt(model, [{"x": x.half()}], progress=False)
    assert (model.linear.weight == 0).sum() == 1024


def test_under_autocast_the_numbers_are_those_without():
    weight, x = torch.randn(24, 64), torch.randn(2, 100, 64)
    model, plain = OneBlock(weight), OneBlock(weight)
    prune_sparsegpt(plain, [{"x": x}], progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prune_sparsegpt(model, [{"x": x}], progress=False)
    assert torch.equal(model.linear.weight, plain.linear.weight)


def test_dead_inputs():
    x, weight = torch.randn(2, 100, 32), 10 * torch.randn(12, 32)
    x[..., [3, 4, 5, 31]] = 0
    for pattern in ("unstructured", "4:8"):
        model = OneBlock(weight)
        prune_sparsegpt(model, [{"x": x}], pattern, progress=False)
        assert (model.linear.weight[:, [3, 4, 5, 31]] == 0).all()
        assert (model.linear.weight == 0).sum() == 192 and model.linear.weight.isfinite().all()
    model = OneBlock(weight)
    prune_sparsegpt(model, [{"x": torch.zeros(1, 4, 32)}], progress=False)  # nothing is alive
    assert (model.linear.weight == 0).sum() == 192


def test_budget_for_each_layer(tiny_llama):
    budget = {name: 0.3 + 0.01 * index for index, name in enumerate(block_linears(tiny_llama))}
    prune_sparsegpt(tiny_llama, random_batches(), sparsity=budget, progress=False)
    for name, linear in block_linears(tiny_llama).items():
        assert (linear.weight == 0).sum() == int(budget[name] * linear.weight.numel()), name


def test_an_interrupted_run_goes_on_and_gives_the_same_model(tmp_path, monkeypatch):
    batches = random_batches()
    expected = prune_sparsegpt(models.tiny_llama(), batches, "2:4", progress=False)
    model, real, calls = models.tiny_llama(), sparsegpt.factorize_, []

    def stops(*arguments):
        calls.append(arguments)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(sparsegpt, "factorize_", stops)
    with pytest.raises(KeyboardInterrupt):
        prune_sparsegpt(model, batches, "2:4", checkpoint_dir=tmp_path, progress=False)
    assert all(map(torch.equal, model.state_dict().values(), models.tiny_llama().state_dict().values()))
    with pytest.raises(ValueError, match="damping"):  # of another run
        prune_sparsegpt(model, batches, "2:4", damping=0.1, checkpoint_dir=tmp_path, progress=False)
    prune_sparsegpt(model, batches, "2:4", checkpoint_dir=tmp_path, progress=False)
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))
    assert len(calls) == 6 + 4  # the second block only


def test_what_was_done_is_in_the_config(tiny_llama):
    prune_sparsegpt(tiny_llama, random_batches(), block_size=16, measure_error=True, progress=False)
    facts = tiny_llama.config.peft_sparse["pruning"]
    assert (facts["method"], facts["pattern"], facts["group"], facts["sparsity"]) == (
        "sparsegpt", "unstructured", "layer", 0.5,
    )  # fmt: skip
    assert facts["settings"] == {"damping": 0.01, "block_size": 16, "match_authors": False}
    assert facts["calibration"]["tokens"] == 120 and all(0 < error < 1 for error in facts["errors"].values())
    other = models.tiny_llama()
    prune_wanda(other, random_batches(), group="layer", measure_error=True, progress=False)
    assert other.config.peft_sparse["pruning"]["group"] == "layer"


def test_target_modules(tiny_llama):
    prune_sparsegpt(tiny_llama, random_batches(), target_modules=["v_proj", "down_proj"], progress=False)
    for name, linear in block_linears(tiny_llama).items():
        assert bool((linear.weight == 0).any()) is name.endswith(("v_proj", "down_proj")), name


def test_linears_with_the_same_input_share_a_hessian(tiny_llama, monkeypatch):
    made, add = [], Hessian.add
    monkeypatch.setattr(Hessian, "add", lambda self, *rest: (made.append(self), add(self, *rest))[1])
    factors = []
    monkeypatch.setattr(sparsegpt, "factorize_", lambda *rest: factors.append(1) or factorize_(*rest))
    prune_sparsegpt(tiny_llama, random_batches(), progress=False)
    # q k v, o, gate up, down: four Hessians in each of two blocks
    assert len({id(hessian) for hessian in made}) == len(factors) == 8 and len(made) == 8 * 3


class Experts(nn.Module):
    """Two blocks of four experts; each token goes to one of them, so an expert may get none of a batch."""

    def __init__(self) -> None:
        super().__init__()

        def expert() -> nn.ModuleDict:
            return nn.ModuleDict({"gate": nn.Linear(16, 24), "up": nn.Linear(16, 24), "down": nn.Linear(24, 16)})

        self.layers = nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleDict({str(i): expert() for i in range(4)})}) for _ in range(2)
        )
        for layer in self.layers:
            layer.forward = lambda x, layer=layer: self.run(layer, x)

    def run(self, layer: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
        y, chosen = x.clone(), x[..., :4].argmax(-1)
        for i, expert in enumerate(layer["experts"].values()):
            tokens = x[chosen == i]
            if len(tokens):
                y[chosen == i] += expert["down"](expert["gate"](tokens).relu() * expert["up"](tokens))
        return y

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_experts_count_their_own_tokens():
    model = Experts()
    batches = [{"x": torch.randn(2, length, 16)} for length in (30, 3, 1, 20)]
    seen: list[list[torch.Tensor]] = [[] for _ in range(4)]
    dense = copy.deepcopy(model.layers[0])
    for batch in batches:
        chosen = batch["x"][..., :4].argmax(-1)
        for i in range(4):
            seen[i].append(batch["x"][chosen == i])
    prune_sparsegpt(model, batches, progress=False)
    for name, linear in block_linears(model).items():
        assert (linear.weight == 0).sum() == linear.weight.numel() // 2, name
    for i in range(4):
        hessian = Hessian(16)
        for tokens in seen[i]:
            if len(tokens):
                hessian.update(tokens)
        factor = factorize_(hessian.matrix, hessian.matrix.diagonal().clone(), 0.01)
        for which in ("gate", "up"):
            weight = dense["experts"][str(i)][which].weight.detach()
            found = prune_and_reconstruct(weight, factor, parse_pattern("unstructured"), 0.5)
            torch.testing.assert_close(model.layers[0]["experts"][str(i)][which].weight.detach(), found)


def test_hessians_live_for_one_block(tiny_llama, monkeypatch):
    """When a block's statistics are gathered, those of the block before are gone; afterwards all are."""
    alive: list[weakref.ref] = []
    most, make = [], sharing.Hessian.__init__

    def made(self, *rest):
        gc.collect()
        most.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(self))
        make(self, *rest)

    monkeypatch.setattr(sharing.Hessian, "__init__", made)
    prune_sparsegpt(tiny_llama, random_batches(), progress=False)
    gc.collect()
    assert most == [0, 1, 2, 3, 0, 1, 2, 3]
    assert not any(ref() is not None for ref in alive)


def test_a_failed_factorisation_gets_more_damping_and_a_warning():
    model = OneBlock(torch.randn(8, 16))
    same = torch.ones(1, 40, 16)  # every input column the same: a Hessian of rank 1
    with pytest.warns(
        UserWarning, match=r"inputs of `blocks.0.0` is not positive definite with damping 0; trying 0.01"
    ):
        prune_sparsegpt(model, [{"x": same}], damping=0.0, progress=False)
    expected = OneBlock(torch.zeros(8, 16))
    assert (model.linear.weight == 0).sum() == 64 and model.linear.weight.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_sparsegpt(expected, [{"x": same}], progress=False)  # the default is enough


def test_tries_are_bounded_and_the_model_is_as_it_was(tiny_llama, monkeypatch):
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    calls, real = [], sparsegpt.factorize_

    def fails_in_the_second_block(hessian, diagonal, damping, size):
        calls.append(damping)
        return real(hessian, diagonal, damping, size) if len(calls) <= 4 else None

    monkeypatch.setattr(sparsegpt, "factorize_", fails_in_the_second_block)
    message = (
        r"`model.layers.1.self_attn.q_proj` is not positive definite with damping 0.01, 0.1, 1, 10, 100; give more"
    )
    with pytest.warns(UserWarning, match="layers.1.self_attn.q_proj"), pytest.raises(RuntimeError, match=message):
        prune_sparsegpt(tiny_llama, random_batches(), progress=False)
    assert len(calls) == 4 + sparsegpt.MAX_TRIES
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_llama.state_dict().items())


def test_infinite_results_are_refused():
    weight = torch.full((4, 16), 6e4).half()
    model = OneBlock(weight).half()
    x = torch.randn(1, 200, 1).expand(1, 200, 16) + 0.01 * torch.randn(1, 200, 16)
    with pytest.raises(ValueError, match=r"infinite torch.float16 ones in `blocks.0.0`; load the model in float32"):
        prune_sparsegpt(model, [{"x": x.half()}], progress=False)
    assert torch.equal(model.linear.weight, weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"lies in \[0, 1\), got 1.0"),
        ({"pattern": "4:2"}, "0 < N < M, got 4:2"),
        ({"pattern": "2:4", "sparsity": 0.25}, "fixes the sparsity at 0.5"),
        ({"pattern": "1:5"}, r"divisible by 5, got 32 in `model.layers.0.self_attn.q_proj`; .* `exclude_modules`"),
        ({"group": "column"}, "'layer' .* or 'row' .*, got 'column'"),
        ({"pattern": "2:4", "group": "layer"}, "each M weights compete with each other, got 2:4 with group='layer'"),
        ({"group": "row", "match_authors": True}, "got group='row'; leave one of the two out"),
        ({"damping": -0.1}, "at least 0, got -0.1"),
        ({"damping": torch.inf}, "at least 0, got inf"),
        ({"damping": 10**400}, "at least 0, got 1000"),
        ({"block_size": 0}, "counts columns, at least 1, got 0"),
        ({"sparsity": {"model.layers.0.self_attn.q_proj": 0.5}}, "."),
    ],
)
def test_errors_leave_the_model_untouched(tiny_llama, arguments, message: str):
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        prune_sparsegpt(tiny_llama, random_batches(), progress=False, **arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_llama.state_dict().items())


@pytest.mark.parametrize("batches", [[], [{"input_ids": torch.ones(2, 3)[None].long() * 0, "x": "no"}]])
def test_bad_batches(tiny_llama, batches):
    with pytest.raises(ValueError, match=r"[Cc]alibration"):
        prune_sparsegpt(tiny_llama, batches, progress=False)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_beats_magnitude_and_wanda_on_a_trained_model(llama_dir, shared, pattern: str):
    """On text that calibration has not seen."""
    ids = AutoTokenizer.from_pretrained(llama_dir)((shared / "data/tinystories/sample_a.txt").read_text()[:60000])
    ids = torch.tensor(ids["input_ids"])
    held_out, batches = ids[:1024], [{"input_ids": rows} for rows in ids[2048 : 2048 + 48 * 256].reshape(12, 4, 256)]

    def pruned(prune, *arguments, **options) -> float:
        model = AutoModelForCausalLM.from_pretrained(llama_dir)
        return perplexity(prune(model, *arguments, pattern=pattern, **options), held_out, progress=False)

    by_magnitude = pruned(prune_magnitude)
    by_wanda = pruned(prune_wanda, batches, progress=False)
    by_sparsegpt = pruned(prune_sparsegpt, batches, progress=False)
    assert by_sparsegpt < 0.7 * by_magnitude
    assert by_sparsegpt < by_wanda
