"""Quantised weights: any rows read alone, the layouts of bitsandbytes, and no zero moved by quantising."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_sparse.sparsity import EightBitWeight, FourBitWeight, lost_blocks, quantize_like
from peft_sparse.sparsity.forms import put_together, take_apart

NF4 = torch.tensor(
    [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 0.7229568, 1.0]
)  # fmt: skip
FP4_HALF = torch.tensor([0.0, 0.0052083, 0.6666667, 1.0, 0.3333333, 0.5, 0.1666667, 0.25])
FP4 = torch.cat([FP4_HALF, -FP4_HALF])  # two codes for zero
NESTED = torch.linspace(-1, 1, 256)
LAYOUTS = ["nf4", "fp4", "nf4 nested", "fp4 nested", "int8"]


def layout(kind: str, shape: tuple[int, int], block_size: int = 64):
    """A weight of zeros in this layout."""
    if kind == "int8":
        return EightBitWeight(torch.zeros(shape, dtype=torch.int8), torch.ones(shape[0]))
    numel = shape[0] * shape[1]
    blocks, table = -(-numel // block_size), NF4 if kind.startswith("nf4") else FP4
    codes = torch.zeros((numel + 1) // 2, dtype=torch.uint8)
    if "nested" not in kind:
        return FourBitWeight(codes, torch.ones(blocks), table, shape, block_size)
    absmax = torch.zeros(blocks, dtype=torch.uint8)
    return FourBitWeight(
        codes, absmax, table, shape, block_size, torch.ones(-(-blocks // 256)), NESTED, torch.zeros(())
    )


def sparse(shape, seed=0, share=0.5):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return weight.masked_fill(torch.rand(shape, generator=generator) < share, 0)


def by_definition(weight: FourBitWeight) -> torch.Tensor:
    codes = torch.stack([weight.codes >> 4, weight.codes & 15], 1).flatten().long()
    numel = weight.size[0] * weight.size[1]
    scales = [float(weight.scales(slice(i // weight.block_size, i // weight.block_size + 1))) for i in range(numel)]
    return (weight.table[codes[:numel]] * torch.tensor(scales)).view(weight.size)


@pytest.mark.parametrize("kind", LAYOUTS)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 90)),
    share=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
def test_no_zero_moves(kind, shape, share, seed):
    weight = sparse(shape, seed, share)
    made = quantize_like(layout(kind, shape), weight)
    assert torch.equal(made.dense() == 0, weight == 0)
    assert (made.dense() * weight >= 0).all()  # signs stay too


@pytest.mark.parametrize("kind", LAYOUTS)
@given(data=st.data())
def test_any_rows_are_those_of_the_whole(kind, data):
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 90)))
    start = data.draw(st.integers(0, shape[0] - 1))
    rows = slice(start, data.draw(st.integers(start + 1, shape[0])))
    made = quantize_like(layout(kind, shape, 8), sparse(shape))
    if isinstance(made, FourBitWeight):
        assert torch.equal(made.dense(), by_definition(made))
    assert torch.equal(made.rows(rows), made.dense()[rows])
    out = torch.full((rows.stop - start, shape[1]), torch.nan)
    assert made.rows(rows, out) is out and torch.equal(out, made.dense()[rows])
    entries, rest = take_apart(made)
    assert torch.equal(put_together(entries, rest).dense(), made.dense())


@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.16), ("fp4", 0.17), ("int8", 0.5 / 127)])
def test_entries_get_the_nearest_code(kind, most):
    """Half of the widest gap between codes, relative to the largest entry of the block."""
    weight = torch.randn(16, 64)
    weight = torch.where(weight.abs() < 0.5, torch.ones(()), weight)  # none so small that zero would be nearest
    error = (quantize_like(layout(kind, (16, 64)), weight).dense() - weight).abs() / weight.abs().amax(1, keepdim=True)
    assert error.max() <= most + 1e-6


@pytest.mark.parametrize("kind", LAYOUTS)
def test_what_was_quantised_stays(kind):
    made = quantize_like(layout(kind, (8, 128)), sparse((8, 128)))
    again = quantize_like(made, made.dense())
    atol = 0.03 if "nested" in kind else 1e-6  # scales are rounded anew, around another mean
    torch.testing.assert_close(again.dense(), made.dense(), atol=atol, rtol=0)


def test_small_entries_beside_large_ones_keep_their_place():
    weight = torch.tensor([[1.0, 1e-6, -1e-6, 0.0]])
    assert quantize_like(layout("nf4", (1, 4)), weight).dense()[0].tolist() == pytest.approx(
        [1, 0.0795803, -0.09105, 0]
    )
    assert quantize_like(layout("int8", (1, 4)), weight).codes.tolist() == [[127, 1, -1, 0]]


def test_a_scale_far_below_the_others_stays_above_zero():
    """Double quantisation rounds it beside scales that are millions of times larger."""
    weight = torch.cat([torch.randn(100, 64), torch.full((1, 64), 1e-7), torch.zeros(1, 64)])
    made = quantize_like(layout("nf4 nested", (102, 64)), weight)
    assert (made.scales(slice(0, 101)) > 0).all()
    assert torch.equal(made.dense() == 0, weight == 0)


def test_what_no_scale_can_hold_is_refused():
    """The smallest number that float32 has: its half, which a code would make of it, is zero."""
    weight = torch.zeros(1, 64)
    weight[0, :2] = torch.tensor([1e-45, -1e-45])
    halves = torch.linspace(-0.4, 0.4, 17)[1:]
    with pytest.raises(ValueError, match=r"2 of 64 that would move.*keep this weight in 16 bits"):
        quantize_like(layout("nf4", (1, 64))._replace(table=halves), weight)


def test_blocks_that_cuda_lost_are_found():
    weight = sparse((4, 64))
    weight[1] = 0
    made = quantize_like(layout("nf4 nested", (4, 64)), weight)
    assert lost_blocks(made) == 0
    made.codes[32:64] = 0  # as the kernel leaves a block of zeros
    assert lost_blocks(made) == 1
    assert lost_blocks(layout("int8", (4, 64))) == 0
