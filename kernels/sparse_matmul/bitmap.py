"""Bitmap for tensor cores: each lane's own weights as 32 bits and the values that they announce.

A lane of `mma.m16n8k16` holds 8 weights of each 16 x 16 piece, so 32 of a strip of 16 x 64: one word says
which of them are stored. The values of a strip's lanes lie one after the other; where a lane's begin is the
sum of the popcounts of the lanes before it. So one popcount serves 32 weights, and nothing but the values
passes through shared memory. An answer to SpInfer (Fan et al. 2025, EuroSys), which counts for every pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

ROWS, COLUMNS, STRIP = 128, 64, 16  # of a tile; rows of a strip
STRIPS, WORD = ROWS // STRIP, 32
ALIGNED = 8  # values, 16 bytes: where the values of a tile may begin


@dataclass(frozen=True)
class Bitmap:
    """A weight (out, in) of 16-bit values.

    masks: int32 (tiles, 8 strips, 32 lanes). values: 16-bit (n). starts: int32 (8 tiles + 1), where a strip's
    values begin, and where the last ones end; a tile's begin at a multiple of 8. capacity: the most values
    that a tile takes.
    """

    masks: Tensor
    values: Tensor
    starts: Tensor
    shape: tuple[int, int]
    capacity: int

    @property
    def tiles(self) -> tuple[int, int]:
        return ceil(self.shape[0] / ROWS), ceil(self.shape[1] / COLUMNS)

    def stored_bits(self) -> int:
        return 32 * (self.masks.numel() + self.starts.numel()) + 16 * self.values.numel()

    def dense(self) -> Tensor:
        """The weight (out, in)."""
        kept = (self.masks[..., None] >> torch.arange(WORD, device=self.masks.device) & 1).bool()
        counts = kept.sum((2, 3))  # (tiles, strips)
        places = self.starts[:-1].long().repeat_interleave(counts.flatten())
        first = (counts.flatten().cumsum(0) - counts.flatten()).repeat_interleave(counts.flatten())
        places = places + torch.arange(len(places), device=places.device) - first
        out = torch.zeros(kept.shape, dtype=self.values.dtype, device=self.values.device)
        out[kept] = self.values[places]
        return from_lanes(out, self.tiles)[: self.shape[0], : self.shape[1]].contiguous()


def to_lanes(weight: Tensor) -> Tensor:
    """(out, in), multiples of 128 and 64 -> (tiles, 8 strips, 32 lanes, 32 weights) of tensor cores."""
    across = weight.shape[1] // COLUMNS
    # lane = 4 g + t; its registers go by half q of the columns, then h of the rows, with a pair p each
    parts = weight.view(-1, STRIPS, 2, 8, across, 4, 2, 4, 2)  # tile, strip, h, g; tile, k16, q, t, p
    return parts.permute(0, 4, 1, 3, 7, 5, 6, 2, 8).reshape(-1, STRIPS, 32, WORD)


def from_lanes(lanes: Tensor, tiles: tuple[int, int]) -> Tensor:
    """`to_lanes` undone."""
    parts = lanes.view(*tiles, STRIPS, 8, 4, 4, 2, 2, 2)  # tile, tile, strip, g, t, k16, q, h, p
    return parts.permute(0, 2, 7, 3, 1, 5, 6, 4, 8).reshape(tiles[0] * ROWS, tiles[1] * COLUMNS)


def encode(weight: Tensor, mask: Tensor | None = None) -> Bitmap:
    """`weight` (out, in) of 16-bit values where `mask` is True; by default where it is not zero, or NaN."""
    if weight.element_size() != 2:
        raise TypeError(f"the bitmap stores 16-bit values, not {weight.dtype}; cast the weight first")
    n_out, n_in = weight.shape
    mask = weight != 0 if mask is None else mask
    room = (0, -n_in % COLUMNS, 0, -n_out % ROWS)
    kept = to_lanes(torch.nn.functional.pad(mask, room))
    values = to_lanes(torch.nn.functional.pad(weight, room))[kept]
    masks = (kept.long() << torch.arange(WORD, device=weight.device)).sum(-1)
    counts = kept.sum((2, 3))  # (tiles, strips)
    whole = counts.sum(1)
    padded = (whole + ALIGNED - 1) // ALIGNED * ALIGNED
    begin = padded.cumsum(0) - padded
    if begin[-1] >= 2**31:
        raise ValueError(f"{int(begin[-1])} values exceed the offsets of 32 bits; cut the weight in parts")
    starts = (begin[:, None] + counts.cumsum(1) - counts).flatten()
    starts = torch.cat([starts, padded.sum()[None]])
    # one more chunk at the end: a lane may look at one value beyond its own
    stored = values.new_zeros(int(padded.sum()) + ALIGNED)
    gap = (begin - (whole.cumsum(0) - whole)).repeat_interleave(whole)
    stored[torch.arange(len(values), device=weight.device) + gap] = values
    masks = (masks - (masks >> 31 << 32)).int()
    return Bitmap(masks, stored, starts.int(), (n_out, n_in), int(padded.max()))
