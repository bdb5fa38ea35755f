"""What is SPP's own: any number of rows, dropout on the update alone, zeros implied by the base and kept exactly."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_sparse import SppConfig
from peft_sparse.linears import block_linears, get_weight
from peft_sparse.pruning import prune_magnitude
from peft_sparse.sparsity import round_keeping_support
from peft_sparse.tuners.spp import SppLinear

from models import tiny_llama


def one_linear(config: SppConfig, out: int, columns: int, dtype=torch.float32) -> tuple[nn.Module, SppLinear]:
    linear = nn.Linear(columns, out).to(dtype)
    with torch.no_grad():
        linear.weight[torch.rand(out, columns) < 0.5] = 0
    config.target_modules = {"0"}
    model = get_peft_model(nn.Sequential(linear), config)
    return model, model.base_model.model[0]


@pytest.mark.parametrize("out", [1, 7, 16, 50, 100])
@pytest.mark.parametrize("r", [1, 3, 16])
def test_any_number_of_rows(out, r):
    model, layer = one_linear(SppConfig(r=r, init_weights=False), out, 12)
    assert layer.spp_A["default"].shape == (min(r, out), 12) and layer.spp_B["default"].shape == (out,)
    x = torch.randn(3, 12)
    expected = model(x)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)


def test_scaling_is_alpha_over_r_as_configured():
    _, layer = one_linear(SppConfig(r=16, spp_alpha=32, init_weights=False), 4, 12)
    weight, A, B = layer.base_weight, layer.spp_A["default"], layer.spp_B["default"]
    torch.testing.assert_close(layer.effective_weight("default"), weight * (1 + 2 * B[:, None] * A))


def test_starts_with_b_at_zero_and_a_kaiming_uniform():
    _, layer = one_linear(SppConfig(), 32, 100)
    assert (layer.spp_B["default"] == 0).all()
    assert layer.spp_A["default"].abs().max() <= 0.1 and layer.spp_A["default"].abs().max() > 0.09


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_ones_starts_as_the_base_and_its_first_gradient_is_the_whole_of_a_group_s(dropout):
    config = SppConfig(r=3, spp_alpha=6, spp_dropout=dropout, init_weights="ones")
    model, layer = one_linear(config, 8, 12)
    A, B = layer.spp_A["default"], layer.spp_B["default"]
    assert (A == 0).all() and (B == 1).all()
    assert torch.equal(layer.effective_weight("default"), layer.base_layer.weight)
    x = torch.randn(5, 12)
    torch.testing.assert_close(model(x), layer.base_layer(x))
    model.eval()
    effective = layer.effective_weight("default").detach().requires_grad_(True)
    (x @ effective.T).square().sum().backward()
    (model(x) - layer.base_layer.bias).square().sum().backward()
    products = (effective.grad * layer.base_layer.weight).tensor_split(3)
    torch.testing.assert_close(A.grad, 2.0 * torch.stack([product.sum(0) for product in products]))
    assert (B.grad == 0).all()


def test_ones_is_kept_in_the_file_of_the_config(tmp_path):
    model, layer = one_linear(SppConfig(init_weights="ones"), 8, 12)
    nn.init.normal_(layer.spp_A["default"])
    x = torch.randn(5, 12)
    expected = model.eval()(x)
    model.save_pretrained(tmp_path)
    assert SppConfig.from_pretrained(tmp_path).init_weights == "ones"
    loaded = PeftModel.from_pretrained(nn.Sequential(layer.base_layer), tmp_path)
    assert torch.equal(loaded(x), expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)
    with pytest.raises(ValueError, match="`init_weights` should be True or False, got 'one', or 'ones' to start"):
        SppConfig(init_weights="one")


def test_dropout_touches_the_update_alone():
    model, layer = one_linear(SppConfig(spp_dropout=0.5), 8, 12)
    x = torch.randn(64, 12)
    model.train()
    assert torch.equal(model(x), layer.base_layer(x))  # B = 0: nothing to drop
    nn.init.normal_(layer.spp_B["default"])
    first, second = model(x) - layer.base_layer(x), model(x) - layer.base_layer(x)
    assert not torch.allclose(first, second)
    model.eval()
    update = model(x) - layer.base_layer(x)
    many = torch.stack([layer.train()(x) - layer.base_layer(x) for _ in range(600)]).mean(0)
    assert (many - update).norm() < 0.15 * update.norm()  # the mean of dropped updates is the update


def test_dropout_composes():
    """Two adapters with dropout: in the mean over masks, the composition without dropout."""
    model, _ = one_linear(SppConfig(spp_dropout=0.3, init_weights=False), 8, 12)
    model.add_adapter("b", SppConfig(target_modules=["0"], spp_dropout=0.3, init_weights=False))
    model.base_model.set_adapter(["default", "b"])
    x = torch.randn(32, 12)
    model.eval()
    expected = model(x)
    model.train()
    many = torch.stack([model(x) for _ in range(1500)]).mean(0)
    assert (many - expected).norm() < 0.1 * expected.norm()


def test_no_mask_is_stored():
    _, layer = one_linear(SppConfig(r=4), 8, 12)
    stored = {name: tensor for name, tensor in layer.state_dict().items() if "base_layer" not in name}
    assert {name: tuple(t.shape) for name, t in stored.items()} == {"spp_A.default": (4, 12), "spp_B.default": (8,)}
    assert not [name for name, t in layer.named_buffers()]


def test_number_of_trainable_parameters():
    """r in + out for each linear."""
    model, _ = one_linear(SppConfig(r=16), 100, 24)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 16 * 24 + 100


def test_a_base_without_zeros_is_told_so():
    with pytest.warns(UserWarning, match=r"already pruned.*14 of 14.*`model.layers.0.*prune_wanda"):
        get_peft_model(tiny_llama(), SppConfig())


def test_an_adapter_that_is_loaded_onto_a_dense_base_is_told_whose_it_is(tmp_path):
    get_peft_model(prune_magnitude(tiny_llama()), SppConfig()).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="already pruned.*14 of 14.*onto the pruned model that it was trained on"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_a_partly_dense_base_is_told_which(recwarn):
    model = prune_magnitude(tiny_llama(), exclude_modules=["down_proj"])
    with pytest.warns(UserWarning, match=r"2 of 14.*down_proj"):
        get_peft_model(model, SppConfig())


def test_a_pruned_base_is_not(recwarn):
    get_peft_model(prune_magnitude(tiny_llama(), "2:4"), SppConfig())
    assert not [w for w in recwarn if "pruned" in str(w.message)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cancellation_and_underflow_do_not_make_zeros(dtype):
    """1 + s B A = 0 in a whole row, and weights at the edge of the dtype's range."""
    model, layer = one_linear(SppConfig(r=1, spp_alpha=1), 4, 8, dtype)
    with torch.no_grad():
        layer.base_layer.weight[1] = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
        layer.spp_A["default"].fill_(1.0)
        layer.spp_B["default"].copy_(torch.tensor([-1.0, -0.75, 0.0, 0.5]))
    zeros = layer.base_layer.weight == 0
    weight = layer.base_layer.weight.detach().clone()
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight == 0, zeros)
    assert layer.base_layer.weight[0].abs().max() < 1e-7
    assert torch.equal(layer.base_layer.weight[2], weight[2])


def test_rounding_keeps_the_sign():
    weight = torch.tensor([1e-12, -1e-12, 0.0, 1.0])
    rounded = round_keeping_support(weight, weight != 0, torch.float16)
    assert rounded[0] > 0 > rounded[1] and rounded[2] == 0 and rounded[3] == 1


def test_a_merge_that_would_move_a_zero_is_refused(monkeypatch):
    model, layer = one_linear(SppConfig(init_weights=False), 8, 12)
    before = layer.base_layer.weight.detach().clone()
    dense = lambda name, weight=None: layer.base_weight + 1  # noqa: E731
    monkeypatch.setattr(layer, "effective_weight", dense)
    with pytest.raises(RuntimeError, match="keeps every zero"):
        model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged


def test_a_merge_that_would_change_the_function_is_refused(monkeypatch):
    model, layer = one_linear(SppConfig(init_weights=False), 8, 12)
    before = layer.base_layer.weight.detach().clone()
    monkeypatch.setattr(layer, "effective_weight", lambda name, weight=None: layer.base_weight * 1.5)
    with pytest.raises(RuntimeError, match="keeps the layer's function"):
        model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, before)


def test_2_4_survives_training_and_merge():
    model = get_peft_model(prune_magnitude(tiny_llama(), "2:4"), SppConfig())
    zeros = {name: get_weight(m) == 0 for name, m in block_linears(model.base_model.model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.randint(3, 90, (4, 16))
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    for name, linear in block_linears(model.merge_and_unload()).items():
        found = get_weight(linear) == 0
        assert (found.reshape(-1, 4).sum(1) == 2).all()
        assert torch.equal(found, zeros[name])


def test_zeros_of_modules_that_are_trained_whole_are_not_kept(tmp_path):
    """And nothing is said of a head and embeddings, or of what was trained and is loaded."""
    with pytest.warns(
        UserWarning, match=r"trains 6 pruned ones whole \(the first is `model.layers.0.mlp.gate_proj`\)"
    ):
        model = get_peft_model(prune_magnitude(tiny_llama(), "2:4"), SppConfig(modules_to_save=["mlp"]))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SPP keeps the zeros")
        PeftModel.from_pretrained(prune_magnitude(tiny_llama(), "2:4"), tmp_path)
        others = SppConfig(modules_to_save=["lm_head", "embed_tokens"])
        get_peft_model(prune_magnitude(tiny_llama(), "2:4"), others)
