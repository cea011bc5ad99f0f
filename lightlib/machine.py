"""The measured roofline of the present device: how fast it moves bytes, multiplies, starts an operation."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lightlib.report import facts_table


@dataclass(frozen=True)
class Roofline:
    """copy: bytes read plus written; read: bytes summed up; matmul: a large product in `dtype`."""

    copy_gb_per_s: float
    read_gb_per_s: float
    matmul_gflop_per_s: float
    dispatch_us: float  # time of one elementwise operation on a single number
    device: str
    dtype: str

    @property
    def bandwidth(self) -> float:
        """GB/s at which weights can reach the processor: the better of copying and reading."""
        return max(self.copy_gb_per_s, self.read_gb_per_s)

    @property
    def balance(self) -> float:
        """FLOPs a byte at which moving and multiplying take equally long."""
        return self.matmul_gflop_per_s / self.bandwidth

    def floor_ms(self, n_bytes: float, n_flops: float) -> float:
        """The least time that moving `n_bytes` and computing `n_flops` can take (Williams et al. 2009)."""
        return max(n_bytes / self.bandwidth, n_flops / self.matmul_gflop_per_s) / 1e6

    def _repr_html_(self) -> str:
        return facts_table(self, ("copy_gb_per_s", "read_gb_per_s"))


def roofline(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Roofline:
    """Measure `device` once a process, in about a second."""
    return _roofline(str(device), dtype, torch.get_num_threads())


@functools.cache
def _roofline(device: str, dtype: torch.dtype, threads: int) -> Roofline:
    n = 2**27  # beyond any cache
    source, target = (
        torch.zeros(n, dtype=torch.uint8, device=device),
        torch.empty(n, dtype=torch.uint8, device=device),
    )
    numbers = source.view(torch.float32)
    one = torch.ones(1, device=device)
    return Roofline(
        copy_gb_per_s=2 * n / seconds(lambda: target.copy_(source), device) / 1e9,
        read_gb_per_s=n / seconds(numbers.sum, device) / 1e9,
        matmul_gflop_per_s=matmul_rate(device, dtype),
        dispatch_us=seconds(lambda: [one.add_(0) for _ in range(100)], device) * 1e4,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
    )


@functools.cache
def matmul_rate(device: str, dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of a large square product."""
    side = 8192 if torch.device(device).type == "cuda" else 1024
    square = torch.ones(side, side, dtype=dtype, device=device)
    return 2 * side**3 / seconds(lambda: square @ square, device) / 1e9


def seconds(work: Callable[[], object], device: str | torch.device = "cpu", repeats: int = 7) -> float:
    """Median time of `work`, after two runs that warm up."""
    cuda = torch.device(device).type == "cuda"
    times = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for thousands of small steps in a row: several would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
