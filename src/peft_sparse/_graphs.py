"""What may be asked of a tensor: no values where it has none, and no operators of our own in a graph that is to run
elsewhere."""

from __future__ import annotations

from typing import Any

import torch

# torch 2.6 has no such function; its flag is set by torch.export alone, while torch.compile answers in its own way
_is_exporting: Any = getattr(torch.compiler, "is_exporting", lambda: torch.compiler._is_compiling_flag)


def values_unknown(tensor: torch.Tensor | None = None) -> bool:
    """Whether values cannot be looked at, so that tensors made here are not to be kept either: in a graph that
    `torch.compile` or `torch.export` records, and in a FakeTensorMode, which runs a model without memory.

    Args:
        tensor: also whether this one is on the meta device.
    """
    if torch.compiler.is_compiling() or (tensor is not None and tensor.is_meta):
        return True
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def leaves_python() -> bool:
    """Whether a graph is recorded that will run without this package, in which operators and autograd functions of
    ours mean nothing: by `torch.export` or `torch.jit.trace`, and so by `torch.onnx.export`."""
    return _is_exporting() if torch.compiler.is_compiling() else torch.jit.is_tracing()
