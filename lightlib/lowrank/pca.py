"""PCA: the directions along which a cloud of points varies most.

Pearson 1901, Philosophical Magazine 2(11), 559-572; Hotelling 1933.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PCA:
    """Of points (n, d): their mean (d), orthonormal directions (k, d), the variance along each (k), largest
    first, and the sum of all variances, those of directions left out included."""

    mean: Tensor
    directions: Tensor
    variance: Tensor
    total: float

    @property
    def explained(self) -> Tensor:
        """The share of all variance that the first 1, 2, ... k directions hold (k)."""
        return self.variance.cumsum(0) / max(self.total, 1e-300)

    def project(self, points: Tensor) -> Tensor:
        """The coordinates (n, k) of points (n, d)."""
        return (points.to(self.mean) - self.mean) @ self.directions.T

    def rebuild(self, coordinates: Tensor) -> Tensor:
        """The points (n, d) at coordinates (n, k)."""
        return coordinates @ self.directions + self.mean


def pca(points: Tensor, k: int | None = None, *, center: bool = True) -> PCA:
    """The `k` main directions of points (n, d), all of them by default; float64.

    center: about their mean, or else about zero, as the gram of a layer's inputs has it. With all directions
    nothing is lost. Raises ValueError for points of another shape and for more directions than dimensions.
    """
    if points.dim() != 2 or not len(points):
        raise ValueError(f"points have shape {tuple(points.shape)}, not (n, d)")
    n, d = points.shape
    k = d if k is None else k
    if not 0 < k <= d:
        raise ValueError(f"k={k}: {d} dimensions have from 1 to {d} directions")
    X = points.double()
    mean = X.mean(0) if center else torch.zeros_like(X[0])
    values, vectors = torch.linalg.eigh((X - mean).T @ (X - mean) / n)
    variance = values.flip(0).clamp_min(0)
    return PCA(mean, vectors.flip(1).T[:k], variance[:k], variance.sum().item())
