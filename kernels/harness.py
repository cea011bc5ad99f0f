"""Check first, then time: what the checks and benches of all operations share.

Times are medians of CUDA graphs that walk through enough copies of the weight to leave the L2 cache behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch import Tensor

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 6e-3}  # relative: the rounding of the output


@dataclass(frozen=True)
class Timed:
    """Microseconds of one call: the median, where a tenth and nine tenths of the runs lie, and by itself."""

    us: float
    p10_us: float
    p90_us: float
    launched_us: float  # one call from Python, its launch included


@dataclass(frozen=True)
class Limits:
    """What a device reached here: bytes read and written by a copy, a large dense product in bfloat16."""

    copy_gb_per_s: float
    matmul_tflop_per_s: float

    def floor_us(self, n_bytes: float, n_flop: float) -> float:
        """The least time that moving and computing can take."""
        return max(n_bytes / self.copy_gb_per_s / 1e3, n_flop / self.matmul_tflop_per_s / 1e6)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody has written holds NaN, so that what a kernel forgets shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def checked(where: str, y: Tensor, exact: Tensor, loose: float = 1) -> float:
    """The relative error of y. Raises AssertionError, naming `where`, beyond `loose` times its rounding."""
    error = ((y.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()
    allowed = loose * TOLERANCE[y.dtype]
    assert torch.isfinite(y).all() and error <= allowed, f"{where}: error {error:.2e}, allowed {allowed:.0e}"
    return error


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
    replayed = [microseconds(graph.replay) / len(calls) for _ in range(runs + 3)][3:]
    launched = [microseconds(call) for call in (calls * 2)[:20]]
    deciles = quantiles(replayed, n=10)
    return Timed(median(replayed), deciles[0], deciles[-1], median(launched))


def microseconds(work: Callable[[], object]) -> float:
    """The time of `work` between two events of the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)


def copies_beyond_cache(stored_bytes: int) -> int:
    """How many copies of so many bytes exceed the L2 cache four times: 20 at least, 64 at most."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(64, max(20, -(-4 * cache // stored_bytes)))


def limits() -> Limits:
    """Measure this device."""
    a, b = torch.empty(2, 2**28, dtype=torch.uint8, device="cuda")
    copy = 2 * a.nbytes / timed([lambda: b.copy_(a)] * 5).us / 1e3
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return Limits(copy, 2 * 8192**3 / timed([lambda: square @ square] * 3).us / 1e6)
