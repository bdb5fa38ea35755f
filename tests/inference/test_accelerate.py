"""accelerate_sparse on whole models: same function, same weights, a way back, and choices that were measured."""

import copy
import json

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_sparse import (
    SppConfig,
    accelerate_sparse,
    load_sparse,
    pack_model,
    prune_magnitude,
    remove_acceleration,
    save_sparse,
    sparsity_report,
    unpack_model,
)
from peft_sparse.inference import choose, decide
from peft_sparse.linears import OPERANDS, PackedLinear, acceleration_of, block_linears
from peft_sparse.linears.operands import CsrOperand
from peft_sparse.native import use_native

from models import tiny_bert, tiny_gpt2, tiny_llama

MODELS = [tiny_llama, tiny_gpt2, tiny_bert]
each_model = pytest.mark.parametrize("make", MODELS)
IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def used(model):
    return [name for name, module in model.named_modules() if acceleration_of(module) is not None]


@pytest.fixture(autouse=True)
def small_layers(monkeypatch):
    """Are tried as well: those of tiny models."""
    monkeypatch.setattr(decide, "MIN_NUMEL", 1)


@pytest.fixture
def ratios(monkeypatch):
    """Say what is measured: `ratios["csr"]` for all times, or a list for one after the other."""
    said: dict[str, float | list[float]] = {"csr": 0.5, "bitmask": 9.0, "packed": 2.0}
    calls = []

    def measured(layers, baseline, device):
        assert baseline == "dense" and all(run().shape for _, ways in layers for run in ways.values())
        calls.append(layers)
        value = {name: v.pop(0) if isinstance(v, list) and name == "csr" else v for name, v in said.items()}
        return {group: {name: value.get(name, 1.0) for name in ways} for group, ways in layers}

    monkeypatch.setattr(choose, "measure_ratios", measured)
    said["calls"] = calls
    return said


@each_model
def test_same_function_and_same_weights(make, tmp_path):
    model = prune_magnitude(make(), sparsity=0.75)
    expected, one, before = logits(model), logits(model, IDS[:1, :1]), copy.deepcopy(model.state_dict())
    report = sparsity_report(model).to_dict()
    chosen = accelerate_sparse(model, kernel="csr")
    assert len(used(model)) == len(chosen.accelerated) == len(chosen.layers) == len(block_linears(model))
    torch.testing.assert_close(logits(model), expected)
    torch.testing.assert_close(logits(model, IDS[:1, :1]), one)
    state = model.state_dict()
    assert list(state) == list(before) and all(torch.equal(state[name], before[name]) for name in before)
    assert sparsity_report(model).to_dict() == report
    model.save_pretrained(tmp_path / "dense")
    save_sparse(model, tmp_path / "packed")
    for same in (type(model).from_pretrained(tmp_path / "dense"), load_sparse(tmp_path / "packed")):
        assert not used(same) and torch.equal(logits(same), expected)
    assert remove_acceleration(model) is model and not used(model)
    assert torch.equal(logits(model), expected)
    assert {type(linear) for linear in block_linears(model).values()} == {
        type(linear) for linear in block_linears(make()).values()
    }


def test_generates_the_same_text():
    model = prune_magnitude(tiny_llama(), sparsity=0.9)
    expected = model.generate(IDS, max_new_tokens=8, do_sample=False)
    accelerate_sparse(model, kernel="csr")
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), expected)


def test_what_is_faster_is_chosen(ratios):
    model = prune_magnitude(tiny_llama(), sparsity=0.75)
    report = accelerate_sparse(model, tokens=(1, 8))
    assert {choice.chosen for layer in report.layers for choice in layer.choices} == {"csr"}
    first = report.layers[0].choices[0]
    assert first.speed_up == 2 and first.again == 0.5 and "0.50 of the time of dense" in first.reason
    assert report.added_bytes == sum(acceleration_of(linear).nbytes for linear in block_linears(model).values()) > 0
    assert "csr 2.0x" in str(report) and "14 of 14 layers accelerated" in str(report)


def test_what_is_not_faster_is_not_chosen(ratios):
    model = prune_magnitude(tiny_llama(), sparsity=0.75)
    ratios["csr"] = 0.95
    report = accelerate_sparse(model, tokens=(1, 8))
    assert not used(model) and not report.accelerated and report.added_bytes == 0
    assert all(type(linear) is nn.Linear for linear in block_linears(model).values())
    assert "0.95 of the time of dense, and 0.85 or less" in report.layers[0].choices[0].reason
    assert report.layers[0].reason == "nothing is faster"


def test_a_gain_that_does_not_hold_is_none(ratios):
    model = nn.Sequential(nn.Linear(16, 8, bias=False))
    model[0].weight.data[:, ::2] = 0
    ratios["csr"] = [0.5, 0.6, 0.7, 0.97]  # two numbers of tokens, and both once more
    report = accelerate_sparse(model, tokens=(1, 2))
    assert [choice.chosen for choice in report.layers[0].choices] == ["csr", "dense"]
    assert "but 0.97 when measured again" in report.layers[0].choices[1].reason
    assert acceleration_of(model[0]).operands[2] is None
    ratios["csr"] = [0.5, 0.97]
    assert not accelerate_sparse(model, tokens=1).accelerated and type(model[0]) is nn.Linear


def test_layers_are_timed_in_the_order_of_the_model(ratios, monkeypatch):
    model = prune_magnitude(tiny_llama(), sparsity=0.75)
    accelerate_sparse(model, tokens=1)
    groups = [group for group, _ in ratios["calls"][0]]
    assert len(groups) == 14 and groups[:7] == groups[7:] and len(set(groups)) == 4
    monkeypatch.setattr(choose, "SAMPLED_BYTES", 1)  # as if the layers were large: one of each kind will do
    accelerate_sparse(model, tokens=1)
    assert [group for group, _ in ratios["calls"][2]] == [0, 1, 2, 3]


def test_what_loses_clearly_is_not_tried_with_more_tokens(ratios):
    model = prune_magnitude(nn.Sequential(nn.Linear(16, 8)), sparsity=0.75, target_modules=["0"])
    ratios["csr"] = [0.5, 3.0, 2.0, 0.5]
    report = accelerate_sparse(model, tokens=(1, 2, 8, 32))
    assert [choice.chosen for choice in report.layers[0].choices] == ["csr", "dense", "dense", "dense"]
    assert "not timed" in report.layers[0].choices[3].reason and len(ratios["calls"]) == 4


def test_a_wrong_result_is_never_chosen(ratios, monkeypatch):
    right = CsrOperand.__call__
    monkeypatch.setattr(CsrOperand, "__call__", lambda self, x, bias: 1.01 * right(self, x, bias))
    model = prune_magnitude(tiny_llama(), sparsity=0.75)
    report = accelerate_sparse(model)
    assert not report.accelerated and "differs from the dense result" in report.layers[0].reason


def test_a_kernel_that_fails_is_reported(ratios, monkeypatch):
    def fails(cls, linear):
        raise RuntimeError("no such library\nand more")

    monkeypatch.setattr(CsrOperand, "of", classmethod(fails))
    report = accelerate_sparse(prune_magnitude(tiny_llama(), sparsity=0.75))
    assert "csr cannot be made here (RuntimeError: no such library)" in report.layers[0].reason
    assert "why not" in str(report) and "no such library" in str(report)


def test_nothing_is_changed_by_an_error(monkeypatch):
    model = prune_magnitude(tiny_llama(), sparsity=0.75)
    of, made = CsrOperand.of.__func__, []

    def out_of_memory(cls, linear):
        made.append(linear)
        if len(made) > 5:
            raise MemoryError
        return of(cls, linear)

    monkeypatch.setattr(CsrOperand, "of", classmethod(out_of_memory))
    with pytest.raises(MemoryError):
        accelerate_sparse(model, kernel="csr")
    assert not used(model)


def test_again(ratios):
    model = prune_magnitude(tiny_llama(), sparsity=0.75)
    accelerate_sparse(model)
    expected, names = logits(model), used(model)
    again = accelerate_sparse(model)
    assert used(model) == names and torch.equal(logits(model), expected) and len(again.accelerated) == 14
    ratios["csr"] = 1.2
    accelerate_sparse(model, target_modules=["q_proj"])
    assert used(model) == [name for name in names if "q_proj" not in name]


def test_layers_without_zeros_are_left_alone():
    model = tiny_llama()
    report = accelerate_sparse(model)
    assert not used(model) and report.layers[0].reason == "nothing is tried below 30% zeros"
    assert len(json.loads(report.to_json())["layers"]) == 14
    half = prune_magnitude(tiny_llama().bfloat16(), sparsity=0.9)
    with use_native(enabled=False):
        report = accelerate_sparse(half)
    assert "without native kernels, not in bfloat16" in report.layers[0].reason and not used(half)


def test_small_layers_are_left_alone(ratios, monkeypatch):
    monkeypatch.setattr(decide, "MIN_NUMEL", 32 * 48)
    report = accelerate_sparse(prune_magnitude(tiny_llama(), sparsity=0.75))
    assert {layer.name.split(".")[-1] for layer in report.accelerated} == {"gate_proj", "up_proj", "down_proj"}
    assert report.layers[0].reason == "nothing is tried below 1,536 weights"


def test_each_layer_by_its_own_zeros(ratios):
    model = prune_magnitude(tiny_llama(), sparsity=0.75, target_modules=["q_proj", "up_proj"])
    report = accelerate_sparse(model)
    assert [layer.name for layer in report.accelerated] == used(model)
    assert {name.split(".")[-1] for name in used(model)} == {"q_proj", "up_proj"}


# What a model can be


@pytest.mark.parametrize("where", ["root", "child", "twice"])
def test_models_without_blocks(ratios, where):
    linear = nn.Linear(16, 16)
    linear.weight.data[:, 1:] = 0
    model = {"root": linear, "child": nn.Sequential(linear), "twice": nn.Sequential(linear, nn.ReLU(), linear)}[where]
    x = torch.randn(1, 16)
    with torch.no_grad():
        expected = model(x)
        report = accelerate_sparse(model)
        assert acceleration_of(linear) is not None and len(report.layers) == 1
        torch.testing.assert_close(model(x), expected)
    remove_acceleration(model)
    assert type(linear) is nn.Linear


@pytest.mark.parametrize("keep_dense", [True, False])
@pytest.mark.parametrize("offload", [True, False])
def test_a_forward_that_was_replaced_is_not_left_behind(keep_dense, offload):
    """Offloading keeps the accelerated forward, and a packed linear without its numbers unpacks to none."""
    model = prune_magnitude(tiny_llama(), sparsity=0.8)
    with torch.no_grad():
        expected = model(IDS).logits
        accelerate_sparse(model, kernel="csr", keep_dense=keep_dense)
        if offload:
            cpu_offload(model, execution_device="cpu")
        else:
            dispatch_model(model, {"": "cpu"}, force_hooks=True)
        with pytest.raises(
            ValueError, match=r"have their own forward, got `model.layers.0.*`, whose forward was repl"
        ):
            remove_acceleration(model)
        if not offload:
            accelerate_sparse(model)
        torch.testing.assert_close(model(IDS).logits, expected)
        remove_hook_from_submodules(model)
        remove_acceleration(model)
        assert torch.equal(model(IDS).logits, expected)
        report = accelerate_sparse(model, kernel="csr", keep_dense=keep_dense)  # as if there had been no hook
        assert all(layer.choices for layer in report.layers)
        torch.testing.assert_close(model(IDS).logits, expected)


def test_tied_weights_and_hooks_stay(ratios):
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    first.weight.data[:, 1:] = 0
    second.weight = first.weight
    seen = []
    first.register_forward_hook(lambda *_: seen.append("hook"))
    model = nn.Sequential(first, second)
    for keep_dense in (True, False):  # what is shared is not packed
        accelerate_sparse(model, keep_dense=keep_dense)
        assert model[0].weight is model[1].weight is first.weight and len(used(model)) == (2 if keep_dense else 0)
        with torch.no_grad():
            model(torch.randn(1, 16))
        assert seen.pop() == "hook"
        remove_acceleration(model)


@each_model
def test_packed_models_stay_packed(make, ratios):
    model = prune_magnitude(make(), sparsity=0.75)
    expected, dense = logits(model), copy.deepcopy(model.state_dict())
    pack_model(model)
    ratios |= {"csr": 1.1, "packed": 3.0}
    report = accelerate_sparse(model)
    assert all(isinstance(linear, PackedLinear) for linear in block_linears(model).values())
    assert {layer.form for layer in report.layers} == {"packed"} and len(report.accelerated) == len(report.layers)
    assert any("unpack_model" in note for note in report.notes)  # faster than it was, and slower than dense
    torch.testing.assert_close(logits(model), expected)
    with pytest.raises(ValueError, match="save_sparse"):
        model.save_pretrained("nowhere")
    remove_acceleration(model)
    assert {type(linear) for linear in block_linears(model).values()} == {PackedLinear}
    accelerate_sparse(model)
    unpack_model(model)
    state = model.state_dict()
    assert not used(model) and all(torch.equal(state[name], dense[name]) for name in dense)


@each_model
def test_without_the_dense_weights(make, ratios, tmp_path):
    model = prune_magnitude(make(), sparsity=0.75)
    expected, dense, bytes_before = logits(model), copy.deepcopy(model.state_dict()), nbytes(model)
    ratios |= {"csr": 0.5, "packed": 3.0}
    report = accelerate_sparse(model, keep_dense=False)
    assert {layer.form for layer in report.layers} == {"packed"} and len(report.accelerated) == len(report.layers)
    assert nbytes(model) < bytes_before
    torch.testing.assert_close(logits(model), expected)
    again = accelerate_sparse(model, keep_dense=False)
    assert again.weight_bytes == report.weight_bytes and len(again.accelerated) == len(report.layers)
    save_sparse(model, tmp_path)
    assert torch.equal(logits(load_sparse(tmp_path)), expected)
    with pytest.raises(ValueError, match="save_sparse"):
        model.save_pretrained(tmp_path)
    for same in (copy.deepcopy(model), model):
        remove_acceleration(same)
        state = same.state_dict()
        assert list(state) == list(dense) and all(torch.equal(state[name], dense[name]) for name in dense)
        assert torch.equal(logits(same), expected) and "save_pretrained" not in same.__dict__


def test_a_merged_model_goes_on_writing_its_card(ratios, tmp_path):
    merged = get_peft_model(prune_magnitude(tiny_llama(), "2:4"), SppConfig(r=4)).merge_and_unload()
    ratios["csr"] = 0.5
    accelerate_sparse(merged)
    remove_acceleration(merged).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").is_file()


def nbytes(model):
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def test_a_layer_that_would_lose_keeps_its_dense_weight(ratios):
    model = prune_magnitude(tiny_llama(), sparsity=0.75)
    ratios |= {"csr": [0.5, 1.3, 0.5, 1.3], "packed": 2.0}
    report = accelerate_sparse(model, tokens=(1, 64), target_modules=["up_proj"], keep_dense=False)
    assert not used(model) and all(type(linear) is nn.Linear for linear in block_linears(model).values())
    assert "kept dense: at a token count of 64 csr takes 1.30 of the dense time" in report.layers[0].reason


def test_a_linear_alone_keeps_its_dense_weight():
    linear = nn.Linear(16, 16)
    linear.weight.data[:, 1:] = 0
    report = accelerate_sparse(linear, keep_dense=False, kernel="csr")
    assert not report.accelerated and acceleration_of(linear) is None and type(linear) is nn.Linear
    assert report.layers[0].form == "dense" and "it is the whole model" in report.layers[0].reason


def test_training_goes_on(ratios):
    """Adapters on an accelerated model, and weights that change."""
    model = prune_magnitude(tiny_llama(), sparsity=0.75)
    reference = copy.deepcopy(model)
    accelerate_sparse(model)
    losses = []
    for each in (model, reference):
        torch.manual_seed(0)
        adapted = get_peft_model(each, SppConfig())
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            loss = adapted(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss)
        each.merged = adapted.merge_and_unload()
    assert torch.equal(*losses)
    if used(model):
        with pytest.warns(UserWarning, match="accelerate_sparse"):
            found = logits(model.merged)
    torch.testing.assert_close(found, logits(reference.merged))
    accelerate_sparse(model.merged)
    torch.testing.assert_close(logits(model.merged), logits(reference.merged))


# What is refused


def test_adapters_are_merged_first():
    adapted = get_peft_model(prune_magnitude(tiny_llama()), LoraConfig(target_modules=["q_proj"]))
    for model in (adapted, adapted.base_model.model):
        with pytest.raises(ValueError, match=r"carries an adapter \(Linear\); call `model = model.merge_and_unload"):
            accelerate_sparse(model)
    assert accelerate_sparse(adapted.merge_and_unload(), kernel="csr").accelerated


@pytest.mark.parametrize("tokens", [0, -1, (), (1, 0), 1.5, (1, "2"), True, None, "12", torch.tensor(1)])
def test_tokens_are_positive_numbers(tokens):
    with pytest.raises(ValueError, match="`tokens` is a positive number"):
        accelerate_sparse(tiny_llama(), tokens=tokens)


def test_other_errors():
    with pytest.raises(ValueError, match="`kernel` is one of"):
        accelerate_sparse(tiny_llama(), kernel="fast")
    with pytest.raises(ValueError, match="`kernel` is one of"):
        accelerate_sparse(tiny_llama(), kernel=["csr"])
    for call in (accelerate_sparse, remove_acceleration):
        with pytest.raises(ValueError, match="a model in memory"):
            call("some/folder")
    with pytest.raises(ValueError, match="at least one linear"):
        accelerate_sparse(tiny_llama(), target_modules=["nothing"])
    with pytest.raises(ValueError, match="at least one linear"):
        accelerate_sparse(nn.ReLU())
    with pytest.raises(ValueError, match="meta device"):
        accelerate_sparse(tiny_llama().to("meta"))


def test_a_kernel_that_is_not_for_this_device_is_not_used():
    model = prune_magnitude(tiny_llama(), pattern="2:4")
    report = accelerate_sparse(model, kernel="semi_structured")
    assert not used(model) and report.layers[0].reason == "semi_structured runs on an NVIDIA GPU, not on cpu"


def test_the_global_random_state_is_the_users(ratios):
    model = prune_magnitude(tiny_llama(), sparsity=0.75)
    before = torch.random.get_rng_state()
    accelerate_sparse(model)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_inside_of_other_modes(ratios):
    model = prune_magnitude(tiny_llama(), sparsity=0.75)
    expected = logits(model)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert accelerate_sparse(model, tokens=(1, 64)).accelerated
    torch.testing.assert_close(logits(model), expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, expected)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_operands_have_names():
    assert list(OPERANDS) == ["csr", "semi_structured", "bitmask"]


@pytest.mark.slow
def test_on_a_wide_layer_for_real():
    """Nothing replaced: at 99% zeros the lists are many times faster for one token on any machine."""
    model = nn.Sequential(nn.Linear(2048, 2048, bias=False))
    prune_magnitude(model, sparsity=0.99, target_modules=["0"])
    report = accelerate_sparse(model, tokens=(1,))
    assert report.layers[0].choices[0].chosen == "csr" and report.layers[0].choices[0].speed_up > 2
