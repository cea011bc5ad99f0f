"""What pictures are compared by: principal components, and the Frechet distance of two sets of features."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Eigenfaces:
    """Principal components of pictures: their mean (rows, columns) and directions (k, pixels) of norm 1."""

    mean: Tensor
    directions: Tensor

    def encode(self, pictures: Tensor) -> Tensor:
        """(n, rows, columns) -> (n, k)."""
        return (pictures - self.mean).flatten(1) @ self.directions.T

    def decode(self, codes: Tensor) -> Tensor:
        """(n, k) -> (n, rows, columns)."""
        return self.mean + (codes @ self.directions).unflatten(1, self.mean.shape)


def eigenfaces(pictures: Tensor, k: int) -> Eigenfaces:
    """The first k principal components of pictures (n, rows, columns). Turk & Pentland 1991."""
    if not 1 <= k < len(pictures):
        raise ValueError(f"k={k}: {len(pictures)} pictures have 1 to {len(pictures) - 1} components")
    mean = pictures.mean(0)
    _, _, directions = torch.linalg.svd((pictures - mean).flatten(1), full_matrices=False)
    return Eigenfaces(mean, directions[:k])


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to a (n, k) and b (m, k): 0 where mean and covariance agree.

    |mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2)), in squared units of the features; small samples make it
    large. With features of an Inception network it is the FID of Heusel et al. 2017, arXiv:1706.08500; with
    other features, such as principal components, it is no FID and compares with none.
    """
    if min(a.dim(), b.dim()) < 2 or a.shape[1:] != b.shape[1:] or min(len(a), len(b)) < 2:
        raise ValueError(f"features are {tuple(a.shape)} and {tuple(b.shape)}: give (n, k), (m, k), n, m > 1")
    means = a.mean(0).double(), b.mean(0).double()
    A, B = ((s.double() - m) / math.sqrt(len(s) - 1) for s, m in zip((a, b), means, strict=True))
    # C = A^T A and C' = B^T B: the root's trace is the sum of the singular values of A B^T
    root = torch.linalg.svdvals(A @ B.T).sum()
    spread = A.square().sum() + B.square().sum() - 2 * root
    return ((means[0] - means[1]).square().sum() + spread).item()
