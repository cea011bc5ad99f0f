"""Check attention against float64 at odd sizes, then time it beside torch's scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lightlib.kernels.flash_attention import op
from lightlib.kernels.flash_attention.reference import attention
from lightlib.kernels.harness import TOLERANCE, Limits, checked, poisoned, timed

ODD = [(1, 2, 2, 5, 5, 64), (2, 6, 2, 33, 70, 64), (1, 4, 1, 130, 257, 128), (1, 3, 3, 1, 1, 80)]
SHAPES = {  # (batch, heads, kv heads, queries, keys, head_dim)
    "prefill, 2048 tokens": (1, 32, 8, 2048, 2048, 128),
    "prefill, 8192 tokens": (1, 32, 8, 8192, 8192, 128),
    "decode, 8192 keys": (1, 32, 8, 1, 8192, 128),
    "decode, 32768 keys": (1, 32, 8, 1, 32768, 128),
    "decode, 8 x 8192 keys": (8, 32, 8, 1, 8192, 128),
}
LOOSE = 2  # the weights of the values are rounded to 16 bits as well


@dataclass(frozen=True)
class Row:
    """Causal attention in bfloat16, ours or "SDPA". FLOPs: of what is seen. Bytes: of all four tensors."""

    kernel: str
    name: str
    shape: tuple[int, ...]
    us: float
    p10_us: float
    p90_us: float
    launched_us: float
    tflop_per_s: float
    gb_per_s: float
    of_roofline: float
    times_sdpa: float


def made(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, T, D), k and v (B, K, S, D)."""
    B, H, K, T, S, D = shape
    sizes = (B, H, T, D), (B, K, S, D), (B, K, S, D)
    return tuple(torch.randn(size, device=device).to(dtype) for size in sizes)


def check(device: str = "cuda") -> float:
    """The largest relative error over odd sizes and types. Raises AssertionError beyond TOLERANCE."""
    worst = 0.0
    for shape in ODD:
        for dtype in TOLERANCE:
            q, k, v = made(shape, dtype, device)
            for causal in (True, False):
                with poisoned():
                    y = op.attention(q, k, v, causal)
                where = f"attention {shape}, causal {causal}, {dtype}"
                worst = max(worst, checked(where, y, attention(q, k, v, causal), LOOSE))
            with poisoned():
                y = op.decode(q[:, :, -1:], k, v)
            worst = max(worst, checked(f"decode {shape}, {dtype}", y, attention(q[:, :, -1:], k, v), LOOSE))
    return worst


def bench(limits: Limits, device: str = "cuda") -> Iterator[Row]:
    """Time all SHAPES."""
    for name, shape in SHAPES.items():
        B, H, K, T, S, D = shape
        q, k, v = made(shape, torch.bfloat16, device)
        ours = partial(op.decode, q, k, v) if T == 1 else partial(op.attention, q, k, v, True)
        sdpa = partial(F.scaled_dot_product_attention, q, k, v, is_causal=T > 1, enable_gqa=True)
        flop = 4 * B * H * T * S * D / (2 if T > 1 else 1)
        moved = 2 * B * D * (2 * H * T + 2 * K * S)
        theirs = timed([sdpa] * 4, runs=20)
        for kernel, taken in (("SDPA", theirs), ("ours", timed([ours] * 4, runs=20))):
            yield Row(
                kernel, name, shape, taken.us, taken.p10_us, taken.p90_us, taken.launched_us,
                tflop_per_s=flop / taken.us / 1e6, gb_per_s=moved / taken.us / 1e3,
                of_roofline=limits.floor_us(moved, flop) / taken.us, times_sdpa=theirs.us / taken.us,
            )  # fmt: skip
