"""The mask that is kept: always what a fresh selection gives, and selected no more often than needed."""

import copy
import pickle
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_sparse import PstConfig, ops
from peft_sparse.ops import MaskCache, PstFactors, PstScales
from peft_sparse.sparsity import unpack_mask
from peft_sparse.tuners.pst import PstLinear

from models import tiny_llama

SCALES = PstScales(beta=0.7, alpha1=0.5, alpha2=0.3)


def make(out=40, columns=24, kind="UVABRC", dtype=torch.float32):
    shapes = {
        "U": (out, 3), "V": (3, columns), "D": (out, columns), "A": (out, 2), "B": (2, columns), "R": (out,),
        "C": (columns,), "S": (out, columns),
    }  # fmt: skip
    factors = PstFactors(**{name: torch.randn(shapes[name]) for name in kind})
    return torch.randn(out, columns).to(dtype), factors


@pytest.fixture
def selections(monkeypatch) -> list:
    """One entry for every selection that is made."""
    made, module = [], sys.modules[ops.pst_mask.__module__]
    select = module._select
    monkeypatch.setattr(module, "_select", lambda *args: made.append(1) or select(*args))
    return made


@pytest.mark.parametrize("kind", ["UVABRC", "DABRC", "ABRC", "UVS", "S", "UV", "D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(40, 24), (33, 7)])
def test_equals_the_reference(kind, dtype, shape):
    weight, factors = make(*shape, kind, dtype)
    before = weight.clone()
    for group_size in (weight.numel(), shape[1]):
        for num_pruned in (0, 1, group_size // 2, group_size):
            found = ops.pst_mask(MaskCache(), weight, torch.tensor(num_pruned), group_size, factors, SCALES)
            expected = ops.reference.pst_mask(weight, num_pruned, group_size, factors, SCALES)
            assert torch.equal(found, expected)
    assert torch.equal(weight, before)


CHANGES = {
    "in place": lambda t: t.add_(0.5),
    "through data": lambda t: t.data.mul_(-1),
    "one element through data": lambda t: t.data.view(-1)[3].add_(10),
    "another storage": lambda t: setattr(t, "data", torch.randn_like(t)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["weight", *"UVABRC"])
def test_any_change_of_content_is_seen(change, name):
    weight, factors = make()
    cache, pruned = MaskCache(), torch.tensor(480)
    ops.pst_mask(cache, weight, pruned, 960, factors, SCALES)
    change(weight if name == "weight" else getattr(factors, name))
    found = ops.pst_mask(cache, weight, pruned, 960, factors, SCALES)
    assert torch.equal(found, ops.reference.pst_mask(weight, 480, 960, factors, SCALES))


@pytest.mark.parametrize("name", ["weight", "S"])
def test_a_change_of_a_large_tensor_is_seen(name):
    weight, factors = make(400, 300, "UVS")
    cache, pruned = MaskCache(), torch.tensor(60_000)
    ops.pst_mask(cache, weight, pruned, 120_000, factors, SCALES)
    (weight if name == "weight" else factors.S)[7, 11] += 1e3  # counted as a version
    ops.pst_mask(cache, weight, pruned, 120_000, factors, SCALES)
    (weight if name == "weight" else factors.S).data.neg_()  # seen in the sample
    found = ops.pst_mask(cache, weight, pruned, 120_000, factors, SCALES)
    assert torch.equal(found, ops.reference.pst_mask(weight, 60_000, 120_000, factors, SCALES))


def test_the_count_is_part_of_it(selections):
    weight, factors = make()
    cache, pruned = MaskCache(), torch.tensor(10)
    for count in (10, 10, 20, 20, 0):
        pruned.fill_(count)
        packed = ops.pst_mask(cache, weight, pruned, 960, factors, SCALES)
        assert (~unpack_mask(packed, 24)).sum() == count
    assert len(selections) == 3


def test_selected_once_for_each_optimizer_step(selections):
    """Two accumulation steps, an evaluation and a generation: one selection a layer."""
    model = get_peft_model(tiny_llama(), PstConfig(sparsity=0.5))
    layers = [m for m in model.modules() if isinstance(m, PstLinear)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.arange(3, 19)[None]
    for step in range(1, 4):
        model.base_model.set_sparsity_step(step, 3)
        selections.clear()
        for _ in range(2):
            model.train()(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            model.eval()(input_ids=ids)
            model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        assert len(selections) == len(layers)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("names", [["default"], ["default", "b"]], ids=["one adapter", "two"])
def test_training_after_inference_mode(names):
    """What is kept in inference mode cannot be saved for a backward."""
    model = get_peft_model(nn.Sequential(Conv1D(300, 400)), PstConfig(target_modules=["0"], schedule="constant"))
    model.add_adapter("b", PstConfig(target_modules=["0"], schedule="constant", sparsity=0.5))
    model.base_model.set_adapter(names)
    x = torch.randn(2, 400)
    with torch.inference_mode():
        expected = model(x)
    found = model(x)
    torch.testing.assert_close(found, expected.clone())
    found.sum().backward()
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)


def test_copies_and_pickles_start_anew():
    weight, factors = make()
    cache = MaskCache()
    ops.pst_mask(cache, weight, torch.tensor(5), 960, factors, SCALES)
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert other.handle != cache.handle and other.get([torch.tensor(5), weight]) is None


def test_one_bit_a_weight_is_saved_for_backward():
    weight, factors = make(64, 48)
    factors = PstFactors(*(None if t is None else t.requires_grad_() for t in factors))
    x = torch.randn(5, 48, requires_grad=True)
    packed = ops.pst_mask(MaskCache(), weight, torch.tensor(100), 64 * 48, factors, SCALES)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.pst_linear(x, weight, None, packed, factors, SCALES)
    own = {t.untyped_storage().data_ptr() for t in (x, weight, *factors) if t is not None}
    extra = [t for t in saved if t.untyped_storage().data_ptr() not in own]
    assert sum(t.numel() * t.element_size() for t in extra) == 64 * 48 // 8


@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(1, 30), st.floats(0, 1))
@settings(deadline=None)
def test_exact_count(seed, out, columns, share):
    torch.manual_seed(seed)
    weight, factors = make(out, columns, "UVABRC")
    count = int(share * weight.numel())
    packed = ops.pst_mask(MaskCache(), weight, torch.tensor(count), weight.numel(), factors, SCALES)
    assert (~unpack_mask(packed, columns)).sum() == count
