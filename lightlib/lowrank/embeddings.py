"""Embedding tables in fewer numbers: a product of two matrices, and a train of small tensors.

A table (vocabulary, width) is read row by row, so it is enough that a row can be made when it is asked for:
`forward(ids)` makes only these, `table()` all of them.
Tensor trains: Hrinchuk et al. 2020, Khrulkov et al. 2019, arXiv:1901.10787. Tensor products: kets.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightlib.lowrank.tensor_train import limits_of


@dataclass(frozen=True)
class Stored:
    """What an embedding keeps: numbers that learn, a LayerNorm's too, and indices, which do not."""

    numbers: int
    number_bytes: int
    index_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.number_bytes + self.index_bytes


def stored_in(embedding: nn.Module) -> Stored:
    """What the parameters and the buffers of `embedding` take."""
    weights = list(embedding.parameters())
    return Stored(
        sum(p.numel() for p in weights),
        sum(p.nbytes for p in weights),
        sum(buffer.nbytes for buffer in embedding.buffers()),
    )


class LowRankEmbedding(nn.Module):
    """Row i is codes[i] @ basis: (vocabulary, rank) times (rank, width). At rank = width any table fits in.

    std: of a row's entries at the start.
    """

    def __init__(self, vocabulary: int, width: int, rank: int, *, std: float = 1.0, generator=None):
        super().__init__()
        self.vocabulary, self.width, self.rank = vocabulary, width, rank
        self.codes = nn.Parameter(torch.empty(vocabulary, rank))
        self.basis = nn.Parameter(torch.empty(rank, width))
        nn.init.normal_(self.codes, generator=generator)
        nn.init.normal_(self.basis, std=std / math.sqrt(rank), generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.codes) @ self.basis  # (..., width)

    def table(self) -> Tensor:
        return self.codes @ self.basis  # (vocabulary, width)

    @property
    def stored(self) -> Stored:
        return stored_in(self)


class TTEmbedding(nn.Module):
    """Row i is a chain of small matrices, one from each core, chosen by the digits of i.

    The vocabulary is cut into `order` digits, the width too; core k is (v_k, r_(k-1), d_k, r_k). rank: all
    inner ranks, or one each; those that are larger than any table needs are lowered.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        rank: int | Sequence[int],
        order: int = 3,
        *,
        std: float = 1.0,
        generator=None,
    ):
        super().__init__()
        self.vocabulary, self.width = vocabulary, width
        self.rows, self.columns = near_equal(vocabulary, order), near_equal(width, order)
        sizes = [v * d for v, d in zip(self.rows, self.columns, strict=True)]
        self.ranks = (1, *limits_of(sizes, rank), 1)
        # what a chain sums up has the variance of its factors times the number of its terms
        each = (std**2 / math.prod(self.ranks)) ** (0.5 / order)
        shapes = zip(self.rows, self.ranks, self.columns, self.ranks[1:], strict=False)
        self.cores = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in shapes)
        for core in self.cores:
            nn.init.normal_(core, std=each, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        places = digits(ids, self.rows, self.vocabulary)
        rows = gather(self.cores[0], places[0]).squeeze(-3)  # (..., d_1, r_1)
        for core, place in zip(self.cores[1:], places[1:], strict=True):
            rows = torch.einsum("...ar,...rbs->...abs", rows, gather(core, place)).flatten(-3, -2)
        return rows.squeeze(-1)[..., : self.width]

    def table(self) -> Tensor:
        whole = self.cores[0].squeeze(1)  # (v_1, d_1, r_1)
        for core in self.cores[1:]:
            whole = torch.einsum("iar,jrbs->ijabs", whole, core).flatten(2, 3).flatten(0, 1)
        return whole[: self.vocabulary, : self.width, 0]

    @property
    def stored(self) -> Stored:
        return stored_in(self)


def gather(stacked: Tensor, places: Tensor) -> Tensor:
    """stacked[places]. The gradients of indexing are summed in any order, those of a lookup always in one."""
    return F.embedding(places, stacked.flatten(1)).unflatten(-1, stacked.shape[1:])


def root_up(total: int, order: int) -> int:
    """The least whole number whose power `order` is `total` or more.

    >>> root_up(30000, 4)
    14
    """
    root = round(total ** (1 / order))
    return root if root**order >= total else root + 1


def near_equal(total: int, order: int) -> tuple[int, ...]:
    """`order` sizes near to each other whose product is `total` or a little more.

    >>> near_equal(576, 3)
    (9, 8, 8)
    """
    sizes, rest = [], total
    for left in range(order, 0, -1):
        sizes.append(root_up(rest, left))
        rest = -(-rest // sizes[-1])
    return tuple(sizes)


def digits(ids: Tensor, sizes: Sequence[int], vocabulary: int) -> list[Tensor]:
    """The digits of `ids`, the first counting most: id = (d_1 s_2 + d_2) s_3 + d_3 for three sizes.

    Raises IndexError, as nn.Embedding does, for what is no id.
    """
    # on a GPU the host would have to wait for the answer
    if ids.device.type == "cpu" and ids.numel() and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise IndexError(f"ids from {ids.min()} to {ids.max()} in a vocabulary of {vocabulary}")
    found = []
    for size in reversed(sizes):
        found.append(ids % size)
        ids = ids // size
    return found[::-1]
