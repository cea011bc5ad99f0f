"""Check the sparse products against float64 at odd sizes, then time them beside cuBLAS, cuSPARSE and 2:4."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lightlib.kernels.harness import TOLERANCE, Limits, checked, copies_beyond_cache, poisoned, timed
from lightlib.kernels.sparse_matmul import op
from lightlib.kernels.sparse_matmul.dispatch import FEW
from lightlib.kernels.sparse_matmul.layouts import KINDS, Sparse, encode, tensors_of
from lightlib.kernels.sparse_matmul.reference import matmul

ODD = [(1, 8, 1), (130, 136, 2), (257, 520, 17), (384, 1096, 33), (1000, 2048, 64)]  # (out, in, tokens)


@dataclass(frozen=True)
class Row:
    """One product y = x W^T, W (out, in): a layout of ours, or "cuBLAS", "cuSPARSE CSR", "2:4"."""

    layout: str
    n_out: int
    n_in: int
    tokens: int
    sparsity: float
    stored_bytes: int
    us: float
    p10_us: float
    p90_us: float
    launched_us: float
    gb_per_s: float  # of stored bytes
    of_copy: float  # share of the bandwidth that a copy reaches
    of_roofline: float  # share of the speed that its bytes and products allow
    times_cublas: float


def pruned(
    n_out: int, n_in: int, sparsity: float, dtype: torch.dtype, seed: int, device: str, uneven: bool = False
) -> Tensor:
    """A random weight (out, in) with a share of zeros: at random places, or `uneven` ones.

    Uneven as Wanda's are: every row keeps as many weights, and inputs differ in strength, a few of them by
    much, so that some columns are full and others empty.
    """
    generator = torch.Generator(device).manual_seed(seed)
    W = torch.randn(n_out, n_in, generator=generator, device=device) / n_in**0.5
    if not uneven:
        return (W * (torch.rand(n_out, n_in, generator=generator, device=device) >= sparsity)).to(dtype)
    strength = torch.randn(n_in, generator=generator, device=device).mul(0.6).exp()
    strength[:: max(1, n_in // 16)] *= 20
    order = (W.abs() * strength).argsort(1)
    return W.scatter(1, order[:, : int(n_in * sparsity)], 0.0).to(dtype)


def check(layout: str, device: str = "cuda") -> float:
    """The largest relative error over odd sizes, zeros and types. Raises AssertionError beyond TOLERANCE."""
    worst = 0.0
    for i, (n_out, n_in, tokens) in enumerate(ODD):
        for sparsity, uneven in ((0.0, False), (0.5, True), (0.7, True), (0.9, False), (1.0, False)):
            for dtype in TOLERANCE:
                W = pruned(n_out, n_in, sparsity, dtype, i, device, uneven)
                x = torch.randn(tokens, n_in, device=device).to(dtype)
                held = encode(layout, W)
                with poisoned():
                    y = op.multiply(held, x)
                where = f"{layout} {n_out} x {n_in}, {tokens} tokens, {sparsity:.0%} zeros, {dtype}"
                worst = max(worst, checked(where, y, matmul(W, x)))
    return worst


def bench(
    n_out: int, n_in: int, sparsity: float, tokens: tuple[int, ...], limits: Limits, device: str = "cuda"
) -> Iterator[Row]:
    """Time a weight (out, in) in bfloat16 with uneven zeros in all layouts, beside what torch has."""
    W = pruned(n_out, n_in, sparsity, torch.bfloat16, 0, device, uneven=True)
    held = {name: encode(name, W) for name in KINDS}
    for n in tokens:
        x = torch.randn(n, n_in, device=device, dtype=torch.bfloat16)
        dense = [partial(F.linear, x, copy) for copy in copies(W)]
        row = partial(measured, n_out, n_in, n, sparsity, limits)
        yield (cublas := row("cuBLAS", W.nbytes, dense, None))
        for name, weight in held.items():
            if name != "ell" or n <= FEW:
                calls = [partial(op.multiply, copy, x) for copy in copies(weight)]
                yield row(name, weight.stored_bits() // 8, calls, cublas.us)
        yield from baselines(W, x, row, cublas.us)


def baselines(W: Tensor, x: Tensor, row: Callable, cublas_us: float) -> Iterator[Row]:
    """The same weight in cuSPARSE's CSR; and one with two zeros in four, if half of this one's are zeros."""
    others = {"cuSPARSE CSR": as_csr}
    if abs((W == 0).float().mean() - 0.5) < 0.01:
        others["2:4"] = as_two_of_four
    for name, made in others.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch calls both of them beta
                n_bytes, product = made(W, x)
                found = row(name, n_bytes, [product] * 20, cublas_us)
        except RuntimeError as error:  # a baseline that this device lacks must not stop ours
            print(f"{name} does not run here: {error}", flush=True)
        else:
            yield found


def as_csr(W: Tensor, x: Tensor) -> tuple[int, Callable]:
    """(bytes, the product) of W in torch's CSR."""
    csr = W.to_sparse_csr()
    return sum(t.nbytes for t in (csr.values(), csr.col_indices(), csr.crow_indices())), lambda: csr @ x.T


def as_two_of_four(W: Tensor, x: Tensor) -> tuple[int, Callable]:
    """(bytes, the product) of a weight as large as W with the last two of every four weights zero."""
    mask = torch.tensor([1, 1, 0, 0], device=W.device).bool().tile(W.shape[0], W.shape[1] // 4)
    half = torch.sparse.to_sparse_semi_structured(W.where(mask, torch.zeros_like(W)))
    return W.nbytes // 2 + W.numel() // 8, lambda: F.linear(x, half)


def copies(weight: Sparse | Tensor) -> list:
    """The weight as often as it takes to leave the cache behind."""
    if isinstance(weight, Tensor):
        return [weight.clone() for _ in range(copies_beyond_cache(weight.nbytes))]
    times = copies_beyond_cache(weight.stored_bits() // 8)
    return [replace(weight, **{k: t.clone() for k, t in tensors_of(weight).items()}) for _ in range(times)]


def measured(
    n_out: int, n_in: int, tokens: int, sparsity: float, limits: Limits,
    layout: str, stored: int, calls: list, cublas_us: float | None,
) -> Row:  # fmt: skip
    """One row; cublas_us: None where this is cuBLAS itself."""
    taken = timed(calls)
    moved = stored + 2 * tokens * (n_in + n_out)
    return Row(
        layout, n_out, n_in, tokens, sparsity, stored, **asdict(taken), gb_per_s=stored / taken.us / 1e3,
        of_copy=moved / taken.us / 1e3 / limits.copy_gb_per_s,
        of_roofline=limits.floor_us(moved, 2 * tokens * n_out * n_in) / taken.us,
        times_cublas=(cublas_us or taken.us) / taken.us,
    )  # fmt: skip
