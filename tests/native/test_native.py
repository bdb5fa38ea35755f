"""The C kernels against PyTorch, and what happens where there are none.

All of it runs once more in a process that torch tells to do without AVX-512, if there is a choice.
"""

import ctypes
import errno
import math
import mmap
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_sparse import native
from peft_sparse.native import NativeCsr, build, library
from peft_sparse.ops import BitmaskLinear, CsrLinear, reference, use_reference
from peft_sparse.sparsity import PackedWeight, pack_values, row_starts, unpack_mask, unpack_values
from peft_sparse.sparsity.packing import pack_nonzeros

needs_kernels = pytest.mark.skipif(native.unavailable() is not None, reason=f"native kernels {native.unavailable()}")
NATIVE = Path(build.__file__).parent
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Of one product beside its sum of |W||X|: sums in float32, one rounding to the dtype at the end.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
COLUMNS = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 257]))


def sparse(rows, columns, zeros, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    return weight.masked_fill_(torch.rand(rows, columns, generator=generator) < zeros, 0)


@needs_kernels
@each_dtype
@given(st.integers(0, 9), COLUMNS, st.integers(0, 10_000), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.booleans())
def test_unpacking_is_that_of_pytorch(dtype, rows, columns, seed, zeros, into):
    weight = sparse(rows, columns, zeros, seed, dtype)
    packed = PackedWeight.of(weight)
    out = torch.full_like(weight, 7) if into else None
    found = native.native_unpack(packed.values, packed.bitmask, columns, out)
    assert torch.equal(found, weight) and (out is None or found is out)
    assert torch.equal(native.native_row_starts(packed.bitmask), packed.starts.long())
    assert torch.equal(native.native_nonzeros(weight), packed.bitmask)
    assert torch.equal(native.native_pack(weight, packed.bitmask), packed.values)
    with native.use_native(enabled=False):
        assert torch.equal(unpack_values(packed.values, packed.bitmask, columns), weight)
        assert torch.equal(row_starts(packed.bitmask), packed.starts)
        assert torch.equal(pack_nonzeros(weight), packed.bitmask)
        assert torch.equal(pack_values(weight, packed.bitmask), packed.values)


@needs_kernels
def test_values_may_be_anything():
    weight = torch.tensor([[0.0, float("nan"), 0.0, float("inf")] * 9, [0.0, -float("inf"), 1.0, 1e-45] * 9])
    packed = PackedWeight.of(weight)
    found = native.native_unpack(packed.values, packed.bitmask, 36)
    assert torch.equal(found.view(torch.int32), weight.view(torch.int32))


@needs_kernels
@each_dtype
def test_what_counts_as_zero(dtype):
    tiny = torch.finfo(dtype).smallest_normal / 4  # a subnormal number
    weight = torch.tensor([[0.0, -0.0, float("nan"), float("-inf"), tiny, -tiny, 1.0, -1.0, -0.0, 2.0]], dtype=dtype)
    expected = [[False, False, *[True] * 6, False, True]]
    assert unpack_mask(native.native_nonzeros(weight), 10).tolist() == expected
    assert native.native_nonzeros(weight[:, :8].T.contiguous().T).tolist() == [[0b11111100]]


@needs_kernels
@pytest.mark.parametrize("dtype", native.PRODUCTS, ids=str)
@pytest.mark.parametrize("kind", [BitmaskLinear, CsrLinear])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@given(
    shape=st.tuples(st.integers(1, 20), COLUMNS),
    batch=st.sampled_from([(), (1, 1), (2,), (3,), (4,), (7,), (2, 4), (9,), (2, 8), (33,), (3, 43)]),
    zeros=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_products_equal_reference(dtype, kind, bias, shape, batch, zeros, seed):
    weight = sparse(*shape, zeros, seed, dtype)
    linear = kind(PackedWeight.of(weight))
    x = sparse(math.prod(batch), shape[1], 0.1, seed + 1, dtype).view(*batch, shape[1])
    b = sparse(1, shape[0], 0, seed + 2, dtype)[0] if bias else None
    assert linear.takes(x, b) if kind is BitmaskLinear else linear.takes(x)
    y = linear(x, b)
    exact = reference.packed_linear(x.double(), PackedWeight.of(weight.double()), None if b is None else b.double())
    assert y.shape == exact.shape and y.dtype == dtype
    scale = x.double().abs() @ weight.double().abs().T + (0 if b is None else b.double().abs())
    assert bool(((y.double() - exact).abs() <= TOLERANCE[dtype] * scale + torch.finfo(dtype).tiny).all())
    with use_reference():
        assert torch.equal(linear(x, b), reference.packed_linear(x, PackedWeight.of(weight), b))


@needs_kernels
def test_what_is_not_finite_is_multiplied_with_zero_as_in_a_dense_product():
    weight = torch.tensor([[0.0, 2.0] * 20, [0.0] * 40])
    x = torch.tensor([[1.0, float("inf")] * 20, [float("nan"), 1.0] * 20, [1.0] * 40])
    found = BitmaskLinear(PackedWeight.of(weight))(x, None)
    torch.testing.assert_close(found, x @ weight.T, equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_lists_leave_out_what_is_multiplied_with_zero(tokens):
    """Where a group of values is not full, what comes after them has no part in it either."""
    weight = torch.tensor([[0.0, 2.0] * 20, [0.0] * 40, [1.0] * 2 + [0.0] * 38])
    x = torch.tensor([float("inf"), 1.0, float("nan"), 1.0] * 10)
    found = CsrLinear(weight)(x.expand(tokens, 40), None)
    assert torch.equal(found, torch.tensor([40.0, 0.0, float("inf")]).expand(tokens, 3))


@needs_kernels
def test_columns_up_to_the_last_that_fits_into_16_bits():
    weight = torch.zeros(2, NativeCsr.MAX_COLUMNS)
    weight[0, -1], weight[1, [0, 2**15]] = 2.0, 3.0
    for tokens in (1, 9):
        x = torch.ones(tokens, NativeCsr.MAX_COLUMNS)
        assert torch.equal(CsrLinear(weight)(x, None), torch.tensor([2.0, 6.0]).expand(tokens, 2))
    with use_reference():
        assert torch.equal(CsrLinear(weight)(torch.eye(2, NativeCsr.MAX_COLUMNS), None), weight[:, :2].T)
    wider = torch.zeros(1, NativeCsr.MAX_COLUMNS + 8)
    wider[0, -1] = 2.0
    assert CsrLinear(wider)(torch.ones(1, wider.shape[1]), None).item() == 2.0  # by MKL
    assert "without native kernels" in CsrLinear.refusal(torch.bfloat16, wider.shape[1])


@needs_kernels
@pytest.mark.skipif("OpenMP" not in torch.__config__.parallel_info(), reason="this torch does without OpenMP")
def test_torch_s_threads_are_found():
    assert None not in library.openmp() and library.threads(1 << 30) == torch.get_num_threads()


@needs_kernels
@pytest.mark.parametrize("rows", [1, 2, 5, 700])
def test_any_number_of_threads_gives_the_same(rows, monkeypatch):
    monkeypatch.setattr(library, "SHARED_FROM", 1)
    weight = sparse(rows, 130, 0.6)
    packed, x = PackedWeight.of(weight), torch.randn(9, 130)
    linears, before = (BitmaskLinear(packed), CsrLinear(packed)), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            assert torch.equal(native.native_unpack(packed.values, packed.bitmask, 130), weight)
            found.append([linear(x[:tokens], None) for linear in linears for tokens in (1, 9)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, first) for ys in found for y, first in zip(ys, found[0], strict=True))


@needs_kernels
@each_dtype
def test_nothing_is_read_beyond_the_last_value(dtype):
    """Values and bitmask end where the memory that may be read ends."""
    for columns in (1, 7, 9, 15, 17, 31, 33, 40, 97):
        weight = sparse(3, columns, 0.5, seed=columns, dtype=dtype)
        packed = PackedWeight.of(weight)
        values, bitmask = before_a_fence(packed.values), before_a_fence(packed.bitmask)
        assert torch.equal(native.native_unpack(values, bitmask, columns), weight)
        if dtype in native.PRODUCTS:
            for kind in (native.NativeBitmask, native.NativeCsr):
                product = kind(values, bitmask, packed.starts.long(), columns)
                for tokens in (1, 5):
                    x = before_a_fence(torch.ones(tokens, columns))
                    torch.testing.assert_close(product(x), x @ weight.float().T)


def before_a_fence(tensor):
    """A copy whose last byte is followed by memory that nobody may touch."""
    pages = -(-max(1, tensor.nbytes) // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    assert protect(start + pages * mmap.PAGESIZE, mmap.PAGESIZE, 0) == 0
    offset = pages * mmap.PAGESIZE - tensor.nbytes
    count = tensor.numel()
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=count, offset=offset) if count else tensor
    return copy.view(tensor.shape).copy_(tensor)


@needs_kernels
def test_parts_that_do_not_fit_are_refused():
    packed = PackedWeight.of(sparse(4, 20, 0.5))
    for values, columns in ((packed.values[1:], 20), (packed.values.repeat(2), 20), (packed.values, 25)):
        with pytest.raises(ValueError, match="Each bit of a bitmask that is set has a value, got"):
            native.native_unpack(values, packed.bitmask, columns)
    with pytest.raises(ValueError, match="A bitmask is"):
        native.native_pack(torch.ones(4, 25), packed.bitmask)


@needs_kernels
def test_what_the_kernels_leave_to_pytorch():
    packed = PackedWeight.of(sparse(4, 20, 0.5))
    values, bitmask = packed.values, packed.bitmask
    assert native.native_takes(bitmask, values) and native.native_takes(bitmask)
    assert not native.native_takes(bitmask.to("meta"), values) and not native.native_takes(bitmask, values.byte())
    trained = torch.nn.Parameter(values)
    assert not native.native_takes(bitmask, trained)
    with torch.no_grad():
        assert native.native_takes(bitmask, trained)
    assert not torch.compile(lambda v: native.native_takes(bitmask, v), backend="eager")(values)
    with native.use_native(enabled=False):
        assert not native.native_takes(bitmask, values) and not native.native_in_use()
    linear, lists = BitmaskLinear(packed), CsrLinear(packed)
    for x in (torch.ones(20).double(), torch.ones(0, 20), torch.ones(19), torch.ones(20, device="meta")):
        assert not linear.takes(x, None) and not lists.takes(x)
    with native.use_native(enabled=False):
        assert not linear.takes(torch.ones(20), None) and not lists.takes(torch.ones(20))


def test_the_sources_are_installed_with_the_package():
    """As package data, of which an editable install shows nothing."""
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    (patterns,) = re.findall(r"^peft_sparse = \[(.*)\]$", project.read_text(), re.MULTILINE)
    found = {path.name for pattern in re.findall(r"native/([^\"]+)", patterns) for path in NATIVE.glob(pattern)}
    assert found == set(build.SOURCES) == {path.name for path in NATIVE.iterdir() if path.suffix in (".c", ".h")}


# Where there are none


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a process that has not looked for kernels yet, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "_reason", None)
    monkeypatch.setattr(native.use_native, "_enabled", True)
    library._library.cache_clear()
    yield tmp_path / "peft_sparse"
    library._library.cache_clear()


@needs_kernels
def test_compiled_once_and_again_where_the_cache_is_damaged(fresh, monkeypatch):
    assert native.native_in_use()
    (made,) = fresh.iterdir()
    whole = made.read_bytes()
    made.write_bytes(b"no library")
    library._library.cache_clear()
    assert native.native_in_use() and made.read_bytes() == whole and list(fresh.iterdir()) == [made]
    library._library.cache_clear()
    monkeypatch.setattr(build, "_compile", None)  # which is not called
    assert native.native_in_use()


@needs_kernels
def test_a_cache_that_cannot_be_written_to(fresh):
    fresh.write_text("a file where the folder should be")
    assert native.native_in_use()


@needs_kernels
def test_a_user_without_a_home(fresh, monkeypatch):
    """No HOME, and no entry among the system's users: `Path.home` raises a RuntimeError."""

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    assert native.native_in_use()


@needs_kernels
def test_a_home_of_somebody_else(fresh, monkeypatch):
    """What pathlib asks is denied in it, to all but root."""
    stat = Path.stat

    def denied(path, **kwargs):
        if path.is_relative_to(fresh):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **kwargs)

    monkeypatch.setattr(Path, "stat", denied)
    assert native.native_in_use()


@needs_kernels
def test_no_place_for_temporary_files(fresh, monkeypatch):
    def full(**_):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(build.tempfile, "TemporaryDirectory", full)
    with pytest.warns(UserWarning, match="nothing can be written to a temporary folder .*; PyTorch computes the same"):
        assert not native.native_in_use()


def test_without_a_compiler_pytorch_does_it(fresh, monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is wrong with a machine without a compiler
        assert "need a C compiler (cc, gcc, clang), and none" in native.unavailable()
    weight = sparse(5, 30, 0.5)
    assert torch.equal(PackedWeight.of(weight).dense(), weight)


@needs_kernels
@pytest.mark.parametrize(
    ("compiler", "message"),
    [("false", "says 'nothing'"), ("no-such-compiler", "does not run"), ("cc --no-such-option", "no-such-option")],
)
def test_a_compiler_that_fails_is_told_of(fresh, monkeypatch, compiler, message):
    monkeypatch.setenv("CC", compiler)
    with pytest.warns(UserWarning, match=f"native kernels cannot be compiled: .*{message}.*PyTorch computes the same"):
        assert not native.native_in_use()
    assert message in native.unavailable()


@needs_kernels
def test_sources_that_are_not_there(fresh, monkeypatch):
    monkeypatch.setattr(build, "sources", lambda: [fresh / name for name in build.SOURCES])
    with pytest.warns(UserWarning, match="cannot be compiled: their sources are not there"):
        assert not native.native_in_use()


@needs_kernels
def test_kernels_that_compute_wrong_results_are_not_used(fresh, monkeypatch):
    wrong = fresh.parent / "wrong"
    shutil.copytree(NATIVE, wrong)
    source = wrong / "bitmask.c"
    source.write_text(source.read_text().replace("? *values++ : 0", "? *values : 0"))
    monkeypatch.setattr(build, "sources", lambda: [wrong / name for name in build.SOURCES])
    with pytest.warns(UserWarning, match="computes wrong results"):
        assert not native.native_in_use()


def test_other_machines_have_none(fresh, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert "are for Linux on x86-64 with AVX2 or AVX-512, got" in native.unavailable()


@pytest.mark.parametrize(("value", "said"), [("0", "are switched off"), ("", "None"), ("yes", "1 (on) or 0 (off)")])
def test_the_switch_from_outside(value, said):
    done = subprocess.run(
        [sys.executable, "-c", "from peft_sparse import native; print(native.unavailable())"],
        env=os.environ | {library.VARIABLE: value}, capture_output=True, text=True,
    )  # fmt: skip
    assert said in done.stdout + done.stderr or (said == "None" and native.unavailable() in done.stdout)


@needs_kernels
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this processor has no AVX-512")
def test_all_of_this_with_avx2():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout  # this test, and no other
