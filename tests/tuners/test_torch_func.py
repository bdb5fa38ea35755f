"""`torch.func`, forward-mode differentiation and second derivatives go through a layer as through any other."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from peft_sparse import PstConfig, SppConfig, ops, prune_magnitude
from peft_sparse.linears import pack_model

TARGETS = {"target_modules": ["0"], "init_weights": False}
CONFIGS = {
    "spp": lambda: SppConfig(r=4, **TARGETS),
    "spp packed": lambda: SppConfig(r=4, **TARGETS),
    "pst": lambda: PstConfig(sparsity=0.5, r=4, schedule="constant", **TARGETS),
    "movement": lambda: PstConfig(
        pattern="2:4", importance="movement", weight_update="full", schedule="constant", **TARGETS
    ),
}


@pytest.fixture(params=CONFIGS)
def adapted(request):
    """A small network, a function of its trained parameters and of inputs, and values for these."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    if "spp" in request.param:
        prune_magnitude(base, sparsity=0.5, target_modules=["0"])
    if "packed" in request.param:
        pack_model(base, target_modules=["0"])
    model = get_peft_model(base, CONFIGS[request.param]())
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (x,)).square().mean()

    return model, loss, parameters, torch.randn(5, 12, dtype=torch.float64)


def backward(model: nn.Module, x: torch.Tensor, **settings) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(
        zip(trained, torch.autograd.grad(model(x).square().mean(), list(trained.values()), **settings), strict=True)
    )


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.allclose(found[name], expected[name]) for name in found)


def test_gradients(adapted):
    model, loss, parameters, x = adapted
    expected = backward(model, x)
    assert close(grad(loss)(parameters, x), expected)
    of_each = vmap(grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    assert close({name: found.mean(0) for name, found in of_each.items()}, expected)


@pytest.mark.parametrize("name", ["spp", "pst", "movement"])
def test_an_ensemble(name):
    """torch.func's recipe for several models at once, each with a mask and a count of its own."""
    torch.manual_seed(0)
    nets = [prune_magnitude(nn.Sequential(nn.Linear(12, 8)), sparsity=0.5, target_modules=["0"]) for _ in range(3)]
    models = [get_peft_model(net, CONFIGS[name]()).eval() for net in nets]
    if name == "pst":  # counts differ too
        for layer in models[2].base_model.sparse_layers():
            layer.pst_pruned["default"].fill_(72)
    x = torch.randn(5, 12)
    state, skeleton = stack_module_state(models), copy.deepcopy(models[0]).to("meta")
    found = vmap(lambda *state: functional_call(skeleton, state, (x,)))(*state)
    torch.testing.assert_close(found, torch.stack([model(x) for model in models]))


def test_forward_mode(adapted):
    model, loss, parameters, x = adapted
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, found = jvp(lambda parameters: loss(parameters, x), (parameters,), (directions,))
    expected = sum((directions[name] * gradient).sum() for name, gradient in backward(model, x).items())
    torch.testing.assert_close(found, expected)


def test_second_derivatives(adapted):
    """Of plain autograd the reference has them."""
    model, loss, parameters, x = adapted

    def norm(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum(gradient.square().sum() for gradient in grad(loss)(parameters, x).values())

    expected = grad(norm)(parameters)
    with ops.use_reference():
        total = sum(gradient.square().sum() for gradient in backward(model, x, create_graph=True).values())
        total.backward()
    assert close({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, expected)


def test_a_gradient_that_would_lack_a_part_is_an_error(adapted):
    """A loss that is linear in the layer's output, so that the gradient of that needs none itself."""
    model, _, _, x = adapted
    layer = model.base_model.model[0]

    def penalty() -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(layer(leaf).sum(), leaf, create_graph=True)
        return (gradient.norm(dim=1) - 1).square().mean()

    with pytest.raises(RuntimeError, match=r"first derivatives only.* `with peft_sparse.ops.use_reference\(\):`"):
        penalty().backward()
    with ops.use_reference():
        penalty().backward()
    assert any(p.grad is not None and p.grad.any() for p in layer.parameters())
    gradients = backward(model, x, create_graph=True)  # which is no error in itself
    assert close(gradients, backward(model, x))


def test_a_gradient_that_depends_on_nothing_trained_lacks_none(adapted):
    model, _, _, x = adapted
    layer, leaf = model.base_model.model[0], x.clone().requires_grad_()
    model.requires_grad_(False)
    (gradient,) = torch.autograd.grad(layer(leaf).sum(), leaf, create_graph=True)
    assert not gradient.requires_grad


def test_batches_of_gradients_are_mapped_by_the_reference(adapted):
    model, _, _, x = adapted
    leaf, dys = x.clone().requires_grad_(), torch.randn(3, 5, 1, dtype=torch.float64)
    with ops.use_reference():
        (batched,) = torch.autograd.grad(model(leaf), leaf, dys, is_grads_batched=True)
    each = [torch.autograd.grad(model(leaf), leaf, dy)[0] for dy in dys]
    torch.testing.assert_close(batched, torch.stack(each))
