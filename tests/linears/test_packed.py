"""A packed linear is the linear that it was made from, in fewer bytes; whole models are packed in place and back."""

import copy
import pickle
import weakref

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_sparse import pack_model, prune_magnitude, sparsity_report, unpack_model
from peft_sparse.linears import (
    PackedLinear,
    block_linear_names,
    block_linears,
    get_weight,
    in_out_features,
    is_linear,
    linears_inside,
    num_zeros,
    set_weight,
    stored_weight,
    weight_parameter,
)
from peft_sparse.sparsity import PackedWeight

from models import tiny_bert, tiny_gpt2, tiny_llama

KINDS = {
    "Linear": lambda: nn.Linear(13, 9),
    "no bias": lambda: nn.Linear(16, 9, bias=False),
    "Conv1D": lambda: Conv1D(9, 13),
}
MODELS = [tiny_llama, tiny_gpt2, tiny_bert]
IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))

each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
each_model = pytest.mark.parametrize("make", MODELS)


def pruned(kind, dtype=torch.float32, zeros=0.5):
    linear = kind().to(dtype)
    with torch.no_grad():
        linear.weight[torch.rand(linear.weight.shape) < zeros] = 0
    return linear


def nbytes(module):
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_computes_what_the_linear_computes(kind, dtype):
    linear = pruned(kind, dtype)
    packed = PackedLinear.from_linear(linear)
    x = torch.randn(2, 3, packed.in_features, dtype=dtype, requires_grad=True)
    y, expected = packed(x), linear(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.float().square().sum(), x), torch.autograd.grad(expected.float().square().sum(), x)
    )
    assert torch.equal(packed.dense_weight(), get_weight(linear)) and torch.equal(packed.weight, get_weight(linear))


@each_kind
def test_there_and_back(kind):
    linear = pruned(kind).eval()
    back = PackedLinear.from_linear(linear).to_linear()
    assert type(back) is type(linear) and not back.training and back.bias is linear.bias
    assert torch.equal(back.weight, linear.weight) and back.weight.is_contiguous()
    x = torch.randn(2, in_out_features(linear)[0])
    assert torch.equal(back(x), linear(x))


@each_kind
def test_is_a_linear_to_the_rest_of_the_package(kind):
    linear = pruned(kind)
    packed = PackedLinear.from_linear(linear)
    assert is_linear(packed) and in_out_features(packed) == in_out_features(linear)
    assert num_zeros(packed) == num_zeros(linear) == (linear.weight == 0).sum()
    assert weight_parameter(packed) is packed.values and stored_weight(packed).values is packed.values
    assert torch.equal(get_weight(packed), get_weight(linear))


@pytest.mark.parametrize("zeros, fp32, bf16", [(0.5, 0.54, 0.57), (0.75, 0.29, 0.32), (0.9, 0.14, 0.17)])
def test_bytes(zeros, fp32, bf16):
    """Row starts included, although they are not stored."""
    for dtype, most in ((torch.float32, fp32), (torch.bfloat16, bf16)):
        linear = nn.Linear(576, 400, bias=False).to(dtype)
        with torch.no_grad():
            linear.weight.view(-1)[torch.randperm(linear.weight.numel())[: int(zeros * linear.weight.numel())]] = 0
        packed = PackedLinear.from_linear(linear)
        starts = packed.packed_weight.starts
        assert nbytes(packed) + starts.numel() * starts.element_size() <= most * nbytes(linear)


def test_values_are_frozen_and_the_bias_is_not():
    packed = PackedLinear.from_linear(nn.Linear(8, 4))
    packed(torch.randn(2, 8)).sum().backward()
    assert packed.values.grad is None and torch.equal(packed.bias.grad, torch.full((4,), 2.0))
    packed.values.requires_grad_()
    packed(torch.ones(1, 8)).sum().backward()
    assert torch.equal(packed.values.grad, torch.ones_like(packed.values))


@each_kind
def test_copies_casts_and_state_dicts(kind):
    packed = PackedLinear.from_linear(pruned(kind))
    x, weight = torch.randn(2, packed.in_features), packed.dense_weight()
    expected = packed(x)
    for same in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(same(x), expected)
        with torch.no_grad():
            same.values.zero_()
    assert torch.equal(packed(x), expected)
    assert torch.equal(copy.deepcopy(packed).bfloat16().dense_weight(), weight.bfloat16())
    assert copy.deepcopy(packed).half().bitmask.dtype == torch.uint8


def test_a_state_dict_brings_its_bitmask():
    """What is derived from the old bitmask must not outlive it, whichever way the new one arrives."""
    first, second = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        first.weight[:2], second.weight[2:] = 0, 0
    packed, other = PackedLinear.from_linear(first), PackedLinear.from_linear(second)
    x = torch.randn(3, 8)
    packed(x)
    assert set(packed.state_dict()) == {"values", "bitmask"}
    packed.load_state_dict(other.state_dict())
    assert torch.equal(packed(x), other(x)) and torch.equal(packed.dense_weight(), second.weight)
    for assign in (True, False):
        with torch.device("meta"):
            empty = PackedLinear(torch.empty(16), torch.empty(4, 1, dtype=torch.uint8), 8)
        if not assign:
            empty = empty.to_empty(device="cpu")
        empty.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(empty(x), other(x))


def test_a_state_dict_that_is_no_weight_is_refused():
    packed = PackedLinear.from_linear(pruned(KINDS["Linear"]))
    x = torch.randn(3, 13)
    expected, state = packed(x), {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    state["bitmask"][2, 0] ^= 1  # a flipped bit
    with pytest.raises(RuntimeError, match="each bit of its bitmask that is set has a value"):
        packed.load_state_dict(state)
    assert torch.equal(packed(x), expected)
    other = PackedLinear.from_linear(pruned(KINDS["Linear"], zeros=0.9)).state_dict()
    with pytest.raises(RuntimeError, match=r"as many values as the layer, \d+, got \d+ of another mask"):
        packed.load_state_dict(other)
    assert torch.equal(packed(x), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"values": torch.ones(3)}, "4 bits and 3 values"),
        ({"values": torch.ones(4, dtype=torch.int32)}, "floating"),
        ({"values": torch.ones(2, 2)}, "one dimension"),
        ({"bitmask": torch.tensor([[3], [3]])}, "uint8"),
        ({"in_features": 9}, r"its bitmask is uint8 \(2, 2\), got uint8 \(2, 1\)"),
        ({"bitmask": torch.tensor([[3], [33]], dtype=torch.uint8)}, "after its last column"),
        ({"bias": torch.ones(3)}, r"\(2,\), got \(3,\)"),
    ],
)
def test_what_is_no_weight_is_refused(change, message):
    good = {"values": torch.ones(4), "bitmask": torch.tensor([[3], [3]], dtype=torch.uint8), "in_features": 5}
    assert PackedLinear(**good).dense_weight().tolist() == [[1, 1, 0, 0, 0]] * 2
    with pytest.raises(ValueError, match=message):
        PackedLinear(**{**good, **change})


def test_writing_keeps_places():
    linear = pruned(KINDS["Linear"])
    packed = PackedLinear.from_linear(linear)
    set_weight(packed, get_weight(linear) * 2)
    assert torch.equal(packed.dense_weight(), linear.weight * 2)
    before = packed.values.detach().clone()
    with pytest.raises(ValueError, match="places of a packed weight are fixed"):
        set_weight(packed, get_weight(linear) + 1)
    with pytest.raises(ValueError, match="keeps its shape"):
        set_weight(packed, get_weight(linear)[:1])
    assert torch.equal(packed.values, before)
    set_weight(linear, packed.packed_weight)
    assert torch.equal(linear.weight, packed.dense_weight())


# Whole models


@each_model
def test_a_packed_model_is_the_same_model(make):
    model = prune_magnitude(make(), sparsity=0.75)
    expected, report, names = model(IDS).logits, sparsity_report(model), block_linear_names(model)
    full = nbytes(model)
    dense = copy.deepcopy(model)
    assert pack_model(model) is model
    assert all(isinstance(linear, PackedLinear) for linear in block_linears(model).values())
    torch.testing.assert_close(model(IDS).logits, expected)
    assert sparsity_report(model).to_dict() == report.to_dict() and block_linear_names(model) == names
    assert nbytes(model) < 0.8 * full
    assert pack_model(model) is model  # nothing left to do
    assert unpack_model(model) is model
    assert torch.equal(model(IDS).logits, expected)
    for (name, parameter), (other_name, other) in zip(model.named_parameters(), dense.named_parameters(), strict=True):
        assert name == other_name and torch.equal(parameter, other)


def test_a_report_holds_one_dense_weight_at_a_time(monkeypatch):
    model = pack_model(prune_magnitude(tiny_llama()))
    alive, most = set(), []
    dense = PackedWeight.dense

    def watched(packed):
        weight = dense(packed)
        key = object()
        alive.add(key)
        weakref.finalize(weight, alive.discard, key)
        most.append(len(alive))
        return weight

    monkeypatch.setattr(PackedWeight, "dense", watched)
    sparsity_report(model)
    assert len(most) == 14 and max(most) <= 2  # the next one is made before the last one is dropped


def test_targets_are_chosen_as_in_peft():
    model = pack_model(prune_magnitude(tiny_llama()), target_modules=["q_proj", "mlp.up_proj"])
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert packed == {f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.up_proj")}
    model = pack_model(prune_magnitude(tiny_llama()), exclude_modules=r".*mlp.*")
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    with pytest.raises(ValueError, match="at least one linear"):
        pack_model(tiny_llama(), target_modules=["nothing"])


def test_layers_that_do_not_pay_stay():
    model = prune_magnitude(tiny_llama(), sparsity=0.02)
    with pytest.warns(UserWarning, match="none was packed"):
        pack_model(model)
    assert all(isinstance(linear, nn.Linear) for linear in block_linears(model).values())
    model = prune_magnitude(tiny_llama(), sparsity=0.05)
    assert all(isinstance(linear, PackedLinear) for linear in block_linears(pack_model(model)).values())
    model = prune_magnitude(tiny_llama().bfloat16(), sparsity=0.05)
    with pytest.warns(UserWarning, match="none was packed"):
        pack_model(model)


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 4), lambda: Conv1D(4, 8)])
def test_a_packed_layer_alone_is_unpacked_into_a_new_one(make):
    linear = make()
    packed = PackedLinear.from_linear(linear)
    unpacked = unpack_model(packed)
    assert type(unpacked) is type(linear) and torch.equal(unpacked.weight, linear.weight)
    assert torch.equal(unpacked.bias, linear.bias) and isinstance(packed, PackedLinear)


def test_shared_weights_and_attachments_stay():
    first, second, third, hooked = (pruned(KINDS["Linear"]) for _ in range(4))
    second.weight = first.weight  # tied
    hooked.register_forward_hook(lambda *_: None)
    normed = nn.utils.parametrizations.weight_norm(pruned(KINDS["Linear"]))
    model = nn.ModuleDict({"a": first, "b": second, "c": third, "c again": third, "h": hooked, "n": normed})
    pack_model(model, target_modules=r".*")
    assert model["a"] is first and model["b"] is second and model["h"] is hooked and model["n"] is normed
    assert isinstance(model["c"], PackedLinear) and model["c again"] is model["c"]


def test_what_cannot_be_packed_is_refused():
    model = prune_magnitude(tiny_llama())
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="carries an adapter"):
        pack_model(adapted.base_model.model)
    assert not [module for module in adapted.modules() if isinstance(module, PackedLinear)]
    with pytest.raises(ValueError, match="meta device"):
        pack_model(tiny_llama().to("meta"))
    with pytest.raises(ValueError, match="offloaded, or never loaded"):
        pack_model(cpu_offload(prune_magnitude(tiny_llama()), execution_device="cpu"))


def test_plain_transformers_never_reads_a_packed_model(tmp_path):
    model = pack_model(prune_magnitude(tiny_llama()))
    expected = model(IDS).logits
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match="save_sparse"):
            same.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir()) and torch.equal(same(IDS).logits, expected)
        assert same.save_pretrained.args == (same,)
    unpack_model(model).save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path)(IDS).logits, expected)


def test_pruners_refuse_packed_weights():
    model = pack_model(prune_magnitude(tiny_llama()))
    with pytest.raises(ValueError, match="unpack_model"):
        prune_magnitude(model, sparsity=0.9)


def test_linears_inside_sees_packed_ones():
    model = nn.Sequential(PackedLinear.from_linear(pruned(KINDS["Linear"])), nn.ReLU())
    assert list(linears_inside(model)) == ["0"] and len(sparsity_report(model).layers) == 1
