"""The gate: what is timed computes what it says, or nothing is timed.

1. `tests/ops` passes: the fused ops equal their plain twins, forward and backward, and the authors' numbers where
   `shared/` is beside the repository.
2. The authors' formulations of `authors.py` equal the same plain twins.
3. On the device and in the dtype that are about to be measured, the fused ops equal the plain twins once more; the
   Triton kernels too, if they are among what is measured.

    python -m benchmarks.check
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from benchmarks.authors import AuthorsPst, AuthorsSpp
from peft_sparse import ops
from peft_sparse.ops.triton_switch import triton_takes_pst, triton_takes_spp
from peft_sparse.sparsity import pack_mask, select_mask

REPOSITORY = Path(__file__).resolve().parents[1]
SHAPE, TOKENS = (96, 40), 24  # (out, in)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}
SCALING, SCALES = 2.0, ops.PstScales(beta=0.7, alpha1=0.5, alpha2=0.3)


def failure(device: torch.device, dtype: torch.dtype, triton: bool = False) -> str | None:
    """What is wrong, in words; None if all is as it should be.

    Args:
        device, dtype: of what is about to be measured.
        triton: whether the Triton kernels are measured.
    """
    if ops.reference.reference_in_use() or ops.triton_in_use():
        return (
            "`use_reference` or `use_triton` is on, so other rows than those of that name would be computed with it."
        )
    try:
        check_formulations()
        check_on_device(device, dtype)
        if triton:
            check_on_device(device, dtype, triton=True)
    except AssertionError as error:
        return str(error)
    return check_ops()


def check_ops() -> str | None:
    """`tests/ops` in a process of its own; the end of its output if it fails."""
    folder = REPOSITORY / "tests" / "ops"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=dict(os.environ, CUDA_VISIBLE_DEVICES=""), capture_output=True, text=True
    )
    if done.returncode == 0:
        return None
    end = "\n".join((done.stdout + done.stderr).strip().splitlines()[-30:])
    return f"`{' '.join(command)}` ended with status {done.returncode}:\n{end}"


def check_formulations() -> None:
    """The authors' formulations against `ops.reference`, in float64.

    Raises:
        AssertionError: if one differs.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, module, factors, expected in (_spp(False), _spp(True), _pst()):
            x, dy = torch.randn(TOKENS, SHAPE[1]).double(), torch.randn(TOKENS, SHAPE[0]).double()
            ours = {key: value.detach().clone().requires_grad_() for key, value in factors.items()}
            _compare(name, _run(lambda x, m=module: m(x), x, dy, factors), _run(expected(ours), x, dy, ours), 1e-10)


def _linear() -> nn.Linear:
    return nn.Linear(SHAPE[1], SHAPE[0]).double().requires_grad_(False)


Function = Callable[[torch.Tensor], torch.Tensor]
Formulation = tuple[str, nn.Module, dict[str, torch.Tensor], Callable[[dict[str, torch.Tensor]], Function]]


def _random_factors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The factors of a module, as random numbers: their starts at zero would hide half of the formulas."""
    factors = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    for parameter in factors.values():
        nn.init.normal_(parameter)
    return factors


def _spp(checkpointed: bool) -> Formulation:
    linear = _linear()
    module = AuthorsSpp(linear, scaling=SCALING, checkpointed=checkpointed).double()

    def expected(f: dict[str, torch.Tensor]) -> Function:
        return lambda x: ops.reference.spp_linear(x, linear.weight, linear.bias, f["A"], f["B"][:, 0], SCALING)

    return f"authors' SPP, checkpointed={checkpointed}", module, _random_factors(module), expected


def _pst() -> Formulation:
    linear = _linear()
    module = AuthorsPst(linear, sparsity=0.5, scales=SCALES).double()

    def expected(f: dict[str, torch.Tensor]) -> Function:
        factors = ops.PstFactors(**f)
        group = linear.weight.numel()
        mask = ops.reference.pst_mask(linear.weight, group // 2, group, factors, SCALES)
        return lambda x: ops.reference.pst_linear(x, linear.weight, linear.bias, mask, factors, SCALES)

    return "authors' PST", module, _random_factors(module), expected


def check_on_device(device: torch.device, dtype: torch.dtype, triton: bool = False) -> None:
    """The fused ops against `ops.reference` on a device, in a dtype.

    Args:
        triton: whether the Triton kernels compute the fused ops.

    Raises:
        AssertionError: if one differs, or if the kernels do not take what they are given.
    """
    out, columns = SHAPE
    wide = torch.promote_types(dtype, torch.float32)

    def random(*shape: int, dtype: torch.dtype = wide) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    generator = torch.Generator().manual_seed(0)
    weight, bias = random(out, columns, dtype=dtype), random(out, dtype=dtype)
    x, dy = random(TOKENS, columns, dtype=dtype), random(TOKENS, out, dtype=dtype)
    spp = {"A": random(16, columns), "B": random(out)}
    pst = {"U": random(out, 8), "V": random(8, columns), "A": random(out, 8), "B": random(8, columns)}
    pst |= {"R": random(out), "C": random(columns)}
    scores = random(out, columns)
    packed = pack_mask(select_mask(scores, scores.numel() // 2, scores.numel()))
    with ops.use_triton(triton):
        if triton and not (triton_takes_spp(x, weight, **spp) and triton_takes_pst(x, weight, ops.PstFactors(**pst))):
            raise AssertionError(f"The Triton kernels do not take {dtype} on {device}; see `ops.use_triton`.")
        found, expected = (
            {
                "spp": _run(lambda x, i=impl, f=spp: i.spp_linear(x, weight, bias, *f.values(), SCALING), x, dy, spp),
                "pst": _run(
                    lambda x, i=impl: i.pst_linear(x, weight, bias, packed, ops.PstFactors(**pst), SCALES), x, dy, pst
                ),
            }
            for impl in (ops, ops.reference)
        )
    for name in found:
        _compare(
            f"{name}{' in Triton' if triton else ''} on {device}, {dtype}",
            found[name],
            expected[name],
            TOLERANCE[dtype],
        )


def _run(
    function: Function, x: torch.Tensor, dy: torch.Tensor, factors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    inputs = [x.clone().requires_grad_(), *(factor.requires_grad_() for factor in factors.values())]
    y = function(inputs[0])
    return dict(zip(("y", "dX", *factors), (y.detach(), *torch.autograd.grad(y, inputs, dy)), strict=True))


def _compare(what: str, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        difference = (found[name].double() - value.double()).norm() / value.double().norm()
        assert difference <= tolerance, f"{what}: {name} differs by {difference:.1e}, more than {tolerance:.0e}"


if __name__ == "__main__":
    wrong = failure(torch.device("cpu"), torch.float32)
    print(wrong or "The ops and the authors' formulations compute what they say.")
    sys.exit(2 if wrong else 0)
