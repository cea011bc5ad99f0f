"""Tensors as matrices and back: what every tensor decomposition is made of.

Kolda and Bader 2009, SIAM Review 51(3), 455-500.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from einops import einsum
from torch import Tensor


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """The fibres of one mode as columns: (n_mode, rest), the other modes in their order, the last fastest.

    tensorly's order; Kolda and Bader count the first one fastest.
    """
    return tensor.movedim(mode, 0).flatten(1)


def fold(matrix: Tensor, mode: int, shape: Sequence[int]) -> Tensor:
    """The tensor of this shape whose unfolding is `matrix` (n_mode, rest).

    >>> T = torch.arange(24).view(2, 3, 4)
    >>> torch.equal(fold(unfold(T, 1), 1, T.shape), T)
    True
    """
    rest = [n for k, n in enumerate(shape) if k != mode]
    return matrix.reshape(shape[mode], *rest).movedim(0, mode)


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Each fibre of one mode times `matrix` (m, n_mode): the mode gets m entries, the others stay."""
    return einsum(tensor.movedim(mode, -1), matrix, "... n, m n -> ... m").movedim(-1, mode)


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """(n_1 n_2 ..., r) of factors (n_k, r): column by column the Kronecker product, the last one fastest."""
    product, *others = factors
    for factor in others:
        product = einsum(product, factor, "n r, m r -> n m r").flatten(0, 1)
    return product


def leading(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal columns (n, rank): the left singular vectors of `matrix` (n, m), the largest first."""
    n, m = matrix.shape
    if m > n:  # the gram is smaller, and in float64 it is exact enough
        return torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(-1)[:, :rank]
    return torch.linalg.svd(matrix, full_matrices=rank > m).U[:, :rank]


def distance(before: Tensor, after: Tensor) -> float:
    """||before - after|| / ||before||, in float64."""
    gone = before.double() - after.double()
    return (gone.norm() / before.double().norm().clamp_min(1e-300)).item()


@cache
def factor(n: int, parts: int) -> tuple[int, ...]:
    """`parts` integers, rising, whose product is n and whose sum is least: as near each other as can be.

    A prime has no other than itself, so ones fill up. Raises ValueError where n or parts is below 1.

    >>> factor(1536, 3), factor(7, 2)
    ((8, 12, 16), (1, 7))
    """
    if n < 1 or parts < 1:
        raise ValueError(f"factor({n}, {parts}): both must be at least 1")
    if parts == 1:
        return (n,)
    smallest = (d for d in range(1, round(n ** (1 / parts)) + 1) if n % d == 0)  # one of them is no larger
    return min((tuple(sorted((d, *factor(n // d, parts - 1)))) for d in smallest), key=sum)


def joined(shape: Sequence[int]) -> str:
    """(8, 12, 16) as "8 x 12 x 16"."""
    return " x ".join(map(str, shape))
