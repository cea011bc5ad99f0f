"""Tensor train: a chain of cores with three modes, each holding one mode of the tensor and two bonds.

Oseledets 2011, SIAM J. Sci. Comput. 33(5), 2295-2317. Physics calls it a matrix product state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from einops import einsum, rearrange
from torch import Tensor

from lightlib.lowrank.multilinear import joined


@dataclass(frozen=True)
class TensorTrain:
    """T[i, j, ...] = G_1[:, i] G_2[:, j] ..., a product of matrices.

    cores: (r, n, r'), the first r and the last r' being 1.
    """

    cores: tuple[Tensor, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of the bonds, one less than there are cores."""
        return tuple(core.shape[2] for core in self.cores[:-1])

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(core.shape[1] for core in self.cores)

    @property
    def stored(self) -> int:
        """How many numbers it holds."""
        return sum(core.numel() for core in self.cores)

    def to_tensor(self) -> Tensor:
        """The tensor itself, dense."""
        whole, *others = self.cores
        for core in others:
            whole = einsum(whole, core, "r left s, s n t -> r left n t")
            whole = rearrange(whole, "r left n t -> r (left n) t")
        return whole.reshape(self.shape)


def tt_svd(
    tensor: Tensor, ranks: int | Sequence[int] | None = None, tolerance: float | None = None
) -> TensorTrain:
    """Cut one mode off after the other, by an SVD of what is left. Without a limit it is exact.

    ranks: the most that the bonds may have, one for all or one for each. tolerance: ||T - TT|| is at most
    this share of ||T||. With ranks the error is at most sqrt(d - 1) times the best of these ranks.
    Raises ValueError for ranks that do not fit.
    """
    limits = limits_of(tensor.shape, ranks)
    rest = tensor.double()
    allowed = None if tolerance is None else tolerance * rest.norm() / math.sqrt(max(1, len(limits)))
    cores, before = [], 1
    for n, limit in zip(tensor.shape[:-1], limits, strict=True):
        U, S, Vh = cut(rest.reshape(before * n, -1), limit, allowed)
        cores.append(rearrange(U, "(r n) s -> r n s", n=n))
        rest, before = S[:, None] * Vh, len(S)
    cores.append(rest.reshape(before, -1, 1))
    return TensorTrain(tuple(core.to(tensor.dtype) for core in cores))


def rounded(
    train: TensorTrain, ranks: int | Sequence[int] | None = None, tolerance: float | None = None
) -> TensorTrain:
    """The train with smaller bonds, as `tt_svd` of its tensor would find it, which is never built.

    From right to left each core's rows are made orthonormal, so that what is cut from left to right is cut
    from the whole tensor. Raises ValueError for ranks that do not fit.
    """
    limits = limits_of(train.shape, ranks)
    dtype, cores = train.cores[0].dtype, [core.double() for core in train.cores]
    for k in range(len(cores) - 1, 0, -1):
        Q, R = torch.linalg.qr(rearrange(cores[k], "r n s -> (n s) r"))
        cores[k] = rearrange(Q, "(n s) r -> r n s", n=train.shape[k])
        cores[k - 1] = einsum(cores[k - 1], R, "r n s, t s -> r n t")
    allowed = None if tolerance is None else tolerance * cores[0].norm() / math.sqrt(max(1, len(limits)))
    for k, limit in enumerate(limits):
        U, S, Vh = cut(rearrange(cores[k], "r n s -> (r n) s"), limit, allowed)
        cores[k] = rearrange(U, "(r n) s -> r n s", n=train.shape[k])
        cores[k + 1] = einsum(S[:, None] * Vh, cores[k + 1], "r s, s n t -> r n t")
    return TensorTrain(tuple(core.to(dtype) for core in cores))


def added(a: TensorTrain, b: TensorTrain) -> TensorTrain:
    """The train of the sum: its bonds are as large as both together, until `rounded` shrinks them."""
    if a.shape != b.shape:
        raise ValueError(f"a train of {joined(a.shape)} and one of {joined(b.shape)} have no sum")
    pairs = list(zip(a.cores, b.cores, strict=True))
    if len(pairs) == 1:
        return TensorTrain((a.cores[0] + b.cores[0],))
    first = torch.cat(pairs[0], dim=2)
    between = [side_by_side(A, B) for A, B in pairs[1:-1]]
    return TensorTrain((first, *between, torch.cat(pairs[-1], dim=0)))


def side_by_side(A: Tensor, B: Tensor) -> Tensor:
    """A core (r + r', n, s + s') with A and B in its corners, zeros beside them."""
    core = A.new_zeros(len(A) + len(B), A.shape[1], A.shape[2] + B.shape[2])
    core[: len(A), :, : A.shape[2]], core[len(A) :, :, A.shape[2] :] = A, B
    return core


def cut(matrix: Tensor, rank: int, allowed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V^T of the matrix at the least rank whose error is `allowed`, and at no more than `rank`."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    if allowed is not None:
        tails = S.square().flip(0).cumsum(0).flip(0).sqrt()  # the error of keeping all before this one
        rank = min(rank, max(1, int((tails > allowed).sum())))
    return U[:, :rank], S[:rank], Vh[:rank]


def full_ranks(shape: Sequence[int]) -> tuple[int, ...]:
    """The ranks at which a train of this shape holds any tensor: the smaller side of each bond's cut."""
    sides = [math.prod(shape[:k]) for k in range(len(shape) + 1)]
    return tuple(min(left, sides[-1] // left) for left in sides[1:-1])


def limits_of(shape: Sequence[int], ranks: int | Sequence[int] | None) -> tuple[int, ...]:
    """The most that each bond may have. Raises ValueError where ranks are below 1 or not one a bond."""
    full = full_ranks(shape)
    wanted = full if ranks is None else (ranks,) * len(full) if isinstance(ranks, int) else tuple(ranks)
    if len(wanted) != len(full) or any(r < 1 for r in wanted):
        raise ValueError(f"ranks={ranks}: {joined(shape)} has {len(full)} bonds, each of rank 1 or more")
    return tuple(map(min, wanted, full))


def train_numbers(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """How many numbers a train of this shape takes at these ranks."""
    bonds = pairwise((1, *ranks, 1))
    return sum(r * n * s for n, (r, s) in zip(shape, bonds, strict=True))
