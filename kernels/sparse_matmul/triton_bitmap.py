"""The bitmap product in Triton: the layout of bitmap.py, decoded into the registers that tensor cores read.

A program takes a tile of 128 x 128 at a time. The popcounts of its masks say where each lane's values begin;
from there a lane walks through its 64 bits and notes for each weight which value is its own, so one gather
fetches them all. Eight warps take a strip each, so every weight is already in the lane that multiplies it.
"""

import torch
import triton
import triton.language as tl

from lightlib.kernels.sparse_matmul import bitmap
from lightlib.kernels.sparse_matmul.launch import checked, tokens_at_once

TILE, STRIPS, LANES = tl.constexpr(bitmap.ROWS), tl.constexpr(bitmap.STRIPS), tl.constexpr(bitmap.LANES)
MASKS, HEAD = tl.constexpr(bitmap.MASKS), tl.constexpr(bitmap.HEAD)
# a warp for each strip; with 128 registers to a thread, two programs share a multiprocessor
OPTIONS = {"num_warps": bitmap.STRIPS, "num_stages": 3, "maxnreg": 128}


@triton.jit
def ones(bits):
    """How many bits of each word are set: sums of 2, of 4, of 8 bits, and of bytes. Compiles to one POPC."""
    bits = bits.to(tl.uint32, bitcast=True)
    bits = bits - (bits >> 1 & 0x55555555)
    bits = (bits & 0x33333333) + (bits >> 2 & 0x33333333)
    return ((bits + (bits >> 4) & 0x0F0F0F0F) * 0x01010101 >> 24).to(tl.int32)


@triton.jit
def walk(bits, next, ZERO: tl.constexpr, FIRST: tl.constexpr, N: tl.constexpr):
    """Which value each of N weights is, from bit FIRST on: (..., 2, 2, ...), lowest bits first; and the next.

    Weights that are not stored are value ZERO, whose bits are all set.
    """
    if N == 1:
        kept = bits << 31 - FIRST >> 31  # -1 or 0
        return next | ~kept & ZERO, next - kept
    else:
        low, next = walk(bits, next, ZERO, FIRST, N // 2)
        high, next = walk(bits, next, ZERO, FIRST + N // 2, N // 2)
        return tl.join(low, high), next


@triton.jit
def decode(words, offsets, tile, ROOM: tl.constexpr):
    """A tile's weights (128, 128) as int16; it stores at most ROOM - 1 values, or is full."""
    begin, end = tl.load(offsets + tile), tl.load(offsets + tile + 1)
    words += begin.to(tl.int64) * 4
    strip, lane = tl.arange(0, STRIPS)[:, None], tl.arange(0, LANES)[None, :]
    low = tl.load(words + strip * 64 + lane)  # (strips, lanes)
    high = tl.load(words + strip * 64 + 32 + lane)
    start = tl.load(words + MASKS + strip // 2) >> strip % 2 * 16 & 0xFFFF
    slot = tl.arange(0, ROOM)
    stored = slot < (end - begin) * 8 - 2 * HEAD  # beyond them all is zero, value ROOM - 1 among it
    values = tl.load(words.to(tl.pointer_type(tl.int16)) + 2 * HEAD + slot, mask=stored, other=0)

    count = ones(low) + ones(high)
    next = start + tl.cumsum(count, 1) - count
    low, next = walk(low, next, ROOM - 1, 0, 32)
    high, next = walk(high, next, ROOM - 1, 0, 32)
    weights = tl.gather(values, tl.join(low, high).reshape(STRIPS * LANES * 64), 0)
    # lane = 4 g + t; bits of a weight, the lowest first: p, h, q and three of k16; see bitmap.to_lanes
    weights = weights.reshape(STRIPS, 8, 4, 2, 2, 2, 2, 2, 2)  # strip, g, t, p, h, q, k16
    return weights.permute(0, 4, 1, 8, 7, 6, 5, 2, 3).reshape(TILE, TILE)


@triton.jit
def bitmap_kernel(
    words, offsets, x, y, n_out, n_in, tokens,
    ROOM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y (splits, tokens, out) = x (tokens, in) W^T in parts: 128 rows of W and BN tokens for each program."""
    n_in = n_in // 8 * 8  # it is; now the compiler knows that rows begin at multiples of 16 bytes
    steps, splits = tl.cdiv(n_in, TILE), tl.num_programs(2)
    first, split = tl.program_id(1) * BN, tl.program_id(2)
    x += first.to(tl.int64) * n_in
    y += (split.to(tl.int64) * tokens + first) * n_out
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    token = tl.arange(0, BN)[None, :]
    inside = token < tokens - first
    sums = tl.zeros([TILE, BN], tl.float32)
    for step in range(split * steps // splits, (split + 1) * steps // splits):
        weights = decode(words, offsets, tl.program_id(0) * steps + step, ROOM)
        weights = weights.to(x.dtype.element_ty, bitcast=True)
        column = step * TILE + tl.arange(0, TILE)[:, None]
        inputs = tl.load(x + token * n_in + column, mask=inside & (column < n_in), other=0.0)
        if UPCAST:  # Triton's interpreter multiplies the bit patterns of bfloat16
            weights, inputs = weights.to(tl.float32), inputs.to(tl.float32)
        sums = tl.dot(weights, inputs, sums)
    tl.store(y + token * n_out + row, sums.to(y.dtype.element_ty), mask=inside & (row < n_out))


def room(weight: bitmap.Bitmap) -> int:
    """The power of two that holds the values of any tile, and a zero, but where a tile is full."""
    values = 8 * weight.capacity - 2 * bitmap.HEAD
    return max(1024, min(bitmap.ROWS * bitmap.COLUMNS, triton.next_power_of_2(values + 1)))


def bitmap_matmul(weight: bitmap.Bitmap, x: torch.Tensor, *, splits: int = 1) -> torch.Tensor:
    """x (tokens, in) W^T -> (tokens, out) by `bitmap_kernel`; in is a multiple of 8.

    splits: in how many parts the columns are cut; their float32 sums are added up in a second step.
    """
    x = checked(x, weight.shape, weight.dtype)
    n_out, tokens, values = weight.shape[0], max(16, tokens_at_once(len(x))), room(weight)
    y = x.new_empty(splits, len(x), n_out, dtype=x.dtype if splits == 1 else torch.float32)
    bitmap_kernel[weight.tiles[0], triton.cdiv(len(x), tokens), splits](
        weight.words, weight.offsets, x, y, n_out, x.shape[1], len(x),
        ROOM=values, BN=tokens, UPCAST=not x.is_cuda, **OPTIONS,
    )  # fmt: skip
    return y[0] if splits == 1 else y.sum(0).to(x.dtype)
