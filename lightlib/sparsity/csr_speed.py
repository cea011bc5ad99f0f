"""From which share of zeros on a CSR product beats a dense one: measured here, for one token in float32."""

from __future__ import annotations

from functools import lru_cache

import torch

from lightlib.machine import seconds
from lightlib.sparsity.layouts import encode


@lru_cache(maxsize=256)
def csr_gain(n_out: int, n_in: int, density: float, threads: int) -> float:
    """How many times as fast as a dense product a CSR one is with `threads`, torch's number of them now."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(n_out, n_in, generator=generator)
    mask = torch.rand(n_out, n_in, generator=generator) < density
    sparse, x = encode(W, mask, "csr"), torch.randn(1, n_in, generator=generator)
    return seconds(lambda: x @ W.T, repeats=25) / seconds(lambda: sparse.times(x), repeats=25)


@lru_cache(maxsize=256)
def csr_pays_from(n_out: int, n_in: int, threads: int) -> float:
    """The share of zeros from which on CSR is the faster one, to 1.6%: half of it is sought, six times."""
    low, high = 0.0, 1.0  # densities: where it pays, and where it does not
    for _ in range(6):
        middle = (low + high) / 2
        if csr_gain(n_out, n_in, middle, threads) >= 1:
            low = middle
        else:
            high = middle
    return 1 - low
