"""The fused ops have first derivatives alone: to ask for more is an error, and no gradient that lacks a part.

torch's `once_differentiable` looks at dY only, which needs no gradient where a loss is linear in a layer's output: the
penalty of a gradient's norm was then trained without its own gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._C import _functions

Backward = Callable[..., tuple[torch.Tensor | None, ...]]
_MESSAGE = (
    "The fused layers have first derivatives only, got a derivative of one of them; compute the forward inside of "
    "`with peft_sparse.ops.use_reference():`, which takes the memory of plain PyTorch."
)


def first_only(backward: Backward) -> Backward:
    """For the backward of a function that is linear in its first argument: what it returns cannot be differentiated,
    and raises RuntimeError when that is tried, wherever it depends on something that needs a gradient."""

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # a compiler has an error of its own
            return found
        if not any(ctx.needs_input_grad[1:]) and not any(grad.requires_grad for grad in grads):
            return found
        raises_later: Any = _functions.DelayedError(_MESSAGE.encode(), len(found))
        return raises_later(*(None if grad is None else grad.detach().requires_grad_() for grad in found))

    return wrapper
