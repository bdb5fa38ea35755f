"""When to compute an SPP layer over the non-zeros of its weight alone: where that was measured to be faster.

Multiplying with a sparse matrix does less work and does it worse, so that it pays from a sparsity on that depends on
the machine, the layer and the number of tokens: for training a wide layer on a CPU from about 85%, for a narrow one
from about 95%. Both ways are therefore timed once for each kind of layer and input, in the first forward that meets
them, and the faster one is taken from then on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from peft_sparse._graphs import values_unknown
from peft_sparse._switch import Switch
from peft_sparse.ops.blocks import matmul_dtype
from peft_sparse.ops.fingerprint import Fingerprint
from peft_sparse.ops.reference import reference_in_use
from peft_sparse.ops.spp_csr import spp_csr_linear
from peft_sparse.ops.spp_linear import spp_linear
from peft_sparse.sparsity import CsrMatrix, to_csr

logger = logging.getLogger(__name__)

MIN_SPARSITY = 0.8  # below, it was not faster anywhere that we measured
MIN_NUMEL = 1 << 16  # smaller layers take no time
MAX_CHANGES = 3  # then it is a weight that moves with every forward, as offloaded and sharded ones do
MAX_TIMED_TOKENS = 1024
MARGIN = 0.95  # a gain of less than this is noise
CLEAR = 1.5  # times faster: no need to time again
ROUNDS = 3


class use_csr(Switch):
    """Choose yourself whether SPP layers compute with the non-zeros of their weights alone.

    It makes no difference to results but the order of sums. It can only be done on the CPU, for weights and inputs in
    float32 or float64, and not in a compiled graph; other layers go on as they are. A change of the weight is
    noticed, but for one of a few entries through `.data`, which torch does not count as a change: make it in place,
    under `torch.no_grad()`.

    Args:
        enabled: True: wherever it can be done; False: nowhere; None, as it is at the start: where it was measured to
            be faster.

    Examples:
        >>> _ = use_csr(False)  # from now on, or for some lines only:
        >>> with use_csr(True):
        ...     csr_wanted()
        True
        >>> _ = use_csr(None)
    """

    _enabled: bool | None = None

    def __init__(self, enabled: bool | None) -> None:
        super().__init__(enabled)


def csr_wanted() -> bool | None:
    """What [`use_csr`] was last told."""
    return use_csr._enabled


class CsrCache:
    """The non-zeros of one layer's weight, 16 bytes each in float32, kept where computing with them alone is faster.

    A copy or an unpickled one starts empty: what it belongs to is another layer.
    """

    def __init__(self) -> None:
        self._weight: Fingerprint | None = None  # the one that the rest is about
        self._num_non_zero = 0
        self._csr: CsrMatrix | None = None
        self._changes = 0

    def __reduce__(self) -> tuple[type[CsrCache], tuple[()]]:
        return CsrCache, ()

    def get(self, x: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> CsrMatrix | None:
        """What to hand to [`spp_csr_linear`], or None where the layer is to be computed by [`spp_linear`].

        Args:
            x: (..., in), the input of this forward.
            weight: (out, in), the layer's frozen weight.
            A, B: the factors that it will be computed with.
        """
        wanted = csr_wanted()
        if wanted is False or not _possible(x, weight) or (not wanted and weight.numel() < MIN_NUMEL):
            return None
        if self._weight is None or not self._weight.matches(weight):
            self._changes += 1
            if self._changes > MAX_CHANGES and not wanted:
                return None
            self._csr, self._weight = None, Fingerprint.of(weight)
            self._num_non_zero = int(weight.count_nonzero())
        if not wanted and self._num_non_zero > (1 - MIN_SPARSITY) * weight.numel():
            return None
        if not wanted and not self._is_faster(x, weight, A, B):
            return None
        self._csr = self._csr or _to_csr(weight)
        return self._csr

    def _is_faster(self, x: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> bool:
        tokens = min(x.numel() // x.shape[-1], MAX_TIMED_TOKENS)
        grads = (x.requires_grad, A.requires_grad or B.requires_grad) if torch.is_grad_enabled() else (False, False)
        share = self._num_non_zero / weight.numel()
        key = (*weight.shape, weight.dtype, tokens.bit_length(), round(share, 2), grads, torch.get_num_threads())
        if key not in _FASTER:
            # In a thread, which has none of what may surround this forward: the hooks of a checkpoint, a counter of
            # operations, autocast, inference mode.
            with ThreadPoolExecutor(max_workers=1) as thread:
                ratio = thread.submit(_time_both, tokens, weight, self._csr or _to_csr(weight), A, B, grads).result()
            _FASTER[key] = ratio < MARGIN
            logger.info(
                f"SPP on {tuple(weight.shape)} weights, {1 - share:.0%} zeros, {tokens} tokens: the non-zeros alone "
                f"take {ratio:.2f} of the dense time, so they are {'used' if _FASTER[key] else 'not used'}."
            )
        return _FASTER[key]


_FASTER: dict[tuple[Any, ...], bool] = {}


@torch.no_grad()
def _to_csr(weight: torch.Tensor) -> CsrMatrix:
    with torch.inference_mode(False):  # training may need it after evaluation
        return to_csr(weight)


def _possible(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        not values_unknown(weight)
        and not reference_in_use()
        and torch.backends.mkl.is_available()  # torch multiplies sparse matrices with it alone
        and x.device.type == weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.float64)
        and matmul_dtype(x) == weight.dtype
        and x.numel() > 0
        and not weight.requires_grad
        and type(weight) in (torch.Tensor, torch.nn.Parameter)  # no fake, sharded or quantised one
    )


def _time_both(
    tokens: int, weight: torch.Tensor, csr: CsrMatrix, A: torch.Tensor, B: torch.Tensor, grads: tuple[bool, bool]
) -> float:
    """The time of one pass over the non-zeros relative to a dense one, backward included where there will be one."""
    # No random numbers: the global random state is the user's, and time does not depend on the values.
    x = weight.new_ones(tokens, csr.shape[1]).requires_grad_(grads[0])
    dy = weight.new_ones(tokens, csr.shape[0])
    factors = [factor.detach().clone().requires_grad_(grads[1]) for factor in (A, B)]
    inputs = [tensor for tensor in (x, *factors) if tensor.requires_grad]

    def run(op: Callable[..., torch.Tensor], matrix: Any) -> float:
        start = time.perf_counter()
        y = op(x, matrix, None, *factors, 1.0)
        if inputs:
            torch.autograd.grad(y, inputs, dy)
        return time.perf_counter() - start

    sparse, dense = [], []
    for turn in range(1 + ROUNDS):
        times = run(spp_csr_linear, csr), run(spp_linear, weight.detach())
        if turn == 0:
            continue  # warm-up
        sparse.append(times[0])
        dense.append(times[1])
        if not 1 / CLEAR < times[0] / times[1] < CLEAR:
            break
    return min(sparse) / min(dense)
