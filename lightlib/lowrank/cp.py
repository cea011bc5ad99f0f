"""CP: a tensor as a sum of outer products, one vector for each mode in each term.

Carroll and Chang 1970, Psychometrika 35(3), 283-319; Harshman 1970, UCLA Working Papers in Phonetics 16;
Kolda and Bader 2009, SIAM Review 51(3), 455-500.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum, reduce
from torch import Tensor

from lightlib.lowrank.multilinear import joined, khatri_rao, leading, unfold

RIDGE = 1e-12  # the least part of a column that the others do not explain, squared


@dataclass(frozen=True)
class CP:
    """T = sum over r of weights[r] a_r o b_r o ..., the columns of `factors` (n_k, rank), each of length 1.

    errors: ||T - CP|| / ||T|| at the start and after each sweep that found it.
    """

    weights: Tensor
    factors: tuple[Tensor, ...]
    errors: tuple[float, ...] = ()

    @property
    def rank(self) -> int:
        return len(self.weights)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(A) for A in self.factors)

    @property
    def stored(self) -> int:
        """How many numbers it holds."""
        return self.weights.numel() + sum(A.numel() for A in self.factors)

    def to_tensor(self) -> Tensor:
        """The tensor itself, dense."""
        first, *others = self.factors
        return (first * self.weights @ khatri_rao(others).T).view(self.shape)


def als(
    tensor: Tensor,
    rank: int,
    sweeps: int = 100,
    tolerance: float = 1e-8,
    seed: int = 0,
    start: Sequence[Tensor] | None = None,
) -> CP:
    """One mode's factor at a time, by least squares for the others as they are: the error never grows.

    Begins at `start`, factors (n_k, rank), or at the leading singular vectors of the unfoldings, with random
    columns from `seed` where a mode has too few. Ends after `sweeps`, or when the error falls by less than
    `tolerance`. It may end beside the best. Raises ValueError for a tensor that has less than two modes, or
    is not finite.
    """
    if tensor.dim() < 2 or rank < 1:
        raise ValueError(
            f"rank {rank} of a tensor of shape {joined(tensor.shape)}: at least two modes, rank 1"
        )
    if not tensor.isfinite().all():
        raise ValueError(f"the tensor of shape {joined(tensor.shape)} holds numbers that are not finite")
    T = tensor.double()
    factors = [A.double() for A in start or first_factors(T, rank, seed)]
    factors = [A / lengths(A) for A in factors]
    grams = [A.T @ A for A in factors]
    weights = fitted_weights(T, factors, grams)
    errors = [error(T, weights, factors, grams, times_khatri_rao(T, factors, 0), 0)]
    for _ in range(sweeps):
        for mode in range(T.dim()):
            projected = times_khatri_rao(T, factors, mode)  # (n_mode, rank)
            A = solve(others_gram(grams, mode), projected)
            weights = lengths(A)
            factors[mode] = A / weights
            grams[mode] = factors[mode].T @ factors[mode]
        errors.append(error(T, weights, factors, grams, projected, mode))
        if errors[-2] - errors[-1] < tolerance:
            break
    factors = tuple(A.to(tensor.dtype) for A in factors)
    return CP(weights.to(tensor.dtype), factors, tuple(errors))


def first_factors(tensor: Tensor, rank: int, seed: int) -> list[Tensor]:
    """The leading left singular vectors of each unfolding (n_k, rank), random columns after the last one."""
    generator = torch.Generator().manual_seed(seed)
    factors = []
    for mode, n in enumerate(tensor.shape):
        U = leading(unfold(tensor, mode), min(rank, n))
        more = torch.randn(n, rank - U.shape[1], generator=generator, dtype=torch.float64)
        factors.append(torch.cat([U, more.to(U.device)], dim=1))
    return factors


def times_khatri_rao(tensor: Tensor, factors: Sequence[Tensor], mode: int) -> Tensor:
    """unfold(tensor, mode) @ khatri_rao(the other factors), (n_mode, rank), without building the second.

    The longest of the other modes goes first, so that what is left in between is as small as can be.
    """
    first, *others = sorted((k for k in range(tensor.dim()) if k != mode), key=lambda k: -tensor.shape[k])
    left = [k for k in range(tensor.dim()) if k != first]
    state = einsum(tensor.movedim(first, -1), factors[first], "... n, n r -> ... r")
    for k in others:
        state = einsum(state.movedim(left.index(k), -2), factors[k], "... n r, n r -> ... r")
        left.remove(k)
    return state


def others_gram(grams: Sequence[Tensor], mode: int) -> Tensor:
    """The gram (rank, rank) of the Khatri-Rao product of all factors but one: their grams, entry by entry."""
    others = torch.stack([gram for k, gram in enumerate(grams) if k != mode])
    return reduce(others, "k r s -> r s", "prod")


def solve(gram: Tensor, right: Tensor) -> Tensor:
    """The X (n, r) with X gram = right, for a gram of columns of length 1 at most.

    Where columns are nearly alike, a ridge keeps X from growing.
    """
    ridge, eye = 0.0, torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    while True:
        L, failed = torch.linalg.cholesky_ex(gram + ridge * eye)
        if not failed and (ridge or L.diagonal().min().square() > RIDGE):
            return torch.cholesky_solve(right.T, L).T
        ridge = max(10 * ridge, RIDGE)


def lengths(factor: Tensor) -> Tensor:
    """The length of each column (rank); never 0."""
    return factor.norm(dim=0).clamp_min(1e-300)


def fitted_weights(tensor: Tensor, factors: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
    """The weights (rank) that fit best to these factors."""
    right = (times_khatri_rao(tensor, factors, 0) * factors[0]).sum(0)
    return solve(others_gram(grams, 0) * grams[0], right[None])[0]


def error(tensor: Tensor, weights: Tensor, factors, grams, projected: Tensor, mode: int) -> float:
    """||T - CP|| / ||T|| from what the last step knows: ||T||^2 - 2 <T, CP> + ||CP||^2."""
    whole = tensor.square().sum()
    inside = (projected * factors[mode]).sum(0) @ weights
    square = weights @ (others_gram(grams, mode) * grams[mode]) @ weights
    return ((whole - 2 * inside + square).clamp_min(0) / whole.clamp_min(1e-300)).sqrt().item()
