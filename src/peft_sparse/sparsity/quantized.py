"""Quantised weights in the layouts of bitsandbytes, read block of rows by block, and written so that no zero moves.

4 bits (QLoRA, arXiv 2305.14314): the weight, row by row, is cut into blocks of consecutive entries; two codes lie in a
byte, the earlier one in its upper half, and

    W[k] = table[code[k]] * absmax[block of k],

with a table of 16 numbers in [-1, 1], of which 0 is one. "Double quantisation" stores each absmax as a byte too, as
nested_table[byte] * nested_absmax + offset. 8 bits (LLM.int8(), arXiv 2208.07339): with integer codes,
W[i, j] = code[i, j] * absmax[i] / 127.

So a zero has a code of its own and is exact, whatever its scale; and what has another code is not zero unless its
scale is. [`quantize_like`] uses that: it gives zeros the code of zero, and nothing else, so that the zeros of the
quantised weight are those of the weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

INT8_MAX = 127.0


class FourBitWeight(NamedTuple):
    """A weight (out, in) of 4-bit codes.

    Attributes:
        codes: uint8 (ceil(out * in / 2),), two in a byte.
        absmax: (blocks,), float32, or uint8 where they are quantised too.
        table: (16,) float32.
        size: (out, in).
        block_size: entries of a block, an even number.
        nested_absmax, nested_table, offset, nested_block_size: of quantised `absmax`, else None.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    table: torch.Tensor
    size: tuple[int, int]
    block_size: int
    nested_absmax: torch.Tensor | None = None
    nested_table: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    nested_block_size: int = 256

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return torch.Size(self.size)

    @property
    def dtype(self) -> torch.dtype:
        """Of what [`FourBitWeight.rows`] gives."""
        return torch.float32

    def scales(self, blocks: slice) -> torch.Tensor:
        """absmax of some consecutive blocks, float32."""
        absmax = self.absmax[blocks]
        if self.nested_absmax is None or self.nested_table is None or self.offset is None:
            return absmax.float()
        start, stop, _ = blocks.indices(len(self.absmax))
        nested = torch.arange(start, stop, device=absmax.device).div_(self.nested_block_size, rounding_mode="floor")
        return self.nested_table[absmax.long()] * self.nested_absmax[nested] + self.offset

    def rows(self, rows: slice, out: torch.Tensor | None = None) -> torch.Tensor:
        """Some consecutive rows, (rows, in) in float32, a new tensor or in `out`."""
        start, stop, _ = rows.indices(self.size[0])
        first, last = start * self.size[1], stop * self.size[1]
        blocks = slice(first // self.block_size, -(-last // self.block_size))
        low, high = blocks.start * self.block_size, min(blocks.stop * self.block_size, self.size[0] * self.size[1])
        pairs = self.table[_byte_codes(self.table.device)]  # (256, 2)
        codes = self.codes[low // 2 : (high + 1) // 2].int()
        whole = out if out is not None and (low, high) == (first, last) and (high - low) % 2 == 0 else None
        found = torch.index_select(pairs, 0, codes, out=None if whole is None else whole.view(-1, 2)).view(-1)
        found = _times(found[: high - low], self.scales(blocks), self.block_size)
        entries = found[first - low : last - low].view(stop - start, self.size[1])
        if out is None:
            return entries
        return out if whole is not None else out.copy_(entries)

    def dense(self) -> torch.Tensor:
        """All of it, (out, in), a new tensor."""
        return self.rows(slice(0, self.size[0]))


class EightBitWeight(NamedTuple):
    """A weight (out, in) of 8-bit codes.

    Attributes:
        codes: int8 (out, in).
        absmax: (out,) float32.
    """

    codes: torch.Tensor
    absmax: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of what [`EightBitWeight.rows`] gives."""
        return torch.float32

    def rows(self, rows: slice, out: torch.Tensor | None = None) -> torch.Tensor:
        """Some consecutive rows, (rows, in) in float32, a new tensor or in `out`."""
        scales = (self.absmax[rows].float() / INT8_MAX)[:, None]
        if out is None:
            return self.codes[rows].float() * scales
        return out.copy_(self.codes[rows]).mul_(scales)

    def dense(self) -> torch.Tensor:
        """All of it, (out, in), a new tensor."""
        return self.rows(slice(0, self.shape[0]))


QuantizedWeight = FourBitWeight | EightBitWeight


def _byte_codes(device: torch.device) -> torch.Tensor:
    """(256, 2): the two codes of every byte."""
    byte = torch.arange(256, device=device)
    return torch.stack([byte >> 4, byte & 15], 1)


def _times(entries: torch.Tensor, scales: torch.Tensor, block_size: int) -> torch.Tensor:
    """Each block (of which the last may be a short one) times its scale, in place."""
    full = len(entries) // block_size * block_size
    entries[:full].view(-1, block_size).mul_(scales[: full // block_size, None])
    if full < len(entries):
        entries[full:].mul_(scales[-1])
    return entries


def quantize_like(like: QuantizedWeight, weight: torch.Tensor) -> QuantizedWeight:
    """Quantise a weight in the layout of another one, so that exactly its zeros are zeros.

    Every entry gets the nearest code, but that of zero goes to zeros alone. An entry so small beside its block that
    zero would be nearest gets the smallest code of its sign, which is off by at most that code (NF4: 0.091 of the
    largest entry of its block, int8: 1/127 of that of its row).

    Args:
        like: gives layout and sizes.
        weight: (out, in), finite.

    Returns:
        New tensors.

    Raises:
        ValueError: if zeros would move all the same: entries whose scale underflows to zero.

    Examples:
        >>> like = EightBitWeight(torch.zeros(1, 4, dtype=torch.int8), torch.ones(1))
        >>> quantize_like(like, torch.tensor([[0.0, 1.27, -0.001, 0.5]])).codes
        tensor([[  0, 127,  -1,  50]], dtype=torch.int8)
    """
    weight = weight.detach().float()
    quantized = _to_eight_bits(weight) if isinstance(like, EightBitWeight) else _to_four_bits(like, weight)
    moved = sum(int(((quantized.rows(rows) != 0) != (weight[rows] != 0)).sum()) for rows in _row_slices(*weight.shape))
    if moved:
        raise ValueError(
            f"Quantising keeps the place of every zero, got {moved} of {weight.numel()} that would move: their scale "
            "is not a number that float32 can hold; keep this weight in 16 bits."
        )
    return quantized


def _row_slices(out_features: int, in_features: int) -> list[slice]:
    step = max(1, (1 << 22) // max(1, in_features))
    return [slice(start, min(start + step, out_features)) for start in range(0, out_features, step)]


def _to_eight_bits(weight: torch.Tensor) -> EightBitWeight:
    absmax = weight.abs().amax(1)
    codes = (weight * (INT8_MAX / absmax.masked_fill(absmax == 0, 1))[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX)
    codes = torch.where((codes == 0) & (weight != 0), weight.sign(), codes)
    return EightBitWeight(codes.to(torch.int8), absmax)


def _to_four_bits(like: FourBitWeight, weight: torch.Tensor) -> FourBitWeight:
    flat = torch.nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % like.block_size))
    blocks = flat.view(-1, like.block_size)
    made = _with_scales(like, blocks.abs().amax(1))
    scales = made.scales(slice(0, len(blocks)))  # as they will be read
    relative = blocks / scales.masked_fill(scales == 0, 1)[:, None]
    codes = _nearest_codes(relative.view(-1), flat.sign(), made.table)[: weight.numel() + weight.numel() % 2]
    return made._replace(codes=(codes[::2] << 4) | codes[1::2])


def _with_scales(like: FourBitWeight, absmax: torch.Tensor) -> FourBitWeight:
    """The layout of `like` with other scales: of blocks that hold something, above zero also after rounding."""
    if like.nested_absmax is None or like.nested_table is None:
        return like._replace(absmax=absmax)
    offset, size = absmax.mean(), like.nested_block_size
    shifted = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % size)).view(-1, size)
    nested = shifted.abs().amax(1)
    relative = shifted / nested.masked_fill(nested == 0, 1)[:, None]
    table, order = like.nested_table.sort()
    codes = order[_nearest(relative.view(-1), table)][: len(absmax)]
    made = like._replace(absmax=codes.to(torch.uint8), nested_absmax=nested, offset=offset)
    for block in ((made.scales(slice(0, len(absmax))) <= 0) & (absmax > 0)).nonzero()[:, 0].tolist():
        # nearest to a scale much smaller than its neighbours' may be zero, or a negative one
        possible = like.nested_table * nested[block // size] + offset
        made.absmax[block] = possible.masked_fill(possible <= 0, torch.inf).argmin()
    return made


def _nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Index of the nearest number of a sorted table, for each value."""
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2, out_int32=True).long()


def _nearest_codes(relative: torch.Tensor, signs: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """uint8 codes, that of zero for zeros alone. The signs are given, since a quotient may underflow."""
    numbers, order = table.sort()
    codes = order[_nearest(relative, numbers)]
    zero = int((table == 0).nonzero()[0])
    smallest = [table.masked_fill(~side, torch.inf).abs().argmin() for side in (table > 0, table < 0)]
    vanished = table[codes] == 0
    codes = torch.where(vanished & (signs > 0), smallest[0], codes)
    codes = torch.where(vanished & (signs < 0), smallest[1], codes)
    return codes.masked_fill_(signs == 0, zero).to(torch.uint8)


def lost_blocks(weight: QuantizedWeight) -> int:
    """How many blocks hold the lowest code alone, in a weight whose scales are quantised too.

    It is what bitsandbytes' CUDA kernel makes of a block of zeros in NF4: it divides by their largest magnitude, and
    0 / 0 ends at the lowest code. With a scale of 0 that is zero all the same, but a quantised scale is not exactly
    0, so these blocks have lost their zeros.
    """
    if not isinstance(weight, FourBitWeight) or weight.nested_absmax is None:
        return 0
    whole = len(weight.codes) * 2 // weight.block_size
    lowest = int(weight.table.argmin())
    codes = weight.codes[: whole * weight.block_size // 2].view(whole, -1)
    alone = (codes == (lowest << 4 | lowest)).all(1)
    return int((alone & (weight.scales(slice(0, whole)) != 0)).sum()) if weight.table[lowest] == -1 else 0
