"""Tiled-CSL: a sparse weight in tiles, each value with its place in its tile, in the order of the banks.

Xia et al. 2023, arXiv:2309.10285 (Flash-LLM). The layout is theirs, its limits are not: any shape, any share
of zeros, fp16 and bf16; the order is found for all tiles at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

ROWS, COLUMNS = 128, 64  # of a tile
SLOTS = ROWS * COLUMNS
LANES, VECTOR, BANKS = 32, 4, 32  # lanes of a warp; words that a lane loads at once; banks of shared memory
THREADS, MOST_AHEAD = 128, 16  # of a block; loads that a thread has registers for
BLOCK = LANES * VECTOR  # words that a warp loads at once


@dataclass(frozen=True)
class CSL:
    """A weight (out, in) of 16-bit values.

    words: int32 (n), the value in the low 16 bits, where it lands in the high ones: in bytes, twice its slot
    (see `slots`). A tile's words lie together and are a multiple of 4. offsets: int32 (tiles + 1), where each
    tile begins, in units of 4 words; tiles go row by row. ahead: the loads of four words that let each of 128
    threads hold its share of nine tiles in ten.
    """

    words: Tensor
    offsets: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    ahead: int

    @property
    def tiles(self) -> tuple[int, int]:
        return ceil(self.shape[0] / ROWS), ceil(self.shape[1] / COLUMNS)

    def stored_bits(self) -> int:
        return 32 * (self.words.numel() + self.offsets.numel())

    def dense(self) -> Tensor:
        """The weight (out, in)."""
        tile = torch.arange(len(self.offsets) - 1, device=self.words.device)
        tile = tile.repeat_interleave(4 * self.offsets.diff().long())
        words = self.words.long()
        row, column = place(words >> 17)
        n_tiles = self.tiles[1]
        row, column = tile // n_tiles * ROWS + row, tile % n_tiles * COLUMNS + column
        padded = torch.zeros(self.tiles[0] * ROWS, n_tiles * COLUMNS, dtype=torch.int16, device=words.device)
        padded[row, column] = (words & 0xFFFF).to(torch.int16)
        return padded.view(self.dtype)[: self.shape[0], : self.shape[1]].contiguous()


def slots(row: Tensor, column: Tensor) -> Tensor:
    """Where (row, column) of a tile lies in shared memory, in units of 16 bits.

    Eight values side by side form a chunk of 16 bytes; the chunks of row r are shuffled by r mod 8, so that
    eight rows of one chunk, which `ldmatrix` reads together, lie in different banks.
    """
    return row * COLUMNS + ((column // 8) ^ (row % 8)) * 8 + column % 8


def place(slot: Tensor) -> tuple[Tensor, Tensor]:
    """(row, column) of a slot: `slots` undone."""
    row = slot // COLUMNS
    return row, ((slot % COLUMNS // 8) ^ (row % 8)) * 8 + slot % 8


def encode(weight: Tensor, mask: Tensor | None = None, reorder: bool = True) -> CSL:
    """`weight` (out, in) of 16-bit values where `mask` is True (default: where it is not zero, NaN included).

    Raises TypeError for values of another size, ValueError for a weight too large for 32-bit offsets.
    """
    if weight.element_size() != 2:
        raise TypeError(f"CSL stores 16-bit values, not {weight.dtype}; cast the weight first")
    n_out, n_in = weight.shape
    across, count = ceil(n_in / COLUMNS), ceil(n_out / ROWS) * ceil(n_in / COLUMNS)
    mask = weight != 0 if mask is None else mask
    row, column = mask.nonzero().unbind(1)
    tile = row // ROWS * across + column // COLUMNS
    slot = slots(row % ROWS, column % COLUMNS)
    values = weight.view(torch.int16)[row, column].long() & 0xFFFF
    kept = torch.bincount(tile, minlength=count)
    padded = (kept + VECTOR - 1) // VECTOR * VECTOR
    if padded.sum() >= 2**33:
        raise ValueError(f"{int(padded.sum())} values exceed the offsets of 32 bits; cut the weight in parts")
    fill_tile, fill_slot = padding(tile, slot, padded - kept)
    tile, slot = torch.cat([tile, fill_tile]), torch.cat([slot, fill_slot])
    values = torch.cat([values, torch.zeros_like(fill_slot)])
    order = (tile * SLOTS + slot).argsort()
    tile, slot, values = tile[order], slot[order], values[order]
    if reorder:
        order = by_banks(tile, slot, padded)
        slot, values = slot[order], values[order]
    offsets = torch.cat([padded.new_zeros(1), padded.cumsum(0)]) // VECTOR
    vectors = (padded // VECTOR).sort().values[int(0.9 * (count - 1))].item()
    ahead = max(1, min(MOST_AHEAD, ceil(vectors / THREADS)))
    words = values | slot << 17  # slots have 13 bits, so the sign is never set
    return CSL(words.int(), offsets.int(), (n_out, n_in), weight.dtype, ahead)


def padding(tile: Tensor, slot: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
    """(tile, slot) of as many free slots as each tile is `missing` words; a zero may be written there."""
    free = torch.ones(len(missing), SLOTS, dtype=torch.bool, device=tile.device)
    free[tile, slot] = False
    first = free & (free.cumsum(1, dtype=torch.int16) <= missing[:, None])
    return first.nonzero().unbind(1)


def by_banks(tile: Tensor, slot: Tensor, counts: Tensor) -> Tensor:
    """An order of words, sorted by tile, in which the 32 lanes of a warp store to different banks.

    Lane l loads words 4 l to 4 l + 3 of a block of 128, and all lanes store their i-th word at once: these
    words form a group. As long as a tile has words for all 32 banks, a group takes one of each. The rest is
    sorted by bank and dealt out one to each group in turn, so that no bank comes twice in a group before it
    must. counts: the words of each tile.
    """
    n_tiles, bank = len(counts), slot // 2 % BANKS
    start = counts.cumsum(0) - counts
    sorted_by_bank = (tile * BANKS + bank).argsort(stable=True)
    tile, bank = tile[sorted_by_bank], bank[sorted_by_bank]
    held = torch.bincount(tile * BANKS + bank, minlength=n_tiles * BANKS).view(n_tiles, BANKS)
    before = held.cumsum(1) - held  # words of a tile in lower banks
    rank = torch.arange(len(tile), device=tile.device) - start[tile] - before[tile, bank]

    full, rest = counts // BLOCK * VECTOR, counts % BLOCK // VECTOR  # groups of 32, and the size of four more
    rounds = torch.minimum(held.amin(1), full)  # groups that take one word of each bank
    in_round = rank < rounds[tile]
    left = held - rounds[:, None]
    # the place of what is left, sorted by bank
    turn = rank - rounds[tile] + (left.cumsum(1) - left)[tile, bank]
    groups = full - rounds + VECTOR * (rest > 0)
    deep, long = rest[tile], (full - rounds)[tile]  # all groups have `deep` places, the first `long` ones 32
    early = turn < deep * groups[tile]
    later = turn - deep * groups[tile]
    group = torch.where(early, turn % groups[tile].clamp_min(1), later % long.clamp_min(1)) + rounds[tile]
    lane = torch.where(early, turn // groups[tile].clamp_min(1), deep + later // long.clamp_min(1))
    group, lane = torch.where(in_round, rank, group), torch.where(in_round, bank, lane)
    target = start[tile] + group // VECTOR * BLOCK + lane * VECTOR + group % VECTOR
    return torch.empty_like(target).scatter_(0, target, sorted_by_bank)


def conflicts(weight: CSL) -> float:
    """How many times a warp's store of one word a lane takes, on average: 1 if no two words share a bank."""
    total = groups = 0
    slot = weight.words.long() >> 17
    for begin, end in zip(weight.offsets[:-1].tolist(), weight.offsets[1:].tolist(), strict=True):
        for block in slot[4 * begin : 4 * end].split(BLOCK) if end > begin else ():
            for word in block.view(-1, VECTOR).T // 2:  # one word of each lane
                cells = word.unique()  # two halves of one cell are one access
                total += (cells % BANKS).bincount().max().item()
                groups += 1
    return total / max(groups, 1)
