"""Computing in place of a module with its hooks, and weights that accelerate keeps elsewhere."""

import threading

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

from peft_sparse.linears import call_as, has_hooks, keep_loaded, offload_hook, weights_loaded


def test_threads_take_turns_at_a_module():
    """Without turns the second one would put the first one's function back, for good."""
    module, entered, left = nn.Linear(2, 2), threading.Event(), threading.Event()
    found = {}

    def first(x):
        other.start()
        entered.wait(0.2)  # to no avail
        return x + 1

    def second(x):
        entered.set()
        left.wait(0.5)
        return x + 2

    other = threading.Thread(target=lambda: found.update(second=call_as(module, second, torch.zeros(2))))
    found["first"] = call_as(module, first, torch.zeros(2))
    left.set()
    other.join()
    assert "forward" not in module.__dict__
    assert found["first"].tolist() == [1, 1] and found["second"].tolist() == [2, 2]


def test_a_plain_module_has_none():
    assert not has_hooks(nn.Linear(2, 2)) and offload_hook(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
     "register_full_backward_pre_hook"],
)  # fmt: skip
def test_hooks_run_around_another_function(register):
    module, calls = nn.Linear(2, 2), []
    getattr(module, register)(lambda *_: calls.append(1))
    assert has_hooks(module)
    y = call_as(module, lambda x: 2 * x, torch.ones(1, 2, requires_grad=True))
    y.sum().backward()
    assert calls == [1] and torch.equal(y, torch.full((1, 2), 2.0))
    assert "forward" not in module.__dict__
    assert module(torch.ones(1, 2)).shape == (1, 2) and len(calls) == 2 - ("backward" in register)


def test_the_modules_own_forward_is_back_after_an_error():
    module = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError):
        call_as(module, lambda x: 1 / 0, torch.ones(1, 2))
    assert module(torch.ones(1, 2)).shape == (1, 2)


def test_offloaded_weights_are_there_while_it_runs():
    model = nn.Sequential(nn.Linear(2, 3))
    expected = model[0].weight.detach().clone()
    cpu_offload(model, execution_device="cpu")
    assert model[0].weight.is_meta and has_hooks(model[0])
    seen = call_as(model[0], lambda x: model[0].weight.detach().clone(), torch.ones(1, 2))
    assert torch.equal(seen, expected) and model[0].weight.is_meta
    with weights_loaded(*model):
        assert torch.equal(model[0].weight, expected)
    assert model[0].weight.is_meta
    keep_loaded(model[0])
    assert torch.equal(model[0].weight, expected) and offload_hook(model[0]) is None
    remove_hook_from_submodules(model)
