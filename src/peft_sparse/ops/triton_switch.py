"""The switch of the Triton kernels, and which layers they take.

The kernels form a layer's effective weight, and reduce G = dY^T X to the factors' gradients, in one pass each; PyTorch
does that in a number of them, and the matmuls in both cases, block by block (`peft_sparse.ops.blocks`). They are off
unless somebody turns them on: on the one GPU where they were timed they saved memory and little time.
Importing this module does not import triton, which need not be installed.
"""

from __future__ import annotations

import os
from importlib import import_module

import torch

from peft_sparse._switch import Switch
from peft_sparse.ops.reference import PstFactors
from peft_sparse.sparsity import PackedWeight, Weight

VARIABLE = "PEFT_SPARSE_TRITON"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_RANK = 32  # tiles of low-rank factors lie in shared memory; with more than this they may not fit
MIN_CAPABILITY = (8, 0)  # of an NVIDIA GPU: older ones have less shared memory, and no bfloat16


class use_triton(Switch):
    """Compute SPP and PST layers that lie on a GPU with Triton kernels, forward and backward.

    Off by default: on the one GPU where they were timed, an NVIDIA H200, a layer's training step took 0.85 to 0.97 of
    the time without them, and 0.44 to 0.65 of the memory (`benchmarks/README.md`). The environment variable
    `PEFT_SPARSE_TRITON=1` turns them on from the start. Results equal PyTorch's to rounding.

    What the kernels do not take is computed by PyTorch as before: tensors on a CPU, on an AMD GPU, or on an NVIDIA GPU
    of a compute capability below 8.0; float64; compiled graphs; the backward of a layer whose weight is trained; and
    of PST all but the default, `importance="pst"` with `weight_update="low_rank"`, at r up to 32 and score_r up to 31.
    [`triton_takes_spp`] and [`triton_takes_pst`] decide. With the kernels on, [`peft_sparse.accelerate_sparse`] also
    tries one that multiplies a packed weight with a single token, see [`triton_takes_bitmask`].

    In a process with `TRITON_INTERPRET=1` the kernels run on a CPU too, under the interpreter: slowly, to test them.

    Args:
        enabled: False goes back to PyTorch.

    Raises:
        ImportError: if triton is not installed.

    Examples:
        >>> with use_triton(enabled=False):
        ...     triton_in_use()
        False
    """

    def __init__(self, enabled: bool = True) -> None:
        if enabled:
            _import_triton()
        super().__init__(enabled)


def triton_in_use() -> bool:
    """Whether [`use_triton`] is on."""
    return use_triton._enabled


def _import_triton() -> None:
    try:
        import_module("triton")
    except ImportError as error:
        raise ImportError(
            f"`use_triton` and {VARIABLE}=1 need the package triton, which cannot be imported ({error}). Install it "
            "with `pip install 'peft-sparse[triton]'` (Linux), or leave the switch off: PyTorch computes the same."
        ) from error


def _switched_on_from_outside() -> bool:
    value = os.environ.get(VARIABLE, "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} is 1 (on) or 0 (off), got {value!r}.")
    return value == "1"


if _switched_on_from_outside():
    use_triton()


def _runs(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether kernels are on and can read these tensors. A compiler fuses on its own, and gets the PyTorch path."""
    if not use_triton._enabled or torch.compiler.is_compiling() or x.numel() == 0:
        return False
    tensors = [x, *(tensor for tensor in others if tensor is not None)]
    readable = all(tensor.device == x.device and tensor.dtype in DTYPES for tensor in tensors)
    return readable and (_is_supported_gpu(x.device) or _interpreted())


def _is_supported_gpu(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def _interpreted() -> bool:
    return import_module("peft_sparse.ops.triton_tiles").INTERPRETED


def triton_takes_spp(x: torch.Tensor, weight: Weight, A: torch.Tensor, B: torch.Tensor) -> bool:
    """Whether the kernels compute this SPP layer, whose weight is dense or packed; see [`use_triton`]."""
    entries = weight.values if isinstance(weight, PackedWeight) else weight
    return isinstance(entries, torch.Tensor) and _runs(x, entries, A, B)


def triton_takes_pst(x: torch.Tensor, weight: torch.Tensor, factors: PstFactors) -> bool:
    """Whether the kernels compute this PST layer; see [`use_triton`]."""
    U, V, D, A, B, R, C, S = factors
    if U is None or V is None or A is None or B is None or R is None or C is None or D is not None or S is not None:
        return False
    return _runs(x, weight, *factors) and max(U.shape[1], A.shape[1] + 1) <= MAX_RANK  # + 1: R and C go along


def triton_takes_bitmask(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> bool:
    """Whether the kernel of a packed weight computes this token; see [`use_triton`]. It has no backward."""
    tensors = (weight.values, *(() if bias is None else (bias,)))
    same = all(tensor.dtype == x.dtype for tensor in tensors)
    placed = weight.bitmask.device == weight.starts.device == x.device
    return same and placed and x.numel() == weight.in_features and _runs(x, *tensors)
