"""SPP on a packed base is SPP on the dense base: same losses, gradients and merged weights, and no dense copy."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_sparse import PstConfig, SppConfig, ops, pack_model, prune_magnitude, sparsity_report, unpack_model
from peft_sparse.linears import PackedLinear, block_linears, get_weight, unwrap
from peft_sparse.tuners.spp import SppLinear

from models import tiny_bert, tiny_gpt2, tiny_llama

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
LM = {"input_ids": IDS, "labels": IDS}
MODELS = {tiny_llama: LM, tiny_gpt2: LM, tiny_bert: {"input_ids": IDS, "labels": torch.tensor([0, 1])}}

each_model = pytest.mark.parametrize("make", MODELS)


@pytest.fixture(autouse=True)
def dense_way():
    """The dense base computes as the packed one does; over its non-zeros alone the order of sums is another."""
    with ops.use_csr(False):
        yield


def pair(make=tiny_llama, dtype=torch.float32, config=None, **pruning):
    """The same adapted model on a dense and on a packed base."""
    base = prune_magnitude(make(), **(pruning or {"sparsity": 0.6})).to(dtype)
    models = []
    for model in (copy.deepcopy(base), pack_model(base)):
        torch.manual_seed(0)
        models.append(get_peft_model(model, config or SppConfig(r=4, init_weights=False)))
    return models


def train(model, inputs, steps=4, lr=0.02):
    """Losses of some optimizer steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def adapter(model):
    return {name: p.detach() for name, p in model.named_parameters() if "spp_" in name}


def assert_same_adapters(one, other):
    for (name, a), (other_name, b) in zip(adapter(one).items(), adapter(other).items(), strict=True):
        assert name == other_name and torch.equal(a, b), name


def assert_same_weights(one, other):
    ones, others = block_linears(one), block_linears(other)
    assert list(ones) == list(others)
    for name in ones:
        assert torch.equal(get_weight(unwrap(ones[name])), get_weight(unwrap(others[name]))), name


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pruning", [{"sparsity": 0.6}, {"pattern": "2:4"}], ids=["60%", "2:4"])
def test_trains_as_the_dense_base_does(make, dtype, pruning):
    dense, packed = pair(make, dtype, **pruning)
    assert all(isinstance(unwrap(linear), PackedLinear) for linear in block_linears(packed.base_model.model).values())
    assert train(packed.train(), MODELS[make]) == train(dense.train(), MODELS[make])
    assert_same_adapters(dense, packed)
    merged, expected = packed.merge_and_unload(), dense.merge_and_unload()
    assert_same_weights(merged, expected)
    assert all(isinstance(linear, PackedLinear) for linear in block_linears(merged).values())
    assert sparsity_report(merged).to_dict() == sparsity_report(expected).to_dict()
    torch.testing.assert_close(merged(**MODELS[make]).logits, expected(**MODELS[make]).logits)
    assert_same_weights(unpack_model(merged), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    dense, packed = pair()
    for model in (dense, packed):
        model.enable_input_require_grads()
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
    assert train(packed, LM) == train(dense, LM)
    assert_same_adapters(dense, packed)


def test_autocast():
    dense, packed = pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert train(packed.train(), LM) == train(dense.train(), LM)
    assert_same_adapters(dense, packed)


def test_several_adapters_and_dropout():
    config = SppConfig(r=4, init_weights=False, spp_dropout=0.2)
    models = pair(config=config)
    for model in models:
        torch.manual_seed(1)
        model.add_adapter("b", SppConfig(r=3, init_weights=False))
        model.base_model.set_adapter(["default", "b"])
        model.train()
    dense, packed = models
    found = []
    for model in models:
        torch.manual_seed(2)
        found.append(train(model, LM))
    assert found[0] == pytest.approx(found[1], rel=1e-6)  # the first adapter's gradient is summed in another order
    for a, b in zip(adapter(dense).values(), adapter(packed).values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    packed.load_state_dict(adapter(dense), strict=False)
    dense.eval(), packed.eval()
    assert torch.equal(dense(IDS).logits, packed(IDS).logits)
    assert_same_weights(dense.merge_and_unload(), packed.merge_and_unload())


def test_merge_and_unmerge_bit_for_bit():
    dense, packed = pair(dtype=torch.bfloat16)
    layers = [module for module in packed.modules() if isinstance(module, SppLinear)]
    before = [layer.base_layer.values.detach().clone() for layer in layers]
    addresses = [layer.base_layer.values.data_ptr() for layer in layers]
    unmerged = packed(IDS).logits
    for model in (dense, packed):
        model.merge_adapter()
    assert_same_weights(packed.base_model.model, dense.base_model.model)
    assert addresses == [layer.base_layer.values.data_ptr() for layer in layers]  # in place
    merged = packed(IDS).logits
    torch.testing.assert_close(merged, unmerged, atol=0.02, rtol=0.05)
    copied = copy.deepcopy(packed)
    for model in (packed, copied):
        model.unmerge_adapter()
        assert torch.equal(model(IDS).logits, unmerged)
    assert all(torch.equal(layer.base_layer.values, values) for layer, values in zip(layers, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cancellation_and_underflow_do_not_make_zeros(dtype):
    model = nn.Sequential(nn.Linear(8, 4)).to(dtype)
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
        model[0].weight[1, 1::2] = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
    pack_model(model, target_modules=["0"])
    adapted = get_peft_model(model, SppConfig(r=1, spp_alpha=1, target_modules=["0"]))
    layer = adapted.base_model.model[0]
    with torch.no_grad():
        layer.spp_A["default"].fill_(1.0)
        layer.spp_B["default"].copy_(torch.tensor([-1.0, -0.75, 0.0, 0.5]))
    merged = adapted.merge_and_unload()[0]
    assert merged.values.count_nonzero() == 16 and merged.values[:4].abs().max() < 1e-7


def test_a_broken_adapter_merges_nothing():
    _, packed = pair()
    values = [module.values.detach().clone() for module in packed.modules() if isinstance(module, PackedLinear)]
    layer = [module for module in packed.modules() if isinstance(module, SppLinear)][-1]
    with torch.no_grad():
        layer.spp_B["default"][0] = float("nan")
    for merge in (packed.merge_adapter, packed.merge_and_unload):
        with pytest.raises(ValueError, match="NaN"):
            merge()
    now = [module.values for module in packed.modules() if isinstance(module, PackedLinear)]
    assert all(torch.equal(a, b) for a, b in zip(values, now, strict=True)) and not layer.merged


def test_checks_at_merge(monkeypatch):
    _, packed = pair()
    layer = next(module for module in packed.modules() if isinstance(module, SppLinear))
    wrong = layer.base_weight._replace(values=layer.base_weight.values * 1.5)
    monkeypatch.setattr(layer, "effective_weight", lambda name, weight=None: wrong)
    with pytest.raises(RuntimeError, match="keeps the layer's function"):
        packed.merge_adapter()
    zeroed = wrong._replace(values=torch.zeros_like(wrong.values))
    monkeypatch.setattr(layer, "effective_weight", lambda name, weight=None: zeroed)
    monkeypatch.setattr("peft_sparse.tuners.merging.round_keeping_support", lambda w, support, dtype: w)
    with pytest.raises(RuntimeError, match="keeps every zero"):
        packed.merge_adapter()


def test_saved_adapters_fit_either_base(tmp_path):
    _, packed = pair()
    train(packed.train(), LM)
    packed.save_pretrained(tmp_path)
    expected = packed.eval()(IDS).logits
    base = prune_magnitude(tiny_llama(), sparsity=0.6)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(IDS).logits, expected)
    again = PeftModel.from_pretrained(pack_model(base), tmp_path)
    assert torch.equal(again(IDS).logits, expected)
    again.load_adapter(tmp_path, "other")
    again.set_adapter("other")
    assert torch.equal(again(IDS).logits, expected)


def test_disabled_and_unloaded():
    _, packed = pair()
    base = prune_magnitude(tiny_llama(), sparsity=0.6)(IDS).logits
    with packed.disable_adapter():
        torch.testing.assert_close(packed(IDS).logits, base)
    assert not torch.allclose(packed(IDS).logits, base)
    unloaded = packed.unload()
    assert isinstance(unloaded.model.layers[0].mlp.up_proj, PackedLinear)
    torch.testing.assert_close(unloaded(IDS).logits, base)


def test_casts_and_copies():
    dense, packed = pair()
    for cast in (nn.Module.bfloat16, nn.Module.double, nn.Module.half):
        a, b = cast(copy.deepcopy(dense)), cast(copy.deepcopy(packed))
        assert torch.equal(a(IDS).logits, b(IDS).logits)
    state = packed.state_dict()
    assert sum(name.endswith("base_layer.bitmask") for name in state) == 14
    other = pair()[1]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    other.load_state_dict(state)
    assert torch.equal(other(IDS).logits, packed(IDS).logits)


@pytest.mark.usefixtures("transformers_adapters")
def test_transformers_own_adapters():
    model = pack_model(prune_magnitude(tiny_llama()))
    model.add_adapter(SppConfig(init_weights=False))
    assert isinstance(model.model.layers[0].mlp.up_proj, SppLinear)
    model(**LM).loss.backward()


@pytest.mark.usefixtures("transformers_adapters")
def test_transformers_saves_the_adapter_of_a_packed_model(tmp_path):
    model = pack_model(prune_magnitude(tiny_llama()))
    model.add_adapter(SppConfig(init_weights=False))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists() and not list(tmp_path.glob("model*"))


@pytest.mark.parametrize("target_modules", [None, "all-linear", ["q_proj"], r".*\.up_proj"])
def test_targets_are_those_of_the_dense_model(target_modules):
    dense, packed = pair(config=SppConfig(target_modules=target_modules))
    assert list(adapter(dense)) == list(adapter(packed)) and adapter(packed)


def test_an_adapter_starts_on_the_dtype_and_device_of_the_values():
    _, packed = pair(dtype=torch.bfloat16, config=SppConfig())
    assert {p.device for p in adapter(packed).values()} == {torch.device("cpu")}


def test_training_after_evaluation_in_inference_mode():
    dense, packed = pair()
    with torch.inference_mode():
        packed.to(torch.float32)(IDS)  # the first forward after a move
        with packed.disable_adapter():
            packed(IDS)
    assert train(packed, LM) == train(dense, LM)
    base = pack_model(prune_magnitude(tiny_llama()))
    base._apply(lambda t: t)
    with torch.inference_mode():
        base(IDS)
    base(**LM).loss.backward()


def test_a_packed_module_to_save_is_trained_and_keeps_its_zeros():
    model = pack_model(prune_magnitude(tiny_llama()))
    zeros = sparsity_report(model).total_zeros
    config = SppConfig(target_modules=["q_proj"], modules_to_save=["up_proj"])
    adapted = get_peft_model(model, config)
    saved = adapted.base_model.model.model.layers[0].mlp.up_proj.modules_to_save["default"]
    values = saved.values.detach().clone()
    train(adapted, LM)
    assert not torch.equal(saved.values, values)
    merged = adapted.merge_and_unload()
    assert merged.model.layers[0].mlp.up_proj is saved
    assert sparsity_report(merged).total_zeros == zeros


def test_a_packed_dense_layer_is_told_so():
    model = tiny_llama()
    with torch.no_grad():
        for linear in block_linears(model).values():
            linear.weight[0, 0] = 0
    for name, linear in list(block_linears(model).items()):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, PackedLinear.from_linear(linear))
    with pytest.warns(UserWarning, match=r"already pruned.*14 of 14"):
        get_peft_model(model, SppConfig())


def test_other_methods_refuse():
    model = pack_model(prune_magnitude(tiny_llama()))
    with pytest.raises(ValueError, match=r"PST prunes a dense model.*unpack_model"):
        get_peft_model(model, PstConfig())
    with pytest.raises(ValueError, match="not supported"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert not [name for name, _ in model.named_parameters() if "pst_" in name or "lora_" in name]
    adapted = get_peft_model(model, SppConfig())
    for change in (pack_model, unpack_model):
        with pytest.raises(ValueError, match="merge_and_unload"):
            change(adapted.base_model.model)


class Largest(TorchDispatchMode):
    """The most elements of a floating tensor's storage that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_no_dense_copy_ever_exists(monkeypatch):
    """From the forward to the merged model, nothing of the size of a dense weight is made: blocks, values, and what
    has a token's or a factor's size."""
    out, columns, tokens = 512, 96, 5
    linear = nn.Linear(columns, out, bias=False)
    with torch.no_grad():
        linear.weight[torch.rand(out, columns) < 0.8] = 0
    model = nn.Sequential(PackedLinear.from_linear(linear))
    monkeypatch.setattr("peft_sparse.ops.blocks.BLOCK_ELEMENTS", columns * 64)
    monkeypatch.setattr("peft_sparse.sparsity.packing.UNPACKED_AT_ONCE", columns * 32)
    with Largest() as largest, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, SppConfig(r=4, target_modules=["0"], init_weights=False))
        x = torch.randn(tokens, columns, requires_grad=True)
        adapted(x).square().sum().backward()
        adapted.add_adapter("b", SppConfig(r=3, target_modules=["0"], init_weights=False))
        adapted.base_model.set_adapter(["default", "b"])
        adapted(x).square().sum().backward()
        adapted.merge_adapter()
        adapted.unmerge_adapter()
        merged = adapted.merge_and_unload()
        merged(x).sum().backward()
    assert isinstance(merged[0], PackedLinear)
    assert largest.numel < out * columns // 2


def test_memory_of_training_is_that_of_the_packed_weights():
    """Bytes of all tensors after a step, dense against packed: the difference is that of the weights."""
    dense, packed = pair(sparsity=0.9)
    for model in (dense, packed):
        train(model, LM, steps=1)
    sizes = [
        sum(t.numel() * t.element_size() for t in (*unwrap(linear).parameters(), *unwrap(linear).buffers()))
        for model in (dense, packed)
        for linear in [nn.ModuleList(map(unwrap, block_linears(model.base_model.model).values()))]
    ]
    assert sizes[1] <= 0.14 * sizes[0]
