"""The switch of the Triton kernels: off by default, says what is missing, and needs no triton to be imported."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from peft_sparse import ops
from peft_sparse.ops import triton_switch

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed; `make test-triton` installs it")


def import_with(value):
    """Import the package in a process of its own, with the environment variable set."""
    environment = os.environ | {triton_switch.VARIABLE: value}
    code = "import sys\nfrom peft_sparse import ops\nprint(ops.triton_in_use(), 'triton' in sys.modules)"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_off_by_default():
    assert not ops.triton_in_use()


def test_without_triton_the_switch_says_so_and_stays_off(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"peft-sparse\[triton\]"):
        ops.use_triton()
    assert not ops.triton_in_use()
    with ops.use_triton(enabled=False):
        assert not ops.triton_in_use()


@needs_triton
def test_switch_goes_back_to_what_was_before():
    with ops.use_triton():
        assert ops.triton_in_use()
        with ops.use_triton(False):
            assert not ops.triton_in_use()
        assert ops.triton_in_use()
    assert not ops.triton_in_use()


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes tensors on a CPU")
def test_tensors_on_a_cpu_are_computed_by_pytorch():
    weight, A, B = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6)
    x = torch.randn(3, 4)
    expected = ops.spp_linear(x, weight, None, A, B, 2.0)
    with ops.use_triton():
        assert not triton_switch.triton_takes_spp(x, weight, A, B)
        assert torch.equal(ops.spp_linear(x, weight, None, A, B, 2.0), expected)


@pytest.mark.parametrize("value", [None, "", "0"])
def test_variable_leaves_it_off(monkeypatch, value):
    monkeypatch.delenv(triton_switch.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(triton_switch.VARIABLE, value)
    assert not triton_switch._switched_on_from_outside()


@pytest.mark.slow
def test_variable_turns_it_on():
    done = import_with("1")
    if HAS_TRITON:
        assert done.stdout == "True True\n", done.stderr
    else:
        assert done.returncode != 0 and "peft-sparse[triton]" in done.stderr


def test_variable_is_one_or_zero(monkeypatch):
    monkeypatch.setenv(triton_switch.VARIABLE, "yes")
    with pytest.raises(ValueError, match=r"is 1 \(on\) or 0 \(off\), got 'yes'"):
        triton_switch._switched_on_from_outside()
