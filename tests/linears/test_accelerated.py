"""An accelerated linear is the linear that it was, wherever the operand is not used, and computes the same where it
is."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from peft_sparse.linears import (
    OPERANDS,
    Acceleration,
    PackedLinear,
    acceleration_of,
    get_weight,
    in_out_features,
    install,
    is_linear,
    num_zeros,
    plain_class,
    refuses_acceleration,
    uninstall,
)
from peft_sparse.linears.operands import CsrOperand, is_two_of_four
from peft_sparse.linears.tracked import KEPT, SAMPLED, _sample
from peft_sparse.native import unavailable, use_native
from peft_sparse.sparsity import PackedWeight

KINDS = {
    "Linear": lambda: nn.Linear(13, 9),
    "no bias": lambda: nn.Linear(16, 9, bias=False),
    "Conv1D": lambda: Conv1D(9, 13),
    "packed": lambda: PackedLinear.from_linear(pruned(nn.Linear(13, 9))),
    "packed Conv1D": lambda: PackedLinear.from_linear(pruned(Conv1D(9, 13))),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def pruned(linear, zeros=0.5):
    with torch.no_grad():
        linear.weight[torch.rand(linear.weight.shape) < zeros] = 0
    return linear


class Watched(CsrOperand):
    """Counts its uses."""

    uses = 0

    def __call__(self, x, bias):
        self.uses += 1
        return super().__call__(x, bias)


def accelerated(make, tokens=(1, 4, 64)):
    linear = make()
    if not isinstance(linear, PackedLinear):
        pruned(linear)
    operand = Watched.of(linear)
    install(linear, Acceleration(linear, dict.fromkeys(tokens, operand)))
    return linear, operand


@each_kind
@pytest.mark.parametrize("batch", [(), (1,), (1, 1), (2,), (2, 5), (64,)], ids=str)
def test_computes_what_the_linear_computes(kind, batch):
    linear, operand = accelerated(kind)
    x = torch.randn(*batch, in_out_features(linear)[0])
    with torch.no_grad():
        y = linear(x)
        assert operand.uses == 1
        torch.testing.assert_close(y, plain_class(linear).forward(linear, x))
    assert y.shape == (*batch, 9) and operand.uses == 1


@each_kind
def test_is_the_same_module_with_the_same_state(kind):
    linear, _ = accelerated(kind)
    plain = plain_class(linear)
    assert isinstance(linear, plain) and type(linear) is not plain and is_linear(linear)
    assert "accelerated: csr for" in repr(linear)
    state, zeros, weight = linear.state_dict(), num_zeros(linear), get_weight(linear)
    assert set(state) == set(kind().state_dict())
    uninstall(linear)
    assert type(linear) is plain and "_acceleration" not in linear.__dict__ and "accelerated" not in repr(linear)
    assert num_zeros(linear) == zeros and torch.equal(get_weight(linear), weight)
    assert all(torch.equal(tensor, state[name]) for name, tensor in linear.state_dict().items())
    uninstall(linear)  # nothing to do
    assert type(linear) is plain


def test_numbers_of_tokens():
    linear = pruned(nn.Linear(8, 4))
    first, second = CsrOperand.of(linear), CsrOperand.of(linear)
    found = Acceleration(linear, {16: None, 1: first, 8: second, 4: first, 32: second, 2: first})
    expected = {0: None, 1: first, 2: first, 3: first, 4: first, 5: None, 8: second, 12: None, 16: None, 20: None}
    expected |= {32: second, 33: None}
    assert {tokens: found.by_tokens(tokens) for tokens in expected} == expected
    assert found.nbytes == first.nbytes + second.nbytes
    packed = PackedLinear.from_linear(linear)  # its own way is none to fall back to
    assert Acceleration(packed, {2: first, 4: second}).by_tokens(1000) is second
    assert Acceleration(packed, {2: first, 4: second}).by_tokens(1) is None
    assert Acceleration(packed, {2: None}).by_tokens(7) is None and Acceleration().by_tokens(1) is None


def test_numbers_in_between_take_what_is_clear_on_both_sides():
    linear = pruned(nn.Linear(8, 4))
    operand = CsrOperand.of(linear)
    found = Acceleration(linear, dict.fromkeys((1, 4, 8, 16), operand), clear={1, 4, 16})
    assert [tokens for tokens in range(20) if found.by_tokens(tokens) is operand] == [1, 2, 3, 4, 8, 16]
    packed = PackedLinear.from_linear(linear)
    assert Acceleration(packed, {1: operand, 4: operand}, clear={1}).by_tokens(5) is None


@each_kind
def test_where_autograd_records_it_computes_densely(kind):
    linear, operand = accelerated(kind)
    size = in_out_features(linear)[0]
    x = torch.randn(1, size, requires_grad=True)
    y = linear(x)
    assert operand.uses == 0
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], get_weight(linear).detach().sum(0)[None])
    linear.requires_grad_(False)
    linear(x)
    assert operand.uses == 0
    linear(x.detach())  # nothing to record
    assert operand.uses == 1
    if linear.bias is not None:
        linear.bias.requires_grad_()
        linear(x.detach()).sum().backward()
        assert operand.uses == 1 and linear.bias.grad.tolist() == [1.0] * 9


@torch.no_grad()
def test_other_inputs_are_the_linears_own_business():
    linear, operand = accelerated(KINDS["Linear"])
    x = torch.randn(1, 13)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x.double())
    with pytest.raises(RuntimeError, match="shape"):
        linear(torch.randn(1, 26))
    assert linear(torch.randn(0, 13)).shape == (0, 9) and linear(torch.randn(65, 13)).shape == (65, 9)
    fake = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        assert linear(fake.from_tensor(x)).shape == (1, 9)
    assert operand.uses == 0
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), nn.functional.linear(x, linear.weight, linear.bias))
    assert torch.fx.symbolic_trace(nn.Sequential(linear)).graph.nodes
    assert torch.vmap(linear)(x).shape == (1, 9)
    tangents = [torch.func.jvp(linear, (x,), (torch.ones_like(x),))[1]]
    with forward_ad.dual_level():
        tangents.append(forward_ad.unpack_dual(linear(forward_ad.make_dual(x, torch.ones_like(x)))).tangent)
    for tangent in tangents:
        torch.testing.assert_close(tangent, linear.weight.sum(1)[None])
    assert operand.uses == 0
    traced = torch.jit.trace(linear, x, check_trace=False)
    torch.testing.assert_close(traced(2 * x), nn.functional.linear(2 * x, linear.weight, linear.bias))
    assert operand.uses == 0


def changes():
    def in_place(linear):
        linear.weight.mul_(2)

    def through_data(linear):  # as PEFT merges
        linear.weight.data += torch.randn_like(linear.weight)

    def other_data(linear):
        linear.weight.data = linear.weight.data + 1

    def other_parameter(linear):
        linear.weight = nn.Parameter(linear.weight.detach().clone() + 1)

    def loaded(linear):
        linear.load_state_dict({name: 3 * tensor for name, tensor in linear.state_dict().items()})

    def assigned(linear):
        linear.load_state_dict({name: 3 * tensor for name, tensor in linear.state_dict().items()}, assign=True)

    def transposed(linear):
        linear.weight.data = linear.weight.data.T

    return [in_place, through_data, other_data, other_parameter, loaded, assigned, transposed]


def laid_out_by_columns():
    linear = nn.Linear(9, 9)
    linear.weight.data = linear.weight.data.T
    return linear


MADE = {"small": lambda: nn.Linear(9, 9), "wide": lambda: nn.Linear(96, 96), "by columns": laid_out_by_columns}


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
@torch.no_grad()
def test_a_changed_weight_is_noticed(change, make):
    linear, operand = accelerated(make)
    size = linear.in_features
    x = torch.randn(1, size)
    linear(x)
    change(linear)
    with pytest.warns(UserWarning, match="call `accelerate_sparse"):
        y = linear(x)
    assert torch.equal(y, nn.functional.linear(x, linear.weight, linear.bias)) and operand.uses == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear(x)  # said once
    assert acceleration_of(linear).nbytes == 0


def test_the_sample_is_small():
    """It is compared in every forward."""
    for size, zeros in [(3, 0), (3, 1), (128, 0.5), (129, 0.99), (1000, 1), (3000, 0), (3000, 0.9)]:
        linear = pruned(nn.Linear(size, 2, bias=False), zeros)
        places = _sample(linear.weight)
        assert 0 < len(places) <= SAMPLED and len(set(places)) == len(places)
        content = [float(linear.weight.detach()[place]) for place in places]
        assert sum(entry != 0 for entry in content) >= min(KEPT, 2 * size) * (zeros in (0, 0.5))


@torch.no_grad()
def test_packed_values_that_are_changed():
    linear, operand = accelerated(KINDS["packed"])
    x = torch.randn(1, 13)
    assert operand.linear.values.data_ptr() == linear.values.data_ptr()
    linear.values.mul_(2)
    with pytest.warns(UserWarning, match="accelerate_sparse"):
        y = linear(x)
    torch.testing.assert_close(y, nn.functional.linear(x, linear.dense_weight(), linear.bias))


@each_kind
def test_casts_and_moves(kind):
    linear, operand = accelerated(kind)
    assert linear.to("cpu", torch.float32) is linear and acceleration_of(linear).nbytes > 0
    with pytest.warns(UserWarning, match="accelerate_sparse"):
        linear.bfloat16()
    assert acceleration_of(linear).nbytes == 0
    x = torch.randn(1, in_out_features(linear)[0]).bfloat16()
    with torch.no_grad():
        assert linear(x).dtype == torch.bfloat16
        linear.float()
        torch.testing.assert_close(linear(x.float()), plain_class(linear).forward(linear, x.float()))
    assert operand.uses == 0
    with pytest.warns(UserWarning, match="accelerate_sparse"):
        assert accelerated(kind)[0].to("meta").bias is None or True


@each_kind
@torch.no_grad()
def test_copies_start_without_operands(kind):
    linear, operand = accelerated(kind)
    x = torch.randn(1, in_out_features(linear)[0])
    file = io.BytesIO()
    torch.save(linear, file)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in (
            copy.deepcopy(linear), pickle.loads(pickle.dumps(linear)), torch.load(file, weights_only=False)
        ):  # fmt: skip
            torch.testing.assert_close(same(x), linear(x))
            assert acceleration_of(same).nbytes == 0 and acceleration_of(linear).nbytes > 0
            uninstall(same)
            assert type(same) is plain_class(linear)
    assert operand.uses == 3


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        linear, operand = accelerated(KINDS["Linear"])
        linear(torch.randn(1, 13))
    assert operand.uses == 1


def test_what_refuses():
    class Own(nn.Linear):
        pass

    assert refuses_acceleration(nn.Linear(2, 2)) is None and refuses_acceleration(Conv1D(2, 2)) is None
    assert "Own" in refuses_acceleration(Own(2, 2))
    replaced = nn.Linear(2, 2)
    replaced.forward = lambda x: x
    assert "replaced" in refuses_acceleration(replaced)
    assert "no weights" in refuses_acceleration(nn.Linear(0, 2)) == refuses_acceleration(nn.Linear(2, 0))
    masked = prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5)
    assert "no plain tensor" in refuses_acceleration(masked)
    assert refuses_acceleration(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))) is not None
    masked_bias = prune.l1_unstructured(nn.Linear(4, 4), "bias", 1)
    assert "its bias is no parameter" in refuses_acceleration(masked_bias)
    assert refuses_acceleration(PackedLinear.from_linear(nn.Linear(4, 4, bias=False))) is None


@pytest.mark.parametrize("kind", [KINDS[name] for name in ("Linear", "Conv1D", "packed")])
@torch.no_grad()
def test_a_bias_that_is_pruned_later_is_added(kind):
    linear, operand = accelerated(kind)
    linear.bias.copy_(torch.randn_like(linear.bias))
    prune.l1_unstructured(linear, "bias", 3)
    x = torch.randn(4, in_out_features(linear)[0])
    found = linear(x)
    uninstall(linear)
    assert operand.uses == 0 and linear.bias.any()
    torch.testing.assert_close(found, linear(x))


def test_what_operands_refuse():
    csr, semi, bitmask = (OPERANDS[name].refusal for name in ("csr", "semi_structured", "bitmask"))
    linear = pruned(nn.Linear(8, 4))
    assert csr(linear) is None and csr(linear.double()) is None
    assert "not on meta" in csr(nn.Linear(2, 2, device="meta"))
    assert "NVIDIA GPU, not on cpu" in semi(linear) and "not for float64" in bitmask(linear.double())
    with use_native(enabled=False):
        assert "bitmask needs native kernels, which are switched off" in bitmask(linear.float())
        assert "without native kernels, not in bfloat16" in csr(linear.bfloat16())


def test_bytes_of_csr():
    linear = pruned(nn.Linear(64, 32), 0.75)
    kept = int((linear.weight != 0).sum())
    with use_native(enabled=False):
        assert CsrOperand.of(linear).nbytes == 8 * kept + 4 * 33
        assert CsrOperand.of(PackedLinear.from_linear(linear)).nbytes == 4 * kept + 4 * 33
    if unavailable() is None:
        columns = 2 * (kept + 16)  # loaded 16 at a time, up to the last
        assert CsrOperand.of(linear).nbytes == 4 * kept + columns + 8 * 33
        assert CsrOperand.of(PackedLinear.from_linear(linear)).nbytes == columns + 8 * 33


def test_two_of_four():
    assert is_two_of_four(torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 0]])) and not is_two_of_four(torch.ones(2, 4))
    assert not is_two_of_four(torch.tensor([[0.0, 1, 1, 1]])) and not is_two_of_four(torch.zeros(2, 6))
    assert is_two_of_four(PackedWeight.of(torch.tensor([[1.0, 0, 0, 1]])).dense())
