"""Blocks are found by structure: in many architectures, under PEFT's wrappers, and nowhere else."""

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from renamed import mixtral, zamba
from torch import nn
from transformers import (
    BartConfig,
    BartModel,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from benchmarks.architectures import ARCHITECTURES
from peft_sparse import PstConfig, prune_magnitude
from peft_sparse.linears import (
    block_experts,
    block_linear_names,
    block_linears,
    find_block_lists,
    is_linear,
    linears_inside,
    unwrap,
)

import models

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def opt():
    return OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=16))


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, intermediate_size=24, num_key_value_heads=1))


def roberta():
    return RobertaForSequenceClassification(RobertaConfig(**SIZES, intermediate_size=24))


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))


def bart():
    sizes = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    return BartModel(BartConfig(vocab_size=32, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, **sizes))


LISTS = [
    (models.tiny_llama, ["model.layers"], 7),
    (models.tiny_gpt2, ["transformer.h"], 4),
    (models.tiny_bert, ["bert.encoder.layer"], 6),
    (roberta, ["roberta.encoder.layer"], 6),
    (opt, ["model.decoder.layers"], 6),
    (qwen2, ["model.layers"], 7),
    (t5, ["encoder.block", "decoder.block"], 6 + 10),
    (bart, ["encoder.layers", "decoder.layers"], 6 + 10),
]


@pytest.mark.parametrize(("factory", "lists", "per_layer"), LISTS, ids=[case[0].__name__ for case in LISTS])
def test_lists_and_linears(factory, lists: list[str], per_layer: int):
    model = factory()
    assert [block_list.name for block_list in find_block_lists(model)] == lists
    linears = block_linears(model)
    assert len(linears) == 2 * per_layer
    assert all(model.get_submodule(name) is linear for name, linear in linears.items())
    assert not any(word in name for name in linears for word in ("pooler", "classifier", "lm_head", "embed", "score"))


@pytest.mark.parametrize("factory", [case[0] for case in LISTS])
def test_names_for_peft_match_these_and_no_others(factory):
    model = factory()
    expected = set(block_linears(model))
    wrapped = get_peft_model(model, LoraConfig(target_modules=block_linear_names(model))).get_base_model()
    adapted = {name for name, module in wrapped.named_modules() if hasattr(module, "lora_A")}
    assert adapted == expected


def test_the_pooler_s_dense_is_not_meant(tiny_bert):
    assert "dense" not in block_linear_names(tiny_bert)
    assert "attention.output.dense" in block_linear_names(tiny_bert)


def test_full_names_where_a_path_also_fits_outside():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(2, 2)}) for _ in range(2))
    model.head = nn.ModuleDict({"up": nn.Linear(2, 2)})
    assert block_linear_names(model) == {"layers.0.up", "layers.1.up"}


def test_under_a_tuner_the_wrapped_linears_are_found(tiny_llama):
    plain = block_linears(tiny_llama)
    weights = {name: linear.weight for name, linear in plain.items()}
    adapted = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"])).get_base_model()
    found = block_linears(adapted)
    assert list(found) == list(plain)
    assert all(unwrap(found[name]).weight is weight for name, weight in weights.items())


def test_lists_that_are_no_blocks():
    model = nn.Module()
    model.linears = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model.norms = nn.ModuleList([nn.LayerNorm(2)])
    model.mixed = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.LayerNorm(2)])
    model.empty = nn.ModuleList()
    assert find_block_lists(model) == []
    assert block_linears(model) == {}
    assert set(linears_inside(model)) == {"linears.0", "linears.1", "mixed.0.0"}
    with pytest.raises(ValueError, match=r"Module has no list of such blocks; name the linears .* `target_modules`"):
        block_linear_names(model)


def test_lists_in_a_list_are_lists_of_their_own():
    model = nn.Module()
    model.stages = nn.ModuleList(nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3)) for _ in range(2))
    assert [block_list.name for block_list in find_block_lists(model)] == ["stages.0", "stages.1"]
    assert list(block_linears(model)) == [f"stages.{stage}.{index}.0" for stage in range(2) for index in range(3)]


def test_a_list_inside_a_block_is_part_of_the_block():
    model, block = nn.Module(), nn.Module()
    block.experts = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))
    model.layers = nn.ModuleList([block])
    assert [block_list.name for block_list in find_block_lists(model)] == ["layers"]
    assert list(block_linears(model)) == [f"layers.0.experts.{index}.0" for index in range(3)]


def test_experts_are_neither_convolutions_nor_adapters_nor_vectors():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.conv = nn.Linear(8, 8), nn.Conv1d(8, 8, 3)
            self.mix = nn.Parameter(torch.ones(1, 1, 8))
            self.experts = nn.Parameter(torch.ones(2, 4, 8))

    model = nn.Sequential(nn.ModuleList([Block(), Block()]))
    expected = ["0.0.experts", "0.1.experts"]
    assert list(block_experts(model)) == expected
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["linear"])).base_model.model
    for block in adapted[0]:
        block.linear.of_three_dimensions = nn.Parameter(torch.ones(2, 2, 2))
    assert list(block_experts(adapted)) == expected


def test_parameters_of_several_heads_are_no_experts():
    model = zamba()
    assert any(parameter.dim() == 3 and min(parameter.shape) > 1 for parameter in model.parameters())
    assert not block_experts(model)
    assert len(block_experts(mixtral())) == 4


class Logged(nn.Linear):
    def forward(self, x):
        return super().forward(x)


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


class Router(nn.Linear):
    def forward(self, x):
        scores = super().forward(x)
        return scores, scores.softmax(-1)


@pytest.mark.parametrize(("cls", "linear"), [(Logged, True), (Halved, False), (Router, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_subclass_is_a_linear_if_its_own_forward_is_one(cls, linear, dtype):
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), cls(8, 6)).to(dtype) for _ in range(2))
    names = [f"layers.{index}.{child}" for index in range(2) for child in ([0, 1] if linear else [0])]
    assert list(block_linears(model)) == names
    if not linear:
        with pytest.raises(
            ValueError, match=rf"got {cls.__name__} in `layers\.0\.1`, whose own forward is not x W\^T"
        ):
            get_peft_model(model, PstConfig(target_modules=r"layers\.\d\.1"))


@pytest.mark.parametrize(("cls", "linear"), [(Logged, True), (Halved, False), (Router, False)])
def test_a_subclass_is_the_same_on_every_device(cls, linear):
    """Also where its weight is not at hand: on the meta device, and where accelerate has offloaded it."""
    with torch.device("meta"):
        assert is_linear(cls(4096, 16384)) is linear
    offloaded = nn.Sequential(cls(128, 96, bias=False))
    cpu_offload(offloaded, execution_device="cpu")
    assert offloaded[0].weight.is_meta and is_linear(offloaded[0]) is linear


@pytest.mark.parametrize("name", ["Falcon", "Llama 4 (text)", "PhiMoE"])
def test_a_model_on_the_meta_device_has_the_same_linears(name):
    architecture = ARCHITECTURES[name]
    with torch.device("meta"):
        on_meta = architecture.build()
    assert list(block_linears(on_meta)) == list(block_linears(architecture.build()))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(4))
        self.gate, self.gate_proj = nn.Sequential(nn.Linear(8, 4)), nn.Linear(8, 8)
        self.shared_expert_gate, self.output_gate = nn.Linear(8, 1), nn.Linear(8, 8)


def blocks_with_routers():
    model, block = nn.Module(), nn.Module()
    block.gate, block.gate_proj = nn.Linear(8, 8), nn.Linear(8, 8)
    block.moe, block.mlp = Experts(), nn.ModuleDict({"router_gate": nn.Linear(8, 6), "up": nn.Linear(8, 8)})
    model.layers = nn.ModuleList([block])
    return model


def test_routers_are_no_targets_unless_they_are_named():
    """Nor gates of experts; those of an MLP and of attention are."""
    model = blocks_with_routers()
    routers = block_linears(model, routers=True).keys() - block_linears(model).keys()
    assert routers == {f"layers.0.{n}" for n in ("moe.gate.0", "moe.shared_expert_gate", "mlp.router_gate")}
    assert not any(f".{router}".endswith(f".{name}") for router in routers for name in block_linear_names(model))
    with pytest.warns(UserWarning, match=r"3 linears stay dense, such as `layers\.0\.mlp\.router_gate`"):
        prune_magnitude(model, sparsity=0.5)
    assert all((linear.weight == 0).any() == (name not in routers) for name, linear in linears_inside(model).items())
    with pytest.warns(UserWarning, match=r"`layers\.\*\.moe\.gate\.0`, .* get no adapter"):
        adapted = get_peft_model(model, PstConfig()).base_model.model
    assert {n for n, m in adapted.named_modules() if isinstance(m, BaseTunerLayer)} == block_linears(model).keys()

    model = blocks_with_routers()
    prune_magnitude(model, sparsity=0.5, target_modules=["router_gate"])
    assert (model.layers[0].mlp["router_gate"].weight == 0).sum() == 24
    adapted = get_peft_model(model, PstConfig(target_modules=["router_gate"])).base_model.model
    assert isinstance(adapted.layers[0].mlp["router_gate"], BaseTunerLayer)


def test_real_routers():
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    switch = SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(**sizes, num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
    )
    for model in (switch, ARCHITECTURES["Qwen2-MoE"].build()):
        routers = block_linears(model, routers=True).keys() - block_linears(model).keys()
        assert {name.split(".")[-1] for name in routers} in ({"classifier"}, {"shared_expert_gate"})
