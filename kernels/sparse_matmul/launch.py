"""The sparse products: which kernel runs, over which grid, with what shared memory.

`run` is what a rung is launched with: nvrtc.launch on a GPU, host.launch on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from lightlib.kernels.sparse_matmul.bitmap import Bitmap
from lightlib.kernels.sparse_matmul.compact import CompactCSL
from lightlib.kernels.sparse_matmul.csl import CSL

HERE = Path(__file__).parent
TILE_BYTES = 128 * 64 * 2
BLOCKS = 3  # a multiprocessor should have at least so many, or the weight's columns are split
STAGES = 3  # tiles of the bitmap kernel that are under way or in use


def tokens_at_once(tokens: int) -> int:
    """How many rows of x a block takes: the macro BN."""
    return next((n for n in (8, 16, 32) if tokens <= n), 64)


def splits_for(row_tiles: int, token_tiles: int, steps: int, processors: int) -> int:
    """In how many parts the columns are cut, so that all multiprocessors have work."""
    return max(1, min(steps, ceil(BLOCKS * processors / (row_tiles * token_tiles))))


def macros(tokens: int, dtype: torch.dtype, **more: int) -> dict[str, int]:
    """What a kernel is compiled for."""
    return {"BN": tokens_at_once(tokens), **({"BF16": 1} if dtype == torch.bfloat16 else {}), **more}


def csl_matmul(
    weight: CSL | CompactCSL,
    x: Tensor,
    run: Callable,
    *,
    rung: str = "csl_v4",
    splits: int = 1,
    vectors: int | None = None,
) -> Tensor:
    """x (tokens, in) W^T -> (tokens, out) by one of the rungs csl_v1 to csl_v5; in is a multiple of 8."""
    x = checked(x, weight.shape, weight.dtype)
    tokens, n_out = len(x), weight.shape[0]
    knobs = macros(tokens, x.dtype) | ({"VECTORS": vectors or weight.ahead} if rung > "csl_v2" else {})
    grid = weight.tiles[0], ceil(tokens / knobs["BN"]), splits
    y = x.new_empty(tokens, n_out)
    work = workspace(grid, tokens, n_out, x.device) if rung > "csl_v3" else ()
    buffers = 1 if rung < "csl_v3" else 2
    run(
        HERE / f"{rung}.cu", rung, grid, (weight.words, weight.offsets, x, y, *work, n_out, *x.shape), knobs,
        shared_bytes=buffers * (TILE_BYTES + knobs["BN"] * 128),
    )  # fmt: skip
    return y


def compact_matmul(
    weight: CompactCSL, x: Tensor, run: Callable, *, splits: int = 1, vectors: int | None = None
) -> Tensor:
    """x (tokens, in) W^T -> (tokens, out) by the rung csl_v5; in is a multiple of 8."""
    return csl_matmul(weight, x, run, rung="csl_v5", splits=splits, vectors=vectors)


def bitmap_matmul(
    weight: Bitmap, x: Tensor, run: Callable, *, splits: int = 1, stages: int = STAGES
) -> Tensor:
    """x (tokens, in) W^T -> (tokens, out) by the kernel `bitmap`; in is a multiple of 8."""
    x = checked(x, weight.shape, weight.dtype)
    tokens, n_out = len(x), weight.shape[0]
    knobs = macros(tokens, x.dtype, CAPACITY=ceil(weight.capacity / 32) * 32, STAGES=stages)
    grid = weight.tiles[0], ceil(tokens / knobs["BN"]), splits
    y = x.new_empty(tokens, n_out)
    args = weight.words, weight.offsets, x, y, *workspace(grid, tokens, n_out, x.device), n_out, *x.shape
    shared = stages * (knobs["CAPACITY"] * 16 + knobs["BN"] * 256)
    run(HERE / "bitmap.cu", "bitmap", grid, args, knobs, shared_bytes=shared)
    return y


def checked(x: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """x as a kernel reads it. Raises ValueError for inputs that it cannot read."""
    if x.ndim != 2 or x.shape[1] != shape[1]:
        raise ValueError(f"x is {tuple(x.shape)}; a weight of {shape} takes (tokens, {shape[1]})")
    if x.dtype != dtype:
        raise ValueError(f"x is {x.dtype}, the weight {dtype}; cast one of them")
    if shape[1] % 8:
        raise ValueError(f"in_features {shape[1]} is not a multiple of 8; pad the weight and x with zeros")
    return x.contiguous()


def workspace(grid: tuple[int, int, int], tokens: int, n_out: int, device) -> tuple[Tensor, Tensor]:
    """What blocks that share outputs need: a sum for each of them, and how many have finished."""
    partial = torch.empty(grid[2] * tokens * n_out if grid[2] > 1 else 0, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return partial, counters(grid[0] * grid[1], device, stream)


@lru_cache(maxsize=64)
def counters(count: int, device: torch.device, stream: int) -> Tensor:
    """Zeros that a kernel counts up and puts back, one set for each stream: no two launches share one."""
    return torch.zeros(count, dtype=torch.int32, device=device)
