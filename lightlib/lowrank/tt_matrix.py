"""A matrix as a tensor train: rows and columns are split into modes, and each core holds a mode of both.

Novikov, Podoprikhin, Osokin, Vetrov 2015, arXiv:1509.06569. Physics calls it a matrix product operator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from einops import einsum, rearrange
from torch import Tensor

from lightlib.lowrank.multilinear import joined
from lightlib.lowrank.tensor_train import full_ranks, train_numbers, tt_svd

ORDERS = ("left to right", "right to left")


@dataclass(frozen=True)
class TTMatrix:
    """W[(o, p, ...), (i, j, ...)] = G_1[:, o, i] G_2[:, p, j] ...; `cores` (r, out_k, in_k, r')."""

    cores: tuple[Tensor, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of the bonds, one less than there are cores."""
        return tuple(core.shape[3] for core in self.cores[:-1])

    @property
    def out_shape(self) -> tuple[int, ...]:
        return tuple(core.shape[1] for core in self.cores)

    @property
    def in_shape(self) -> tuple[int, ...]:
        return tuple(core.shape[2] for core in self.cores)

    @property
    def stored(self) -> int:
        """How many numbers it holds."""
        return sum(core.numel() for core in self.cores)

    def to_matrix(self) -> Tensor:
        """W (out, in), dense."""
        whole, *others = self.cores
        for core in others:
            whole = einsum(whole, core, "r rows columns s, s o i t -> r rows o columns i t")
            whole = rearrange(whole, "r rows o columns i t -> r (rows o) (columns i) t")
        return rearrange(whole, "1 rows columns 1 -> rows columns")

    def times(self, x: Tensor, order: str = ORDERS[0]) -> Tensor:
        """x W^T (..., out) of x (..., in), one core after another: W is never built."""
        flat = x.reshape(-1, x.shape[-1])
        y = left_to_right(self.cores, flat) if order == ORDERS[0] else right_to_left(self.cores, flat)
        return y.view(*x.shape[:-1], -1)


def left_to_right(cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """x (tokens, in) through the first core first: an input mode goes in, an output mode comes out."""
    state = x[:, None]  # (tokens and outputs so far, bond, inputs to come)
    for core in cores:
        state = rearrange(state, "t r (i rest) -> t r i rest", i=core.shape[2])
        state = einsum(state, core, "t r i rest, r o i s -> t o s rest")
        state = rearrange(state, "t o s rest -> (t o) s rest")
    return state.reshape(len(x), -1)


def right_to_left(cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """x (tokens, in) through the last core first."""
    state = x[:, :, None, None]  # (tokens, inputs to come, bond, outputs so far)
    for core in reversed(cores):
        state = rearrange(state, "t (rest i) s out -> t rest i s out", i=core.shape[2])
        state = einsum(state, core, "t rest i s out, r o i s -> t rest r o out")
        state = rearrange(state, "t rest r o out -> t rest r (o out)")
    return state.reshape(len(x), -1)


def tt_matrix(
    weight: Tensor,
    out_shape: Sequence[int],
    in_shape: Sequence[int],
    ranks: int | Sequence[int] | None = None,
    tolerance: float | None = None,
) -> TTMatrix:
    """`weight` (out, in) as a train, by the TT-SVD of its modes in pairs (out_k in_k). Limits as `tt_svd`'s.

    Raises ValueError where the shapes are not the weight's, or not as long as each other.
    """
    check_shapes(weight.shape, out_shape, in_shape)
    pairs = in_pairs(weight.reshape(*out_shape, *in_shape)).flatten(0)
    train = tt_svd(pairs.view(pair_sizes(out_shape, in_shape)), ranks, tolerance)
    cores = zip(train.cores, out_shape, strict=True)
    return TTMatrix(tuple(rearrange(core, "r (o i) s -> r o i s", o=o) for core, o in cores))


def in_pairs(tensor: Tensor) -> Tensor:
    """(out_1, out_2, ..., in_1, in_2, ...) as (out_1, in_1, out_2, in_2, ...)."""
    half = tensor.dim() // 2
    return tensor.permute(
        [mode for pair in zip(range(half), range(half, 2 * half), strict=True) for mode in pair]
    )


def pair_sizes(out_shape: Sequence[int], in_shape: Sequence[int]) -> tuple[int, ...]:
    """The modes of the train: out_k in_k."""
    return tuple(o * i for o, i in zip(out_shape, in_shape, strict=True))


def bonds(out_shape: Sequence[int], in_shape: Sequence[int], rank: int) -> tuple[int, ...]:
    """The ranks of a matrix of these shapes where none is larger than `rank`, nor than it needs."""
    return tuple(min(rank, full) for full in full_ranks(pair_sizes(out_shape, in_shape)))


def core_sizes(
    out_shape: Sequence[int], in_shape: Sequence[int], ranks: Sequence[int]
) -> list[tuple[int, ...]]:
    """(r, out_k, in_k, r') of each core."""
    ends = pairwise((1, *ranks, 1))
    return [(r, o, i, s) for o, i, (r, s) in zip(out_shape, in_shape, ends, strict=True)]


def rank_for(out_shape: Sequence[int], in_shape: Sequence[int], stored: int, name: str = "matrix") -> int:
    """The largest rank that all bonds may have where at most `stored` numbers are kept.

    Raises ValueError, which speaks of `name`, where not even ranks of 1 are few enough.

    >>> rank_for((8, 8, 9), (8, 8, 9), 265_000)
    63
    """
    sizes = pair_sizes(out_shape, in_shape)
    numbers = [
        train_numbers(sizes, bonds(out_shape, in_shape, r))
        for r in range(1, max(full_ranks(sizes), default=1) + 1)
    ]
    fitting = [rank for rank, n in enumerate(numbers, start=1) if n <= stored]
    if not fitting:
        raise ValueError(
            f"{name}: ({joined(out_shape)}) x ({joined(in_shape)}) takes {numbers[0]} numbers at rank 1, "
            f"{stored} may be stored; allow more of them, or split it into another number of modes"
        )
    return fitting[-1]


def check_shapes(shape: Sequence[int], out_shape: Sequence[int], in_shape: Sequence[int]) -> None:
    """Raise ValueError where a weight (out, in) is not of these modes."""
    if len(out_shape) != len(in_shape) or tuple(shape) != (math.prod(out_shape), math.prod(in_shape)):
        raise ValueError(
            f"a weight of {joined(shape)} is not ({joined(out_shape)}) x ({joined(in_shape)}): give as many "
            "modes for the outputs as for the inputs, whose products are the sizes"
        )
