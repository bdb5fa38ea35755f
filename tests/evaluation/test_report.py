"""The report counts what is there: in memory, under adapters, and on disk."""

import copy
import json

import peft
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.architectures import ARCHITECTURES
from peft_sparse import SppConfig
from peft_sparse.evaluation import sparsity_report, verify_sparsity
from peft_sparse.linears import block_linears, get_weight
from peft_sparse.pruning import prune_magnitude

import models

FACTORIES = [models.tiny_llama, models.tiny_gpt2, models.tiny_bert]


@pytest.mark.parametrize("factory", FACTORIES)
def test_a_model_in_memory(factory):
    model = prune_magnitude(factory(), sparsity=0.7)
    report, linears = sparsity_report(model), block_linears(model)
    assert [layer.name for layer in report.layers] == list(linears)
    for layer, linear in zip(report.layers, linears.values(), strict=True):
        assert layer.shape == tuple(get_weight(linear).shape)
        assert layer.zeros == int(0.7 * linear.weight.numel())
    weights = sum(linear.weight.numel() for linear in linears.values())
    assert report.total_sparsity == pytest.approx(0.7, abs=1e-3)
    assert report.total_numel == weights
    assert report.outside == sum(parameter.numel() for parameter in model.parameters()) - weights
    assert report.pattern == "unstructured"


@pytest.mark.parametrize("factory", FACTORIES)
def test_a_model_on_disk_gives_the_same(factory, tmp_path):
    model = prune_magnitude(factory(), "2:4")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    stored, in_memory = sparsity_report(tmp_path), sparsity_report(model)
    assert sorted(stored.layers, key=lambda x: x.name) == sorted(in_memory.layers, key=lambda x: x.name)
    assert (stored.total_sparsity, stored.outside, stored.pattern) == (0.5, in_memory.outside, "2:4")
    assert sparsity_report(str(tmp_path)).notes == []


@pytest.mark.parametrize("config", [None, {}, {"architectures": ["NobodysModel"]}])
def test_a_folder_that_does_not_say_what_it_is(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a.weight": torch.eye(4), "a.bias": torch.zeros(4)}, tmp_path / "model.safetensors")
    report = sparsity_report(tmp_path)
    assert [(layer.name, layer.zeros) for layer in report.layers] == [("a", 12)]
    assert (report.outside, report.outside_zeros) == (4, 4)
    assert "config.json does not tell" in str(report)


def test_weights_that_do_not_fit_their_config(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    tensors = {f"other.{name}": tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert "config.json does not tell" in sparsity_report(tmp_path).notes[0]


def test_paths_that_are_refused(tmp_path, tiny_llama):
    with pytest.raises(ValueError, match=r"a folder, got .*nowhere"):
        sparsity_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"model\*.safetensors, got none"):
        sparsity_report(tmp_path)
    (tmp_path / "sparse_model.safetensors").touch()
    with pytest.raises(ValueError, match=r"packed model has a config.json .* without one"):
        sparsity_report(tmp_path)
    get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="got an adapter"):
        sparsity_report(tmp_path / "adapter")


QUANTISED = [
    ({"quant_method": "gptq", "bits": 4}, r"where gptq has quantised them; read the model before it is quantised"),
    ({"quant_method": "awq", "bits": 4}, "where awq has"),
    ({"quant_method": "bitsandbytes"}, "where bitsandbytes has quantised them; load the model with transformers and"),
    ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}}, "where compressed-tensors has"),
    ({"bits": 4}, "where somebody has"),
]


@pytest.mark.parametrize(("entry", "message"), QUANTISED)
def test_a_quantised_folder_is_refused(tmp_path, tiny_llama, entry, message):
    tiny_llama.save_pretrained(tmp_path / "dense")
    tiny_llama.save_pretrained(tmp_path / "codes")
    tensors = load_file(tmp_path / "codes" / "model.safetensors")
    for name in [name for name in tensors if "_proj." in name]:
        tensors[name.replace("weight", "qweight")] = tensors.pop(name)[:, ::8].int()
        tensors[name.replace("weight", "scales")] = torch.ones(1, 32)
    save_file(tensors, tmp_path / "codes" / "model.safetensors")
    config = json.loads((tmp_path / "codes" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "codes" / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    for read in (sparsity_report, lambda folder: verify_sparsity(folder, reference=tmp_path / "dense")):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "codes")


@pytest.mark.parametrize("entry", [["wanda"], "wanda", 1, {"errors": [0.1]}, None])
def test_facts_of_somebody_else(tiny_llama, tmp_path, entry):
    tiny_llama.config.peft_sparse = {"pruning": entry}
    tiny_llama.save_pretrained(tmp_path)
    for source in (tiny_llama, tmp_path):
        assert {layer.error for layer in sparsity_report(source).layers} == {None}


def test_a_model_without_linears():
    with pytest.raises(ValueError, match="at least one linear, got none in Embedding"):
        sparsity_report(nn.Embedding(3, 4))


@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_that_was_never_loaded(adapted):
    with torch.device("meta"):
        model = models.tiny_llama()
    if adapted:
        model = get_peft_model(model, SppConfig(), low_cpu_mem_usage=True)
    for check in (sparsity_report, verify_sparsity):
        with pytest.raises(ValueError, match=r"got `model.layers.0.self_attn.q_proj`, which is on the meta device"):
            check(model)


def test_an_adapter_on_parameters_is_refused():
    """It hid the experts, and its own factors were counted in their place."""
    model = ARCHITECTURES["Mixtral (MoE)"].build()
    before = sparsity_report(model).to_dict()
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    adapted = get_peft_model(model, config)
    with pytest.raises(ValueError, match=r"parameter `model.layers.0.mlp.experts.gate_up_proj`, which .* first"):
        sparsity_report(adapted)
    assert sparsity_report(adapted.merge_and_unload()).to_dict() == before


@pytest.mark.parametrize("factory", FACTORIES)
def test_lora_fills_the_zeros_of_the_layers_it_adapts(factory):
    """Unmerged, disabled, merged and unloaded: always the weight that the forward uses."""
    dense_name = "attn.c_proj" if factory is models.tiny_gpt2 else "q_proj|query"
    model = get_peft_model(
        prune_magnitude(factory(), sparsity=0.5),
        LoraConfig(target_modules=rf".*({dense_name})", init_lora_weights=False),
    )
    filled = {layer.name for layer in sparsity_report(model).layers if layer.zeros == 0}
    assert len(filled) == 2
    with model.disable_adapter():
        assert sparsity_report(model).total_sparsity == pytest.approx(0.5, abs=1e-3)
    unmerged = sparsity_report(model)
    model.merge_adapter()
    assert sparsity_report(model).layers == unmerged.layers
    model.unmerge_adapter()
    unloaded = sparsity_report(model.merge_and_unload())
    assert unloaded.layers == unmerged.layers
    assert unloaded.outside == unmerged.outside


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.HiraConfig(target_modules=["q_proj"], init_weights=False),
        lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8, init_weights=False),
        lambda: peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=4),
        lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], init_ia3_weights=False),
        lambda: LoraConfig(target_modules=["q_proj"], use_dora=True, init_lora_weights=False),
    ],
)
def test_other_methods_of_peft_have_the_zeros_that_they_merge_to(tiny_llama, config):
    """What they call a delta weight is not always added."""
    model = get_peft_model(prune_magnitude(tiny_llama, "2:4"), config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "boft_R" in name:
                parameter.normal_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unmerged = sparsity_report(model)
    assert sparsity_report(cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))) == unmerged
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.get_model_status().merged_adapters
    assert sparsity_report(model.merge_and_unload()) == unmerged


def test_factors_that_were_never_loaded(tiny_llama):
    model = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"]))
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A.to("meta")
    with pytest.raises(ValueError, match=r"got `model.layers.0.self_attn.q_proj`, which is on the meta device"):
        sparsity_report(model)


def test_the_zeros_of_unmerged_pst_are_those_after_merging(tiny_llama):
    from peft_sparse import PstConfig

    model = get_peft_model(tiny_llama, PstConfig(sparsity=0.75))
    model.base_model.set_sparsity_step(100, 100)
    unmerged = sparsity_report(model)
    assert unmerged.total_sparsity == pytest.approx(0.75, abs=1e-3)
    assert sparsity_report(model.merge_and_unload()).layers == unmerged.layers


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (models.tiny_bert, ["classifier"]),
        (models.tiny_llama, ["up_proj"]),
        (models.tiny_llama, ["layers.1", "lm_head"]),
        (ARCHITECTURES["Mixtral (MoE)"].build, ["experts"]),
    ],
)
def test_modules_that_are_trained_whole_count_once(build, names):
    """PEFT keeps the module and a copy for each adapter; the forward uses one of them."""
    settings = {"target_modules": ["q_proj", "query"], "layers_to_transform": [0], "modules_to_save": names}
    base = prune_magnitude(build(), "2:4")
    before, copied = sparsity_report(base), copy.deepcopy(base)
    model = get_peft_model(base, SppConfig(**settings))
    model.add_adapter("other", SppConfig(**settings))
    model.set_adapter("other")
    assert sparsity_report(model) == before
    assert verify_sparsity(model, reference=copied).ok
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.other" in name:
                parameter.zero_()
    trained = sparsity_report(model)
    with model.disable_adapter():
        assert sparsity_report(model) == before
    unloaded = sparsity_report(model.merge_and_unload())
    assert trained != before and trained == unloaded


def test_the_table(tiny_llama):
    lines = str(sparsity_report(prune_magnitude(tiny_llama, "2:4"))).splitlines()
    assert lines[0].split() == ["layer", "shape", "zeros", "sparsity", "pattern"]
    assert lines[1].split() == ["model.layers.0.self_attn.q_proj", "32", "x", "32", "512", "50.00%", "2:4"]
    assert lines[-2].split() == ["total", "7,680", "50.00%", "2:4"]
    assert (
        lines[-1] == "not counted: 6,304 parameters outside of these weights, 0.51% of them zero"
    )  # the padding embedding
    assert len({line.index("%") for line in lines[1:-1]}) == 1


def test_a_long_table_has_a_row_for_each_place():
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)}) for _ in range(30))
    prune_magnitude(model, exclude_modules=["blocks.0.up"])
    report = sparsity_report(model)
    lines = str(report).splitlines()
    assert len(report.layers) == 60
    assert len(lines) == 5
    assert lines[1].split() == [
        *["blocks.*.up", "30", "of", "6", "x", "4", "348", "0.00%", "to", "50.00%"],
        *lines[1].split()[10:],
    ]
    assert "dense" in lines[1]


def test_to_dict_is_json(tiny_bert):
    data = json.loads(json.dumps(sparsity_report(prune_magnitude(tiny_bert)).to_dict()))
    assert data["total_sparsity"] == 0.5
    assert data["layers"][0]["shape"] == [32, 32]
    assert data["layers"][0]["sparsity"] == 0.5
