"""SPP over the non-zeros alone: the same function as over the dense weight, and taken where it is faster."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch.utils.checkpoint import checkpoint

from peft_sparse import SppConfig, ops, prune_magnitude
from peft_sparse.ops import csr_cache
from peft_sparse.sparsity import to_csr

from models import tiny_llama

SCALING = 2.0
SHAPES = {
    "divisible": (32, 24, 16),
    "odd": (37, 19, 16),
    "one group per row": (7, 5, 7),
    "one group": (9, 4, 1),
    "one row": (1, 3, 1),
}

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch has no MKL here")


def tensors(out, columns, groups, dtype=torch.float32, zeros=0.9):
    weight = torch.randn(out, columns, dtype=dtype)
    weight[torch.rand(out, columns) < zeros] = 0
    return weight, torch.randn(out, dtype=dtype), torch.randn(groups, columns), torch.randn(out)


def gradients(op, x, matrix, bias, A, B, dy):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, bias, A, B)]
    x, bias, A, B = inputs
    y = op(x, matrix, bias, A, B, SCALING)
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("batch", [(6,), (2, 5), (1,)], ids=["2-D", "3-D", "one token"])
@pytest.mark.parametrize("zeros", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_equals_reference(shape, batch, zeros, dtype, tolerance):
    weight, bias, A, B = tensors(*shape, dtype, zeros)
    A, B = A.to(dtype), B.to(dtype)
    x, dy = torch.randn(*batch, shape[1], dtype=dtype), torch.randn(*batch, shape[0], dtype=dtype)
    expected = gradients(ops.reference.spp_linear, x, weight, bias, A, B, dy)
    found = gradients(ops.spp_csr_linear, x, to_csr(weight), bias, A, B, dy)
    for name, a, b in zip(("y", "dx", "dbias", "dA", "dB"), found, expected, strict=True):
        atol = tolerance * max(1.0, b.abs().max().item())
        torch.testing.assert_close(a, b, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("tokens", [1, 4, 5, 13])
def test_chunks_give_the_same(monkeypatch, tokens):
    weight, bias, A, B = tensors(37, 19, 5)
    x, dy = torch.randn(tokens, 19), torch.randn(tokens, 37)
    whole = gradients(ops.spp_csr_linear, x, to_csr(weight), bias, A, B, dy)
    monkeypatch.setattr("peft_sparse.ops.spp_csr.MAX_TOKENS", 4)
    for a, b in zip(gradients(ops.spp_csr_linear, x, to_csr(weight), bias, A, B, dy), whole, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    weight, bias, A, B = (tensor.double() for tensor in tensors(7, 5, 3, zeros=0.6))
    x, csr = torch.randn(3, 5, dtype=torch.float64), to_csr(weight)
    inputs = [tensor.requires_grad_() for tensor in (x, bias, A, B)]
    assert torch.autograd.gradcheck(
        lambda x, bias, A, B: ops.spp_csr_linear(x, csr, bias, A, B, SCALING), inputs, nondet_tol=1e-12
    )


def test_update_alone():
    weight, _, A, B = tensors(10, 6, 3)
    x = torch.randn(4, 6)
    found = ops.spp_csr_linear(x, to_csr(weight), None, A, B, SCALING, offset=0.0)
    torch.testing.assert_close(found, ops.reference.spp_linear_update(x, weight, A, B, SCALING))


def test_output_may_be_edited_in_place():
    weight, bias, A, B = tensors(8, 6, 2)
    y = ops.spp_csr_linear(torch.randn(3, 6, requires_grad=True), to_csr(weight), bias, A, B, SCALING)
    y.add_(1).sum().backward()
    assert y._base is None


# The choice


@pytest.fixture
def timed(monkeypatch):
    """Calls `timed(seconds of the sparse way, of the dense way)`; the list of what was asked to be timed."""
    asked = []

    def set_times(sparse, dense):
        monkeypatch.setattr(csr_cache, "_time_both", lambda *args: asked.append(args[0]) or (sparse, dense))
        monkeypatch.setattr(csr_cache, "_FASTER", {})
        monkeypatch.setattr(csr_cache, "MIN_NUMEL", 0)
        return asked

    return set_times


@pytest.mark.parametrize("sparse, dense, taken", [(1.0, 2.0, True), (2.0, 1.0, False), (0.99, 1.0, False)])
def test_the_faster_way_is_taken(timed, sparse, dense, taken):
    asked = timed(sparse, dense)
    weight, _, A, B = tensors(16, 16, 4)
    cache, x = ops.CsrCache(), torch.randn(5, 16)
    assert (cache.get(x, weight, A, B) is not None) == taken
    assert (cache.get(x, weight, A, B) is not None) == taken
    assert asked == [5]  # once
    cache.get(torch.randn(40, 16), weight, A, B)
    cache.get(x.clone().requires_grad_(), weight, A, B)
    assert asked == [5, 40, 5]


def test_what_is_not_sparse_is_not_timed(timed):
    asked = timed(1.0, 2.0)
    weight, _, A, B = tensors(64, 64, 4, zeros=0.5)
    assert ops.CsrCache().get(torch.randn(5, 64), weight, A, B) is None and asked == []


def test_the_switch(timed):
    timed(2.0, 1.0)
    weight, _, A, B = tensors(16, 16, 4, zeros=0.5)
    cache, x = ops.CsrCache(), torch.randn(5, 16)
    with ops.use_csr(True):
        assert cache.get(x, weight, A, B) is not None
        for other in (weight.bfloat16(), torch.nn.Parameter(weight), weight.to("meta")):
            assert cache.get(x, other, A, B) is None
        with torch.autocast("cpu", dtype=torch.bfloat16), ops.use_csr(True):
            assert cache.get(x, weight, A, B) is None
        with ops.use_reference():
            assert cache.get(x, weight, A, B) is None
        with ops.use_csr(False):
            assert cache.get(x, weight, A, B) is None
    assert cache.get(x, weight, A, B) is None


@pytest.mark.parametrize("change", [lambda w: w.zero_(), lambda w: w.data.mul_(2), lambda w: w.copy_(w.clone())])
def test_a_changed_weight_is_read_again(change):
    weight, _, A, B = tensors(300, 300, 4)  # larger than what is compared as a whole
    cache, x = ops.CsrCache(), torch.randn(5, 300)
    with ops.use_csr(True):
        cache.get(x, weight, A, B)
        change(weight)
        csr = cache.get(x, weight, A, B)
    assert torch.equal(csr.with_values(csr.values).to_dense(), weight)


def test_a_weight_that_keeps_moving_stays_dense(timed):
    timed(1.0, 2.0)
    weight, _, A, B = tensors(300, 300, 4)
    cache, x = ops.CsrCache(), torch.randn(5, 300)
    taken = [cache.get(x, weight.clone(), A, B) is not None for _ in range(5)]
    assert taken == [True] * csr_cache.MAX_REBUILDS + [False] * (5 - csr_cache.MAX_REBUILDS)


def test_copies_start_empty():
    weight, _, A, B = tensors(16, 16, 4)
    cache = ops.CsrCache()
    with ops.use_csr(True):
        cache.get(torch.randn(5, 16), weight, A, B)
    assert cache._kept is not None
    assert copy.deepcopy(cache)._kept is None and pickle.loads(pickle.dumps(cache))._kept is None


def test_timing_is_real(monkeypatch):
    """Nothing replaced: of a layer with a handful of non-zeros the sparse way is taken."""
    monkeypatch.setattr(csr_cache, "_FASTER", {})
    weight, (A, B) = torch.zeros(512, 2048), (torch.randn(16, 2048), torch.randn(512))
    weight[::7, 5] = 1.0
    x, state = torch.randn(256, 2048), torch.get_rng_state()
    assert ops.CsrCache().get(x, weight, A.requires_grad_(), B.requires_grad_()) is not None
    assert len(csr_cache._FASTER) == 1
    assert torch.equal(torch.get_rng_state(), state)


# In a model


def sparse_model(**config):
    torch.manual_seed(0)
    model = prune_magnitude(tiny_llama(), sparsity=0.9)
    return get_peft_model(model, SppConfig(init_weights=False, **config))


def losses(model, steps=4):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, found = torch.arange(24).view(2, 12) % 16, []
    torch.manual_seed(1)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found)


@pytest.mark.parametrize("config", [{}, {"spp_dropout": 0.3}], ids=["plain", "dropout"])
def test_same_losses(config):
    with ops.use_csr(False):
        expected = losses(sparse_model(**config))
    with ops.use_csr(True):
        model = sparse_model(**config)
        torch.testing.assert_close(losses(model), expected, atol=1e-5, rtol=1e-5)
        merged = copy.deepcopy(model).merge_and_unload()
        ids = torch.arange(12)[None] % 16
        model.eval()
        torch.testing.assert_close(model(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_timing_inside_a_checkpoint(monkeypatch, use_reentrant):
    """The first forward, which times both ways, may be one whose saved tensors a checkpoint counts."""
    monkeypatch.setattr(csr_cache, "_FASTER", {})
    monkeypatch.setattr(csr_cache, "MIN_NUMEL", 0)
    layer = sparse_model().base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 5, layer.in_features, requires_grad=True)
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    assert csr_cache._FASTER
    expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, atol=1e-4, rtol=1e-4)


def test_inference_mode_first_and_training_later():
    with ops.use_csr(True):
        model = sparse_model()
        with torch.inference_mode():
            model(input_ids=torch.arange(8)[None])
        assert losses(model, steps=2).isfinite().all()
