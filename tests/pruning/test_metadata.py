"""What a pruned model says about itself, and the error of each layer's output."""

import json
from importlib.metadata import version
from types import MappingProxyType

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from benchmarks.architectures import ARCHITECTURES
from peft_sparse import calibration_batches, owl_sparsity, prune_magnitude, prune_wanda, sparsity_report
from peft_sparse.linears import block_linears, get_weight

import models


def batches(padding: bool = False) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = [{"input_ids": torch.randint(3, models.VOCAB_SIZE, (2, 10), generator=generator)} for _ in range(3)]
    for batch in made if padding else ():
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1, 6:] = 0
    return made


def facts_of(model: nn.Module) -> dict:
    return model.config.peft_sparse["pruning"]


@pytest.mark.parametrize("factory", [models.tiny_llama, models.tiny_gpt2, models.tiny_bert])
def test_facts_survive_saving(factory, tmp_path):
    model = prune_wanda(factory(), batches(), sparsity=0.6, measure_error=True, progress=False)
    facts = facts_of(model)
    assert {key: facts[key] for key in ("method", "pattern", "group", "sparsity", "modules", "version")} == {
        "method": "wanda",
        "pattern": "unstructured",
        "group": "row",
        "sparsity": 0.6,
        "modules": len(block_linears(model)),
        "version": version("peft-sparse"),
    }
    assert (facts["calibration"]["sequences"], facts["calibration"]["tokens"]) == (6, 60)
    assert len(facts["calibration"]["sha256"]) == 64
    assert facts["errors"].keys() == block_linears(model).keys()
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config.peft_sparse == model.config.peft_sparse
    assert json.loads((tmp_path / "config.json").read_text())["peft_sparse"]["pruning"] == facts


def test_facts_of_magnitude(tiny_llama):
    facts = facts_of(prune_magnitude(tiny_llama, "2:4"))
    assert (facts["method"], facts["pattern"], facts["sparsity"]) == ("magnitude", "2:4", 0.5)
    assert "calibration" not in facts and "errors" not in facts


def test_a_budget_is_written_out(tiny_llama):
    budget = owl_sparsity(tiny_llama, batches(), 0.7)
    assert facts_of(prune_wanda(tiny_llama, batches(), sparsity=budget, progress=False))["sparsity"] == budget


def test_padding_and_other_data():
    def calibration(data):
        return facts_of(prune_wanda(models.tiny_llama(), data, progress=False))["calibration"]

    padded = calibration(batches(padding=True))
    assert padded["tokens"] == 48
    assert calibration(batches(padding=True)) == padded
    assert calibration(batches())["sha256"] != padded["sha256"]
    assert calibration(batches()[::-1])["sha256"] != calibration(batches())["sha256"]


def test_what_has_no_tokens():
    """The channels of an image are none."""
    images = [{"pixel_values": torch.randn(2, 3, 16, 16)}]
    facts = facts_of(prune_wanda(ARCHITECTURES["ViT"].build(), images, progress=False))["calibration"]
    assert facts.keys() == {"sequences", "sha256"} and facts["sequences"] == 2
    embeds = [{"inputs_embeds": torch.randn(2, 10, 32)}]
    assert facts_of(prune_wanda(models.tiny_llama(), embeds, progress=False))["calibration"]["tokens"] == 20


def test_earlier_runs_are_remembered(tiny_llama):
    prune_magnitude(tiny_llama, sparsity=0.3, target_modules=["q_proj"])
    prune_wanda(tiny_llama, batches(), exclude_modules=["q_proj"], measure_error=True, progress=False)
    prune_magnitude(tiny_llama, sparsity=0.9)
    facts = facts_of(tiny_llama)
    assert (facts["method"], facts["sparsity"]) == ("magnitude", 0.9)
    assert [(run["method"], run["modules"]) for run in facts["earlier"]] == [("magnitude", 2), ("wanda", 12)]
    assert not any({"errors", "earlier"} & run.keys() for run in facts["earlier"])


def test_what_else_is_in_the_config_stays(tiny_llama):
    tiny_llama.config.peft_sparse = {"format": "packed", "version": 1}
    prune_magnitude(tiny_llama)
    assert tiny_llama.config.peft_sparse.keys() == {"format", "version", "pruning"}


@pytest.mark.parametrize("entry", ["wanda", ["wanda"], {"pruning": ["wanda"]}, {"pruning": "wanda"}])
def test_an_entry_of_somebody_else_gives_way(tiny_llama, entry):
    tiny_llama.config.peft_sparse = entry
    facts = facts_of(prune_magnitude(tiny_llama))
    assert facts["method"] == "magnitude" and "earlier" not in facts


def test_nothing_is_written_after_an_error(tiny_llama):
    with torch.no_grad():
        tiny_llama.model.layers[1].post_attention_layernorm.weight[3] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        prune_wanda(tiny_llama, batches(), progress=False)
    assert not hasattr(tiny_llama.config, "peft_sparse")


class NoConfig(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(2)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_a_model_without_config():
    model = prune_wanda(NoConfig(), [{"x": torch.randn(2, 5, 8)}], measure_error=True, progress=False)
    assert not hasattr(model, "config")
    assert all(layer.error is None for layer in sparsity_report(model).layers)
    prune_magnitude(model)


@pytest.mark.parametrize("config", [{"a": 1}, MappingProxyType({"a": 1})], ids=["dictionary", "frozen"])
def test_a_config_of_another_kind_stays(config):
    """What is no config of transformers is no place to write to, and may refuse it when all is pruned."""
    model = NoConfig()
    model.config = config
    prune_magnitude(prune_wanda(model, [{"x": torch.randn(2, 5, 8)}], progress=False))
    assert config == {"a": 1}


# Errors


def naive_errors(dense: nn.Module, data, sparsity: float) -> dict[str, float]:
    """Block by block: inputs of the block's linears while it is dense and the blocks before it are pruned."""
    model, errors = dense, {}
    for block in (".0.", ".1."):
        linears = {name: linear for name, linear in block_linears(model).items() if block in name}
        inputs: dict[str, list[torch.Tensor]] = {name: [] for name in linears}
        hooks = [
            linear.register_forward_pre_hook(lambda _, args, kept=inputs[name]: kept.append(args[0].clone()))
            for name, linear in linears.items()
        ]
        for batch in data:
            with torch.no_grad():
                model(**batch)
        for hook in hooks:
            hook.remove()
        for name, linear in linears.items():
            x = torch.cat([piece.flatten(0, 1) for piece in inputs[name]]).double()
            weight = get_weight(linear).detach()
            order = (weight.abs() * x.square().sum(0).sqrt().float()).argsort(dim=1, stable=True)
            pruned = weight.scatter(1, order[:, : int(sparsity * weight.shape[1])], 0.0).double()
            errors[name] = float((x @ (pruned - weight.double()).T).norm() / (x @ weight.double().T).norm())
            get_weight(linear).data.copy_(pruned)
    return errors


@pytest.mark.parametrize("factory", [models.tiny_llama, models.tiny_gpt2])
def test_errors_against_a_plain_computation(factory):
    model = prune_wanda(factory(), batches(), sparsity=0.6, measure_error=True, progress=False)
    expected = naive_errors(factory(), batches(), 0.6)
    assert facts_of(model)["errors"] == pytest.approx(expected, rel=1e-4)


def test_no_error_where_nothing_is_pruned(tiny_llama):
    prune_wanda(tiny_llama, batches(), sparsity=0.0, measure_error=True, progress=False)
    assert set(facts_of(tiny_llama)["errors"].values()) == {0.0}


def test_errors_of_a_trained_model_grow_with_sparsity(llama_dir, shared):
    """Thousands of tokens, so that the sketch is not exact: near the plain computation all the same."""
    text = (shared / "data/tinystories/sample_a.txt").read_text()
    data = calibration_batches(text, AutoTokenizer.from_pretrained(llama_dir), 16, length=256, batch_size=4)
    errors = {}
    for sparsity in (0.3, 0.6):
        model = AutoModelForCausalLM.from_pretrained(llama_dir)
        prune_wanda(model, data, sparsity=sparsity, measure_error=True, progress=False)
        errors[sparsity] = facts_of(model)["errors"]
    assert all(errors[0.3][name] < error < 1 for name, error in errors[0.6].items())
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    linear = model.model.layers[0].self_attn.q_proj
    inputs: list[torch.Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    hook.remove()
    x, dense = torch.cat(inputs).double(), linear.weight.detach().double().clone()
    prune_wanda(model, data, sparsity=0.6, progress=False)
    expected = (x @ (linear.weight.detach().double() - dense).T).norm() / (x @ dense.T).norm()
    assert errors[0.6]["model.layers.0.self_attn.q_proj"] == pytest.approx(float(expected), rel=0.05)


# The report


def test_the_report_shows_errors(tiny_llama, tmp_path):
    model = prune_wanda(tiny_llama, batches(), sparsity=0.6, measure_error=True, progress=False)
    report = sparsity_report(model)
    errors = facts_of(model)["errors"]
    assert {layer.name: layer.error for layer in report.layers} == errors
    table = str(report)
    assert table.splitlines()[0].split() == ["layer", "shape", "zeros", "sparsity", "pattern", "error"]
    assert table.splitlines()[1].split()[-1] == f"{errors['model.layers.0.self_attn.q_proj']:.3f}"
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["error"] == errors[report.layers[0].name]
    model.save_pretrained(tmp_path)
    assert {layer.name: layer.error for layer in sparsity_report(tmp_path).layers} == errors
    assert {x.name: x.error for x in sparsity_report(LlamaForCausalLM.from_pretrained(tmp_path)).layers} == errors


@pytest.mark.parametrize("whole", [True, False])
def test_names_of_a_compiled_model(tiny_llama, tmp_path, whole):
    """Its wrappers are in the names of its modules, and are not there after a reload."""
    model, blocks = tiny_llama, tiny_llama.model.layers
    names = list(block_linears(tiny_llama))
    if whole:
        model = torch.compile(tiny_llama, backend="eager")
    else:
        blocks[0] = torch.compile(blocks[0], backend="eager")
    budget = {".*up_proj": 0.6, ".*": 0.4}
    prune_wanda(model, batches(), sparsity=budget, measure_error=True, progress=False)
    errors = facts_of(model)["errors"]
    assert set(errors) == set(facts_of(model)["sparsity"]) == set(names)
    assert [layer.error for layer in sparsity_report(model).layers] == [errors[name] for name in names]
    blocks[0] = getattr(blocks[0], "_orig_mod", blocks[0])
    tiny_llama.save_pretrained(tmp_path)
    assert {layer.name: layer.error for layer in sparsity_report(tmp_path).layers} == errors


def test_the_report_without_errors_is_as_before(tiny_llama):
    assert "error" not in str(sparsity_report(prune_wanda(tiny_llama, batches(), progress=False)))
