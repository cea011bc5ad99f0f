"""Principal directions of a signal, and how many of them to keep.

Pearson 1901; as SliceGPT uses them: Ashkboos et al. 2024, arXiv:2401.15024.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightlib.slicing.invariance import UnitNorm


def principal_directions(gram: Tensor) -> tuple[Tensor, Tensor]:
    """(Q (d, d), shares (d)) of a gram matrix X^T X (d, d): its eigenvectors, largest first, and the share of
    |X|^2 that lies along each; float64. With no slicing, Q is a rotation that changes nothing.

    >>> principal_directions(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))[1]
    tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    values, vectors = torch.linalg.eigh(gram.double())
    values = values.flip(0).clamp_min(0)
    return vectors.flip(1), values / values.sum().clamp_min(1e-300)


def nearest_basis(Q1: Tensor, Q2: Tensor) -> tuple[Tensor, Tensor]:
    """Of all bases of the span of Q2 (d, k2) the one nearest to Q1 (d, k1 <= k2), and what keeps them apart.

    Both have orthonormal columns, float64. Returns Q (d, k2) and B (k1, d - k2) with Q1^T Q = [I - B B^T, 0]:
    the polar factor of Q1^T Q2 turns Q2; principal directions that both spans share need no column in B.
    Bjorck and Golub 1973, Mathematics of Computation 27, 579-594.
    """
    (d, k1), k2 = Q1.shape, Q2.shape[1]
    U, cosines, V_T = torch.linalg.svd(Q1.T @ Q2)
    Q = Q2 @ torch.cat((V_T[:k1].T @ U.T, V_T[k1:].T), dim=1)
    apart = slice(k1 - min(k1, d - k2), None)
    return Q, U[:, apart] * (1 - cosines[apart]).clamp_min(0).sqrt()


def kept_width(shares: Tensor, fraction: float, round_to: int, variance: float | None = None) -> int:
    """How many directions stay: all but a `fraction`, or as few as hold `variance`, in steps of `round_to`.

    >>> kept_width(torch.ones(576) / 576, 0.3, 8)
    400
    """
    width = len(shares)
    if variance is not None:
        needed = int((shares.cumsum(0) < variance).sum()) + 1
        return min(width, math.ceil(needed / round_to) * round_to)
    if fraction == 0:
        return width
    return max(round_to, int((1 - fraction) * width) // round_to * round_to)


def shares_of(signals: list[Tensor], normed: bool) -> Tensor:
    """The shares (d,) of |X|^2 along the principal directions of signals (batch, length, d)."""
    return principal_directions(gram_of(signals, normed))[1]


def gram_of(signals: list[Tensor], normed: bool) -> Tensor:
    """X^T X (d, d) in float64 of signals (batch, length, d), or of what a norm makes of them."""
    norm = UnitNorm(signals[0].shape[-1], 1e-6) if normed else nn.Identity()
    rows = (norm(x).flatten(0, -2).double() for x in signals)
    return sum(x.T @ x for x in rows)
