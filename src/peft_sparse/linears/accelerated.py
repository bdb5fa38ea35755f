"""A linear that computes with another form of its weight where there are enough zeros, or few enough tokens.

The weight stays where it is, under its name: a state dict, tied weights, saving, copying and training are those of
the linear that it was. What is added is an `Acceleration`: for each number of tokens, the operand (operands.py) to
multiply with, or none. None is used, and the linear computes as it always did,

- where autograd records, since the kernels have no backward; in autocast, in compiled or traced graphs, and inside of
  `torch.func` and forward-mode differentiation;
- for inputs of another dtype or device than the weight, and for numbers of tokens that nobody chose for;
- from the moment on at which the weight is no longer the one that the operand was made from.

The last is looked at in every forward (tracked.py).
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_sparse.linears.operands import Operand
from peft_sparse.linears.packed import PackedLinear
from peft_sparse.linears.tracked import TrackedTensor
from peft_sparse.linears.weights import forward_replaced, plain_class
from peft_sparse.ops.reference import transformed

_PLAIN_TENSORS = (torch.Tensor, nn.Parameter)
REMEMBERED = 256  # shapes of inputs
_UNSEEN: Any = object()
CHANGED = (
    "The weights of accelerated linears are no longer those that `accelerate_sparse` saw, so they compute in their "
    "own way from now on; call `accelerate_sparse(model)` again when they are final."
)


def _records(linear: nn.Module, x: torch.Tensor) -> bool:
    tensors = (x, linear._parameters.get("bias"), *_tensors(linear))
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _tensors(linear: nn.Module) -> tuple[torch.Tensor | None, ...]:
    """Those that make up the weight, looked up without `__getattr__`, which takes longer than all the rest."""
    if isinstance(linear, PackedLinear):
        return linear._parameters.get("values"), linear._buffers.get("bitmask")
    return (linear._parameters.get("weight"),)


def _has_own_bias(linear: nn.Module) -> bool:
    """Whether the bias is a parameter, or None: torch.nn.utils.prune computes it from others at each forward."""
    return "bias" in linear._parameters or linear.bias is None


class Acceleration:
    """Which operand a linear uses for how many tokens. A copy or an unpickled one has none.

    Args:
        linear: whose weight the operands are forms of.
        operands: by number of tokens; None: the linear's own way.
        packed: whether the linear was dense before it was accelerated, and is now packed.
        clear: the numbers of tokens whose operand is good for those up to the next one as well; None: all.
    """

    def __init__(
        self,
        linear: nn.Module | None = None,
        operands: Mapping[int, Operand | None] | None = None,
        packed: bool = False,
        clear: Collection[int] | None = None,
    ) -> None:
        self.operands = dict(sorted((operands or {}).items()))
        self.packed = packed
        self._tokens, self._chosen = list(self.operands), list(self.operands.values())
        self._clear = [clear is None or tokens in clear for tokens in self._tokens]
        # the values of a packed weight are shared, so that what is written into them is seen
        sampled = not isinstance(linear, PackedLinear)
        tensors = () if linear is None else _tensors(linear)
        self._tracked = tuple(TrackedTensor(cast(torch.Tensor, tensor), sampled) for tensor in tensors)
        self._dtype = self._tracked[0].dtype if self._tracked else None
        self._device = self._tracked[0].alias.device if self._tracked else None
        self._autocast = "cpu" if self._device is None else self._device.type
        self._to_the_end = isinstance(linear, PackedLinear)
        self._in_features = 0 if linear is None else in_features_of(linear)
        self._by_shape: dict[torch.Size, Operand | None] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Acceleration, (None, None, self.packed)

    @property
    def nbytes(self) -> int:
        """What the operands take beyond the weight."""
        return sum(operand.nbytes for operand in {id(o): o for o in self._chosen if o is not None}.values())

    def by_tokens(self, tokens: int) -> Operand | None:
        """The operand for a number of tokens. Between two numbers that were chosen for, what was chosen for both, if
        clear for both; above the largest none, as a dense product only gets better with more; that of the largest for
        a packed linear, whose own way is no dense product."""
        place = bisect_left(self._tokens, tokens)
        if place == len(self._tokens):
            return self._chosen[-1] if self._chosen and self._to_the_end and self._clear[-1] else None
        if self._tokens[place] == tokens:
            return self._chosen[place]
        upper = self._chosen[place]
        same = place > 0 and self._chosen[place - 1] is upper
        return upper if same and self._clear[place - 1] and self._clear[place] else None

    def operand(self, linear: nn.Module, x: torch.Tensor) -> Operand | None:
        """What to multiply `x` with, None for the linear's own way."""
        if torch.compiler.is_compiling():
            return None
        found = self._by_shape.get(x.shape, _UNSEEN)
        if found is None:  # first of all: what is not accelerated is not to be slowed down by questions
            return None
        if type(x) not in _PLAIN_TENSORS or torch.jit.is_tracing():
            return None
        if found is _UNSEEN:
            found = self._by_shape[x.shape] = self._for_shape(x.shape)
            if found is None:
                return None
        if x.dtype != self._dtype or x.device != self._device or transformed():
            return None
        if torch.is_autocast_enabled(self._autocast) or (torch.is_grad_enabled() and _records(linear, x)):
            return None
        if not self.matches(linear):
            self.drop()
            return None
        return found if _has_own_bias(linear) and found.takes(x, linear._parameters.get("bias")) else None

    def _for_shape(self, shape: torch.Size) -> Operand | None:
        """For an input of this shape, which is remembered: most forwards have the same few."""
        if len(self._by_shape) >= REMEMBERED:
            self._by_shape.clear()
        if not shape or shape[-1] != self._in_features or self._in_features == 0:
            return None
        return self.by_tokens(shape.numel() // self._in_features)

    def matches(self, linear: nn.Module) -> bool:
        """Whether the weight is still the one that the operands were made from."""
        if len(self._tracked) == 1:
            return self._tracked[0].matches(linear._parameters.get("weight"))
        return all(map(TrackedTensor.matches, self._tracked, _tensors(linear)))

    def drop(self) -> None:
        """Forget the operands, and say so."""
        self.operands, self._tokens, self._chosen, self._tracked, self._by_shape = {}, [], [], (), {}
        warnings.warn(CHANGED, stacklevel=2)

    def __repr__(self) -> str:
        used: dict[str, list[str]] = {}
        for tokens, operand in self.operands.items():
            if operand is not None:
                used.setdefault(operand.name, []).append(str(tokens))
        return "; ".join(f"{name} for {', '.join(tokens)} tokens" for name, tokens in used.items()) or "no longer"


class _Accelerated(nn.Module):
    """The forward that the accelerated classes share."""

    plain_linear_class: type[nn.Module]  # see `plain_class`
    _acceleration: Acceleration
    bias: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        operand = self._acceleration.operand(self, x)
        return super().forward(x) if operand is None else operand(x, self._parameters.get("bias"))

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)
        if self._acceleration.operands and not self._acceleration.matches(self):
            self._acceleration.drop()  # at once, since it keeps the memory of the old weight
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, accelerated: {self._acceleration!r}"


class AcceleratedLinear(_Accelerated, nn.Linear):
    """An nn.Linear with an [`Acceleration`]."""

    plain_linear_class = nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        operand, weight = self._acceleration.operand(self, x), self._parameters.get("weight")
        if operand is not None:
            return operand(x, self._parameters.get("bias"))
        if weight is None or not _has_own_bias(self) or torch.compiler.is_compiling():
            return super().forward(x)
        # Looked up without `__getattr__`, which pays for the question above where a layer is computed densely.
        return F.linear(x, weight, self._parameters.get("bias"))


class AcceleratedConv1D(_Accelerated, Conv1D):
    """A Conv1D with an [`Acceleration`]."""

    plain_linear_class = Conv1D

    def __repr__(self) -> str:  # Conv1D has one of its own
        return f"{super().__repr__().removesuffix(')')}, accelerated: {self._acceleration!r})"


class AcceleratedPackedLinear(_Accelerated, PackedLinear):
    """A [`PackedLinear`] with an [`Acceleration`]: its own way is to unpack the weight."""

    plain_linear_class = PackedLinear


_CLASSES = (AcceleratedLinear, AcceleratedConv1D, AcceleratedPackedLinear)
_ACCELERATED: dict[type[nn.Module], type[nn.Module]] = {cls.plain_linear_class: cls for cls in _CLASSES}


def acceleration_of(linear: nn.Module) -> Acceleration | None:
    """What a linear is accelerated with; None if it is not."""
    return linear._acceleration if isinstance(linear, _Accelerated) else None


def refuses_acceleration(linear: nn.Module) -> str | None:
    """Why nothing can be added to this linear; None if it can."""
    if plain_class(linear) not in _ACCELERATED:
        return f"{type(linear).__name__} has a forward of its own"
    if forward_replaced(linear):
        return "its forward was replaced, as offloading does it"
    if any(t is None or type(t) not in _PLAIN_TENSORS for t in _tensors(linear)):
        return "its weight is no plain tensor"
    if not _has_own_bias(linear):
        return "its bias is no parameter of its own, as torch.nn.utils.prune makes it"
    if 0 in cast(torch.Tensor, _tensors(linear)[-1]).shape:
        return "it has no weights"
    return None


def install(linear: nn.Module, acceleration: Acceleration) -> None:
    """Accelerate a linear, in place: it stays the object that it is, wherever it is used."""
    linear.__dict__.pop("forward", None)  # the old class's, see `forward_replaced`
    linear.__dict__["_acceleration"] = acceleration
    linear.__class__ = _ACCELERATED[plain_class(linear)]


def uninstall(linear: nn.Module) -> None:
    """The inverse of [`install`]."""
    linear.__dict__.pop("forward", None)
    linear.__class__ = plain_class(linear)
    linear.__dict__.pop("_acceleration", None)


def in_features_of(linear: nn.Module) -> int:
    """Columns of the weight."""
    if isinstance(linear, Conv1D):
        return linear.get_parameter("weight").shape[0]
    return cast(int, linear.in_features)
