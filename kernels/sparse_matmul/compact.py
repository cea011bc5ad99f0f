"""Compact Tiled-CSL: eight values of a tile share where they lie, so a place takes 9 bits instead of 16.

Xia et al. 2023, arXiv:2309.10285 (Flash-LLM), stores 16 bits of place with each value: 4 bytes. Here a group
of eight values lies in a window of 256 slots: a byte says where the window begins, a byte a value where the
value lies in it: 3.125 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightlib.kernels.sparse_matmul.csl import BANKS, COLUMNS, LANES, ROWS, SLOTS, THREADS, place, slots

GROUP, WINDOW, UNIT = 8, 256, 32  # values of a group; slots they lie within; slots between two windows
BYTES, ALIGN = 25, 16  # of a group: 8 values, 8 places, a window; a tile fills whole 16 bytes
MOST_AHEAD = 8  # groups that a thread has registers for
# how much it counts that a window has one value more of a bank, and that a lane has already stored to it; and
# by how many lanes the first to choose moves on at each step
MORE, USED, TURN = 2**10, 2**20, 13


@dataclass(frozen=True)
class CompactCSL:
    """A weight (out, in) of 16-bit values.

    words: int32 (n). A tile of g groups is 8 g values of 16 bits, 8 g places of 8 bits and g windows of 8
    bits, filled up with zeros to whole 16 bytes. offsets: int32 (tiles + 1), where each tile begins, in units
    of 16 bytes; tiles go row by row, and one of u units has g = 16 u // 25 groups. A value lies in slot
    32 window + place of its tile (see `csl.slots`); a group of fewer than eight values repeats its last one.
    ahead: the groups that let each of 128 threads hold its share of nine tiles in ten.
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
        tile, _, slot, values = self.groups()
        tiled = torch.zeros(len(self.offsets) - 1, SLOTS, dtype=torch.int16, device=values.device)
        tiled[tile[:, None], slot] = values
        return from_tiles(tiled, self.tiles).view(self.dtype)[: self.shape[0], : self.shape[1]].contiguous()

    def groups(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Each group's tile and number in the tile (groups), its slots and its values' bits (groups, 8)."""
        counts = self.offsets.diff().long() * ALIGN // BYTES
        tile, number, values, places, window = parts(self.offsets[:-1].long(), counts)
        octets = self.words.view(torch.uint8)
        slot = UNIT * octets[window].long()[:, None] + octets[places].long()
        return tile, number, slot, self.words.view(torch.int16)[values]


def parts(begin: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Each group's tile and number in the tile (groups), and where its parts lie in memory.

    That is its values in units of 16 bits and its places in bytes (groups, 8), its window in bytes (groups).
    begin: where each tile begins, in units of 16 bytes; counts: its groups.
    """
    tile = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    number = torch.arange(len(tile), device=counts.device) - (counts.cumsum(0) - counts)[tile]
    each = torch.arange(GROUP, device=counts.device)
    values = (begin[tile] * ALIGN // 2 + GROUP * number)[:, None] + each
    places = (begin * ALIGN + 2 * GROUP * counts)[tile] + GROUP * number
    window = (begin * ALIGN + 3 * GROUP * counts)[tile] + number
    return tile, number, values, places[:, None] + each, window


def to_tiles(dense: Tensor) -> Tensor:
    """(out, in) -> (tiles, 8192), each value in its slot; what lies outside is 0."""
    dense = pad(dense, (0, -dense.shape[1] % COLUMNS, 0, -dense.shape[0] % ROWS))
    tiled = dense.view(-1, ROWS, dense.shape[1] // COLUMNS, COLUMNS).transpose(1, 2).reshape(-1, SLOTS)
    row, column = place(torch.arange(SLOTS, device=dense.device))
    return tiled[:, row * COLUMNS + column]


def from_tiles(tiled: Tensor, tiles: tuple[int, int]) -> Tensor:
    """`to_tiles` undone, but for what lies outside."""
    slot = slots(torch.arange(ROWS)[:, None], torch.arange(COLUMNS)).flatten().to(tiled.device)
    whole = tiled[:, slot].view(*tiles, ROWS, COLUMNS).transpose(1, 2)
    return whole.reshape(tiles[0] * ROWS, tiles[1] * COLUMNS)


def encode(weight: Tensor, mask: Tensor | None = None, reorder: bool = True) -> CompactCSL:
    """`weight` (out, in) of 16-bit values where `mask` is True (default: where it is not zero, NaN included).

    Raises TypeError for values of another size, ValueError for a weight too large for 32-bit offsets.
    """
    if weight.element_size() != 2:
        raise TypeError(f"compact CSL stores 16-bit values, not {weight.dtype}; cast the weight first")
    kept = to_tiles(weight != 0 if mask is None else mask)
    value, slot = to_tiles(weight.view(torch.int16))[kept], kept.nonzero()[:, 1]
    first, taken, start = windows(kept, slot)
    depth = (taken + GROUP - 1) // GROUP  # groups of each window
    counts = depth.sum(1)
    size = (BYTES * counts + ALIGN - 1) // ALIGN
    if size.sum() >= 2**31:
        raise ValueError(
            f"{int(size.sum())} x 16 bytes exceed the offsets of 32 bits; cut the weight in parts"
        )

    # one group of every window, then the second ones: the lanes of a warp have many windows to choose from
    deep = torch.arange(int(depth.max()), device=weight.device)
    tile, level, window = (deep[:, None] < depth[:, None]).nonzero().unbind(1)
    rank = GROUP * level[:, None] + torch.arange(GROUP, device=weight.device)
    item = first[tile, window][:, None] + rank.minimum(taken[tile, window][:, None] - 1)  # (groups, 8)
    if reorder:
        item = by_banks(item, slot // 2 % BANKS, tile, window, depth)

    offsets = torch.cat([size.new_zeros(1), size.cumsum(0)])
    words = torch.zeros(4 * int(offsets[-1]), dtype=torch.int32, device=weight.device)
    _, _, at_values, at_places, at_window = parts(offsets[:-1], counts)
    start = start[tile, window]
    words.view(torch.int16)[at_values] = value[item]
    words.view(torch.uint8)[at_places] = (slot[item] - start[:, None]).to(torch.uint8)
    words.view(torch.uint8)[at_window] = (start // UNIT).to(torch.uint8)
    most = counts.sort().values[int(0.9 * (len(counts) - 1))].item()
    ahead = max(1, min(MOST_AHEAD, ceil(most / THREADS)))
    return CompactCSL(words, offsets.int(), tuple(weight.shape), weight.dtype, ahead)


def windows(kept: Tensor, slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each window's first value, how many it takes, and the slot it begins at: (tiles, windows).

    A window begins at the first value that none has taken yet, rounded down to 32 slots. It takes as many
    times eight values as it holds, or all where it holds fewer than eight: these are the only groups that are
    not full, 32 of a tile at most. kept: (tiles, 8192); slot: of each kept value.
    """
    before = pad(kept.cumsum(1, dtype=torch.int16), (1, 0))  # values of a tile in lower slots
    counts = before[:, -1].long()
    begin = counts.cumsum(0) - counts
    slot, at, found = pad(slot, (0, 1)), begin, []
    while not found or (at < begin + counts).any():
        start = (slot[at] // UNIT * UNIT).clamp_max(SLOTS - WINDOW)
        held = (begin + before.gather(1, start[:, None] + WINDOW)[:, 0] - at).clamp_min(0)
        taken = torch.where(held < GROUP, held, held // GROUP * GROUP)
        found.append((at, taken, start))
        at = at + taken
    first, taken, start = (torch.stack(each, 1) for each in zip(*found, strict=True))
    return first, taken, start


def by_banks(item: Tensor, bank: Tensor, tile: Tensor, window: Tensor, depth: Tensor) -> Tensor:
    """`item` (groups, 8), dealt anew within each window so that the lanes of a warp store to different banks.

    Lane l stores the values of group l of 32, and all lanes store one value a step. Step by step and lane by
    lane, in all tiles at once, the next value is one whose bank the fewest lanes have had at this step; among
    these, one of the bank that its window, then its tile, has most left of. bank: of each item; tile, window:
    of each group; depth: the groups of each window (tiles, windows).
    """
    n_tiles, n_windows = depth.shape
    row = tile * (n_windows + 1) + window  # each tile has one more window, which holds nothing
    cell = (BANKS * row[:, None] + bank[item]).flatten()
    held = torch.bincount(cell, minlength=n_tiles * (n_windows + 1) * BANKS)
    begin, held = held.cumsum(0) - held, held.int().view(-1, BANKS)
    left = held.view(n_tiles, -1, BANKS).sum(1, dtype=torch.int32)
    sorted_by_cell = item.flatten()[cell.argsort()]
    counts = depth.sum(1)
    most = int(counts.max())
    number = torch.arange(len(tile), device=tile.device) - (counts.cumsum(0) - counts)[tile]
    rows = (n_windows + 1) * torch.arange(1, n_tiles + 1, device=tile.device).repeat(most, 1) - 1
    rows[number, tile] = row
    chosen = torch.empty(most, GROUP, n_tiles, dtype=torch.long, device=tile.device)
    for step in range(ceil(most / LANES) * GROUP):
        free = left.clone()
        for lane in range(TURN * step, TURN * step + LANES):
            group = step // GROUP * LANES + lane % LANES
            if group < most:
                here = held.index_select(0, rows[group])  # (tiles, banks)
                scores = (MORE * here + free).masked_fill_(here == 0, -(2**31))
                choice = scores.argmax(1, keepdim=True)
                count = here.gather(1, choice)
                cell = BANKS * rows[group][:, None] + choice
                chosen[group, step % GROUP] = (begin[cell] + count - 1)[:, 0]
                one = count.clamp_max(1)  # 0 where the tile has no such group
                held.view(-1)[cell] = count - one
                left.scatter_add_(1, choice, -one)
                free.scatter_add_(1, choice, -USED * one)
    return sorted_by_cell[chosen[number, :, tile]]


def conflicts(weight: CompactCSL) -> float:
    """How many times a warp's store of one value a lane takes, on average: 1 if no two share a bank."""
    tile, number, slot, _ = weight.groups()
    device, steps = slot.device, SLOTS // LANES  # stores of a full tile
    step = GROUP * (number // LANES)[:, None] + torch.arange(GROUP, device=device) + steps * tile[:, None]
    # two halves of one cell of 32 bits are one access
    cell = (step * (SLOTS // 2) + slot // 2).unique()
    bank = cell // (SLOTS // 2) * BANKS + cell % BANKS
    worst = torch.bincount(bank, minlength=BANKS * steps * (len(weight.offsets) - 1)).view(-1, BANKS).amax(1)
    return worst.sum().item() / max(worst.count_nonzero().item(), 1)
