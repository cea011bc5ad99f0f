"""Check first, then time: against float64 at odd sizes, then beside cuBLAS in the same process.

Times are medians of CUDA graphs that walk through enough copies of the weight to leave the L2 cache behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from torch import Tensor

from lightlib.kernels.sparse_matmul import bitmap, csl, op
from lightlib.kernels.sparse_matmul.reference import matmul

ODD = [(1, 8, 1), (130, 136, 5), (257, 520, 17), (384, 1096, 33), (1000, 2048, 64)]  # (out, in, tokens)
LAYOUTS = {"csl": csl, "bitmap": bitmap}
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 6e-3}  # relative: the rounding of the output


@dataclass(frozen=True)
class Timed:
    """Microseconds of one call: the median, and where a tenth and nine tenths of the runs lie."""

    us: float
    p10_us: float
    p90_us: float


@dataclass(frozen=True)
class Row:
    """One product y = x W^T, W (out, in): what it takes beside cuBLAS on the dense weight."""

    layout: str
    n_out: int
    n_in: int
    tokens: int
    sparsity: float
    stored_bytes: int
    us: float
    p10_us: float
    p90_us: float
    gb_per_s: float  # of stored bytes
    of_copy: float  # share of the bandwidth that a copy reaches
    of_roofline: float  # share of the speed that bytes and arithmetic allow
    cublas_us: float
    cublas_gb_per_s: float
    times_cublas: float


def pruned(n_out: int, n_in: int, sparsity: float, dtype: torch.dtype, seed: int, device: str) -> Tensor:
    """A random weight (out, in) with a share of zeros at random places."""
    generator = torch.Generator(device).manual_seed(seed)
    W = torch.randn(n_out, n_in, generator=generator, device=device) / n_in**0.5
    return (W * (torch.rand(n_out, n_in, generator=generator, device=device) >= sparsity)).to(dtype)


def packed(layout: str, W: Tensor) -> Callable[[Tensor], Tensor]:
    """The product with a weight (out, in) in "csl" or "bitmap"."""
    return partial(op.multiply, LAYOUTS[layout].encode(W))


def check(layout: str, device: str = "cuda") -> float:
    """The largest relative error over odd sizes, zeros and types. Raises AssertionError beyond TOLERANCE."""
    worst = 0.0
    for i, (n_out, n_in, tokens) in enumerate(ODD):
        for sparsity in (0.0, 0.5, 0.9, 1.0):
            for dtype, allowed in TOLERANCE.items():
                W = pruned(n_out, n_in, sparsity, dtype, i, device)
                x = torch.randn(tokens, n_in, device=device).to(dtype)
                y, exact = packed(layout, W)(x), matmul(W, x)
                error = ((y.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()
                where = f"{layout} {n_out} x {n_in}, {tokens} tokens, {sparsity:.0%} zeros, {dtype}"
                assert torch.isfinite(y).all() and error <= allowed, f"{where}: error {error:.2e}"
                worst = max(worst, error)
    return worst


def timed(calls: list[Callable[[], object]], runs: int = 50) -> Timed:
    """One call of `calls`, which are recorded one after the other and replayed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, and warms up
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for _ in range(runs + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / len(calls))
    deciles = quantiles(times[3:], n=10)
    return Timed(median(times[3:]), deciles[0], deciles[-1])


def copies_beyond_cache(stored_bytes: int) -> int:
    """How many copies of so many bytes exceed the L2 cache four times, 20 calls at least."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(20, -(-4 * cache // stored_bytes))


def copy_gb_per_s() -> float:
    """What a copy on this device reaches, reads and writes counted."""
    a, b = torch.empty(2, 2**28, dtype=torch.uint8, device="cuda")
    return 2 * a.nbytes / timed([lambda: b.copy_(a)] * 5).us / 1e3


def matmul_tflop_per_s() -> float:
    """What a large dense product in bfloat16 reaches."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / timed([lambda: a @ a] * 3).us / 1e6


def bench(
    layout: str, n_out: int, n_in: int, tokens: int, sparsity: float, copy_speed: float, matmul_speed: float
) -> Row:
    """Time one product in bfloat16 beside F.linear on the same dense weight. Speeds: GB/s, TFLOP/s."""
    W = pruned(n_out, n_in, sparsity, torch.bfloat16, 0, "cuda")
    x = torch.randn(tokens, n_in, device="cuda", dtype=torch.bfloat16)
    held = LAYOUTS[layout].encode(W)
    stored = held.stored_bits() // 8
    copies = [replace(held, words=held.words.clone()) for _ in range(min(copies_beyond_cache(stored), 64))]
    ours = timed([partial(op.multiply, copy, x) for copy in copies])
    del copies
    dense = [W.clone() for _ in range(min(copies_beyond_cache(W.nbytes), 64))]
    cublas = timed([partial(F.linear, x, W) for W in dense])
    moved = stored + x.nbytes + 2 * tokens * n_out
    floor_us = max(moved / copy_speed / 1e3, 2 * tokens * n_out * n_in / matmul_speed / 1e6)
    return Row(
        layout, n_out, n_in, tokens, sparsity, stored, **asdict(ours), gb_per_s=stored / ours.us / 1e3,
        of_copy=moved / ours.us / 1e3 / copy_speed, of_roofline=floor_us / ours.us, cublas_us=cublas.us,
        cublas_gb_per_s=W.nbytes / cublas.us / 1e3, times_cublas=cublas.us / ours.us,
    )  # fmt: skip
