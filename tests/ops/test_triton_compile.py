"""The Triton kernels compiled to machine code for GPUs that need not be here: the interpreter accepts programs that
the compiler does not, and knows no shared memory."""

import os

import pytest
import torch

from peft_sparse.ops import PstFactors, PstScales

triton = pytest.importorskip("triton", reason="triton is not installed; `make test-triton` installs it")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("what the interpreter runs is not compiled", allow_module_level=True)

pytestmark = pytest.mark.slow

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}
SHARED_MEMORY = 99 * 1024  # of one block: the smallest limit of a capability from 8.0 on (8.6, 8.9, 12.0)
OUT, IN, TOKENS, GROUPS = 256, 128, 64, 16
KERNELS = {"triton_spp": ("_effective_kernel", "_reduce_kernel"), "triton_pst": ("_masked_kernel", "_reduce_kernel")}


class Recorder:
    """Stands for a kernel, and notes how it is launched."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def launches_of(module, launch, monkeypatch):
    launches, (build, reduce) = [], KERNELS[module.__name__.rpartition(".")[2]]
    for name in (build, reduce):
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), launches))
    launch(module)
    assert [kernel.fn.__name__ for kernel, _, _ in launches] == [build, build, reduce]
    return launches


def compiled(kernel, args, options, capability):
    """As a launch on such a GPU would: integers that are 1 become constants, multiples of 16 are known as such."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    run = {"num_warps": options.pop("num_warps")}
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    constants = {
        name: value for name, value in values.items() if name in options or (type(value) is int and value == 1)
    }
    signature, attributes = {}, {}
    for place, (name, value) in enumerate(values.items()):
        if name in constants:
            signature[name] = "constexpr"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            if isinstance(value, torch.Tensor) or value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    places = list(values)
    source = ASTSource(kernel, signature, {(places.index(n),): v for n, v in constants.items()}, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=run)


def launch_spp(dtype):
    x, dy, weight = (torch.zeros(shape, dtype=dtype) for shape in ((TOKENS, IN), (TOKENS, OUT), (OUT, IN)))
    A, B = torch.zeros(GROUPS, IN), torch.zeros(OUT)

    def launch(module):
        module.forward(x, weight, weight[:, 0], A, B, 2.0, 1.0)
        module.gradients(x, dy, weight, A, B, 2.0, 1.0, needs_x=True, needs_factors=True)

    return launch


def launch_pst(dtype, rank, score_rank):
    x, dy, weight = (torch.zeros(shape, dtype=dtype) for shape in ((TOKENS, IN), (TOKENS, OUT), (OUT, IN)))
    packed = torch.zeros(OUT, IN // 8, dtype=torch.uint8)
    shapes = {"U": (OUT, rank), "V": (rank, IN), "A": (OUT, score_rank), "B": (score_rank, IN), "R": OUT, "C": IN}
    factors = PstFactors(**{name: torch.zeros(shape) for name, shape in shapes.items()})

    def launch(module):
        module.forward(x, weight, weight[:, 0], packed, factors, 1.0)
        module.gradients(x, dy, weight, packed, factors, PstScales(), needs_x=True, needs_factors=True)

    return launch


@pytest.mark.parametrize(
    "dtype, capability",
    [(torch.float32, 80), (torch.bfloat16, 80), (torch.bfloat16, 90), (torch.float16, 90)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["spp", "pst", "pst of the largest ranks"])
def test_compiles_and_fits(monkeypatch, tmp_path, kind, dtype, capability):
    from peft_sparse.ops import triton_pst, triton_spp, triton_switch

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module = triton_spp if kind == "spp" else triton_pst
    largest = triton_switch.MAX_RANK
    ranks = (8, 8) if kind == "pst" else (largest, largest - 1)
    launch = launch_spp(dtype) if kind == "spp" else launch_pst(dtype, *ranks)
    for kernel, args, options in launches_of(module, launch, monkeypatch):
        found = compiled(kernel, args, options, capability)
        assert len(found.asm["cubin"]) > 0
        assert found.metadata.shared <= SHARED_MEMORY, kernel.fn.__name__
        # tensor cores for the products with PST's factors, unless float32 is not to be rounded to tf32
        products = kind != "spp" and kernel.fn.__name__ == "_reduce_kernel"
        assert ("mma" in found.asm["ptx"]) == (products and dtype != torch.float32)


@pytest.mark.parametrize(
    "dtype, capability", [(torch.bfloat16, 80), (torch.bfloat16, 90), (torch.float16, 90)], ids=str
)
def test_the_kernel_for_one_token_compiles(monkeypatch, tmp_path, dtype, capability):
    from peft_sparse.ops import triton_bitmask
    from peft_sparse.sparsity import PackedWeight

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = []
    recorder = Recorder(triton_bitmask._vector_kernel, launches)
    monkeypatch.setattr(triton_bitmask, "_vector_kernel", recorder)
    weight = PackedWeight.of(torch.ones(OUT, IN, dtype=dtype))
    triton_bitmask.forward(torch.ones(IN, dtype=dtype), weight, torch.ones(OUT, dtype=dtype))
    ((kernel, args, options),) = launches
    found = compiled(kernel, args, options, capability)
    assert len(found.asm["cubin"]) > 0 and found.metadata.shared <= SHARED_MEMORY
