"""Unpack a sparse weight once, on the GPU, in Triton: for so many tokens that a dense product is best.

Values are moved as 16-bit integers, so -0.0, NaN and infinity arrive as they were stored.
"""

import torch
import triton
import triton.language as tl

from lightlib.kernels.sparse_matmul import bitmap, compact, csl, ell
from lightlib.kernels.sparse_matmul.triton_bitmap import OPTIONS, TILE, decode, room

ROWS, COLUMNS = tl.constexpr(csl.ROWS), tl.constexpr(csl.COLUMNS)
GROUP, UNIT, BYTES = tl.constexpr(compact.GROUP), tl.constexpr(compact.UNIT), tl.constexpr(compact.BYTES)
CHUNK, GROUPS = tl.constexpr(ell.CHUNK), tl.constexpr(ell.GROUPS)
BLOCK = 1024  # words that a program writes at once


@triton.jit
def store(dense, tile, slot, bits, stored, n_out, n_in):
    """Bits of 16-bit values to their slots of a tile of 128 x 64 (`csl.place`)."""
    across = tl.cdiv(n_in, COLUMNS)
    row = slot // COLUMNS
    column = (slot % COLUMNS // 8 ^ row % 8) * 8 + slot % 8
    row, column = tile // across * ROWS + row, tile % across * COLUMNS + column
    inside = stored & (row < n_out) & (column < n_in)  # zeros that fill a tile up may lie outside
    tl.store(dense + row.to(tl.int64) * n_in + column, bits.to(tl.int16), mask=inside)


@triton.jit
def csl_kernel(words, offsets, dense, n_out, n_in, BLOCK: tl.constexpr):
    """dense (out, in), zeros before, takes the words of one tile for each program."""
    tile = tl.program_id(0)
    begin, end = tl.load(offsets + tile), tl.load(offsets + tile + 1)
    words += begin.to(tl.int64) * 4
    for first in range(0, (end - begin) * 4, BLOCK):
        at = first + tl.arange(0, BLOCK)
        stored = at < (end - begin) * 4
        word = tl.load(words + at, mask=stored, other=0)
        store(dense, tile, word >> 17, word, stored, n_out, n_in)


@triton.jit
def compact_kernel(words, offsets, dense, n_out, n_in, BLOCK: tl.constexpr):
    """dense (out, in), zeros before, takes the groups of one tile for each program; words in bytes."""
    tile = tl.program_id(0)
    begin, end = tl.load(offsets + tile), tl.load(offsets + tile + 1)
    words += begin.to(tl.int64) * 16
    groups = (end - begin) * 16 // BYTES
    for first in range(0, groups * GROUP, BLOCK):
        at = first + tl.arange(0, BLOCK)
        stored = at < groups * GROUP
        bits = tl.load(words.to(tl.pointer_type(tl.int16)) + at, mask=stored, other=0)
        slot = tl.load(words + groups * 2 * GROUP + at, mask=stored, other=0).to(tl.int32)
        window = tl.load(words + groups * 3 * GROUP + at // GROUP, mask=stored, other=0).to(tl.int32)
        store(dense, tile, UNIT * window + slot, bits, stored, n_out, n_in)


@triton.jit
def ell_kernel(values, columns, first, dense, n_in):
    """dense (out, in), zeros before, takes one chunk of a row for each program (chunks, out)."""
    row, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    at, slot = row * tl.num_programs(0) + chunk, tl.arange(0, CHUNK)
    bits = tl.load(values + at * CHUNK + slot)
    column = tl.load(first + at * GROUPS + slot % GROUPS).to(tl.int32) & 0xFFFF
    column += tl.load(columns + at * CHUNK + slot).to(tl.int32)
    # zeros that fill a group up stand where another value may stand
    tl.store(dense + row * n_in + column, bits, mask=(bits != 0) & (column < n_in))


@triton.jit
def bitmap_kernel(words, offsets, dense, n_out, n_in, ROOM: tl.constexpr):
    """dense (out, in): every weight of one tile for each program, zeros too."""
    tile, across = tl.program_id(0), tl.cdiv(n_in, TILE)
    row = (tile // across * TILE + tl.arange(0, TILE)[:, None]).to(tl.int64)
    column = tile % across * TILE + tl.arange(0, TILE)[None, :]
    weights = decode(words, offsets, tile, ROOM)
    tl.store(dense + row * n_in + column, weights, mask=(row < n_out) & (column < n_in))


def expand_csl(weight: csl.CSL) -> torch.Tensor:
    """The dense weight (out, in): zeros, then `csl_kernel`."""
    dense = weight.words.new_zeros(weight.shape, dtype=torch.int16)
    csl_kernel[(len(weight.offsets) - 1,)](weight.words, weight.offsets, dense, *weight.shape, BLOCK=BLOCK)
    return dense.view(weight.dtype)


def expand_compact(weight: compact.CompactCSL) -> torch.Tensor:
    """The dense weight (out, in): zeros, then `compact_kernel`."""
    dense, octets = weight.words.new_zeros(weight.shape, dtype=torch.int16), weight.words.view(torch.uint8)
    compact_kernel[(len(weight.offsets) - 1,)](octets, weight.offsets, dense, *weight.shape, BLOCK=BLOCK)
    return dense.view(weight.dtype)


def expand_bitmap(weight: bitmap.Bitmap) -> torch.Tensor:
    """The dense weight (out, in), by `bitmap_kernel`."""
    dense = weight.words.new_empty(weight.shape, dtype=torch.int16)
    bitmap_kernel[(len(weight.offsets) - 1,)](
        weight.words, weight.offsets, dense, *weight.shape, ROOM=room(weight), **OPTIONS
    )
    return dense.view(weight.dtype)


def expand_ell(weight: ell.ELL) -> torch.Tensor:
    """The dense weight (out, in): zeros, then `ell_kernel`."""
    dense = weight.first.new_zeros(weight.shape)
    grid = weight.values.shape[1], weight.shape[0]
    ell_kernel[grid](weight.values.view(torch.int16), weight.columns, weight.first, dense, weight.shape[1])
    return dense.view(weight.values.dtype)


EXPAND = {"csl": expand_csl, "compact": expand_compact, "bitmap": expand_bitmap, "ell": expand_ell}
