"""Bitmap for tensor cores: each lane's own weights as bits, and the values that they announce, tile by tile.

A lane of `mma.m16n8k16` holds 8 weights of each 16 x 16 piece, so 64 of a strip of 16 x 128: two words say
which of them are stored. The values of a strip's lanes lie one after the other; where a lane's begin is the
sum of the popcounts of the lanes before it. So two popcounts serve 64 weights, and nothing but the values
passes through shared memory. An answer to SpInfer (Fan et al. 2025, EuroSys), which counts for every pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

ROWS, COLUMNS, STRIP, LANES = 128, 128, 16, 32  # of a tile; rows of a strip; lanes of a warp
STRIPS, BITS = ROWS // STRIP, COLUMNS // 2  # a lane's weights in a strip
MASKS = STRIPS * LANES * BITS // 32  # words of a tile
HEAD = MASKS + STRIPS // 2  # words before a tile's values: its masks, then where each strip's values begin


@dataclass(frozen=True)
class Bitmap:
    """A weight (out, in) of 16-bit values.

    words: int32 (n). A tile is its masks (8 strips, 2 words, 32 lanes), 8 starts of 16 bits, and its values,
    two in a word, filled up to 4 words. offsets: int32 (tiles + 1), where each tile begins, in units of 4
    words; tiles go row by row. capacity: the units that the largest tile takes.
    """

    words: Tensor
    offsets: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    capacity: int

    @property
    def tiles(self) -> tuple[int, int]:
        return ceil(self.shape[0] / ROWS), ceil(self.shape[1] / COLUMNS)

    def stored_bits(self) -> int:
        return 32 * (self.words.numel() + self.offsets.numel())

    def dense(self) -> Tensor:
        """The weight (out, in)."""
        begin, kept = 4 * self.offsets[:-1].long(), self.kept()
        counts = kept.sum((1, 2, 3))  # (tiles)
        rank = torch.arange(int(counts.sum()), device=begin.device)
        rank = rank - (counts.cumsum(0) - counts).repeat_interleave(counts)
        places = 2 * (begin + HEAD).repeat_interleave(counts) + rank
        lanes = torch.zeros(kept.shape, dtype=torch.int16, device=begin.device)
        lanes[kept] = self.words.view(torch.int16)[places]
        return from_lanes(lanes, self.tiles).view(self.dtype)[: self.shape[0], : self.shape[1]].contiguous()

    def kept(self) -> Tensor:
        """Which weights are stored, as lanes hold them: bool (tiles, 8 strips, 32 lanes, 64)."""
        begin = 4 * self.offsets[:-1].long()
        masks = self.words[begin[:, None] + torch.arange(MASKS, device=begin.device)]
        bits = masks.view(-1, STRIPS, 2, LANES, 1) >> torch.arange(32, device=begin.device) & 1
        return bits.permute(0, 1, 3, 2, 4).reshape(-1, STRIPS, LANES, BITS).bool()


def to_lanes(weight: Tensor) -> Tensor:
    """(out, in), multiples of 128 -> (tiles, 8 strips, 32 lanes, 64 weights) as tensor cores hold them."""
    across = weight.shape[1] // COLUMNS
    # lane = 4 g + t; its registers go by half q of the columns, then h of the rows, with a pair p each
    parts = weight.view(-1, STRIPS, 2, 8, across, 8, 2, 4, 2)  # tile, strip, h, g; tile, k16, q, t, p
    return parts.permute(0, 4, 1, 3, 7, 5, 6, 2, 8).reshape(-1, STRIPS, LANES, BITS)


def from_lanes(lanes: Tensor, tiles: tuple[int, int]) -> Tensor:
    """`to_lanes` undone."""
    parts = lanes.view(*tiles, STRIPS, 8, 4, 8, 2, 2, 2)  # tile, tile, strip, g, t, k16, q, h, p
    return parts.permute(0, 2, 7, 3, 1, 5, 6, 4, 8).reshape(tiles[0] * ROWS, tiles[1] * COLUMNS)


def encode(weight: Tensor, mask: Tensor | None = None) -> Bitmap:
    """`weight` (out, in) of 16-bit values where `mask` is True; by default where it is not zero, or NaN.

    Raises TypeError for values of another size, ValueError for a weight too large for 32-bit offsets.
    """
    if weight.element_size() != 2:
        raise TypeError(f"the bitmap stores 16-bit values, not {weight.dtype}; cast the weight first")
    n_out, n_in = weight.shape
    mask = weight != 0 if mask is None else mask
    room = (0, -n_in % COLUMNS, 0, -n_out % ROWS)
    kept = to_lanes(torch.nn.functional.pad(mask, room))
    values = to_lanes(torch.nn.functional.pad(weight.view(torch.int16), room))[kept]
    counts = kept.sum((2, 3))  # (tiles, strips)
    whole = counts.sum(1)
    size = HEAD + (whole + 7) // 8 * 4  # words of each tile
    if size.sum() >= 2**33:
        raise ValueError(f"{int(size.sum())} words exceed the offsets of 32 bits; cut the weight in parts")
    begin = size.cumsum(0) - size
    words = torch.zeros(int(size.sum()), dtype=torch.int32, device=weight.device)
    bits = kept.view(-1, STRIPS, LANES, 2, 32).long() << torch.arange(32, device=weight.device)
    masks = bits.sum(-1).transpose(2, 3)  # (tiles, strips, 2, lanes)
    words[begin[:, None] + torch.arange(MASKS, device=weight.device)] = (
        (masks - (masks >> 31 << 32)).int().flatten(1)
    )
    halves = words.view(torch.int16)
    starts = (counts.cumsum(1) - counts).short()
    halves[2 * (begin + MASKS)[:, None] + torch.arange(STRIPS, device=weight.device)] = starts
    rank = torch.arange(len(values), device=weight.device) - (whole.cumsum(0) - whole).repeat_interleave(
        whole
    )
    halves[2 * (begin + HEAD).repeat_interleave(whole) + rank] = values
    offsets = torch.cat([begin, size.sum()[None]]) // 4
    return Bitmap(words, offsets.int(), (n_out, n_in), weight.dtype, int(size.max()) // 4)


def conflicts(weight: Bitmap) -> float:
    """How many times a warp's read of one value a lane takes, on average: 1 if no two share a bank."""
    kept = weight.kept().flatten(0, 1)  # (strips, lanes, 64)
    counts = kept.sum(2)
    value = (counts.cumsum(1) - counts)[..., None] + kept.cumsum(2) - 1  # in its strip
    read = torch.arange(len(kept), device=kept.device)[:, None, None] * BITS + torch.arange(BITS)
    # two halves of one cell of 32 bits are one access
    cell = (read * 2**16 + value // 2)[kept].unique()
    turns = (
        torch.bincount(cell // 2**16 * 32 + cell % 32, minlength=len(kept) * BITS * 32).view(-1, 32).amax(1)
    )
    return turns.sum().item() / max(turns.count_nonzero().item(), 1)
