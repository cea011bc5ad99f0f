"""Low rank: a matrix as two thin ones, which keep the directions in which most of its outputs lie.

Eckart & Young 1936, Psychometrika 1; weighed by the inputs as in SVD-LLM, Wang et al. 2024, arXiv:2403.07378,
or by their norms as in ASVD, Yuan et al. 2023, arXiv:2312.05821. Pivots: Zhao et al. 2025, arXiv:2501.19090.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightlib.calibration import Gram, stream_blocks
from lightlib.change import changing, remember
from lightlib.decoder import check_linears
from lightlib.low_rank import FACTORIZE
from lightlib.lowrank.linear import low_rank_linear
from lightlib.lowrank.ranks import chosen, fraction_for, rank_for_energy, stored
from lightlib.report import Compressed, Report

WEIGHINGS = ("gram", "norm", None)


@dataclass(frozen=True)
class LowRank:
    """A matrix (out, in) as expand @ reduce: reduce (rank, in) and expand (out, rank).

    Pivoted, `rank` of its rows are those of `reduce`, and expand (out - rank, rank) makes the others; `order`
    (out) says where each row lies among both.
    """

    reduce: Tensor
    expand: Tensor
    order: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.reduce)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.expand) + (0 if self.order is None else self.rank), self.reduce.shape[1]

    @property
    def stored(self) -> int:
        """How many weights it stores."""
        return self.reduce.numel() + self.expand.numel()

    def to_tensor(self) -> Tensor:
        """The matrix (out, in)."""
        W = self.expand @ self.reduce
        return W if self.order is None else torch.cat([self.reduce, W])[self.order]


def output_directions(weight: Tensor, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(U (out, n), energy (n)): orthonormal directions of the outputs W x, and how much of them lies along
    each, largest first; n = min(out, in), float64.

    gram: X^T X (in, in) of the inputs, or their sums of squares alone (in,); without it all inputs are alike,
    and these are the left singular vectors and squared singular values of `weight` (out, in).
    """
    W, gram = weight.detach().double(), None if gram is None else gram.double()
    if gram is not None and gram.dim() == 1:
        W, gram = W * gram.clamp_min(0).sqrt(), None
    if len(W) <= W.shape[1]:
        energy, U = torch.linalg.eigh(W @ W.T if gram is None else W @ gram @ W.T)
        return U.flip(1), energy.flip(0).clamp_min(0)
    # a tall matrix has no more directions than inputs: it is less work to find them there
    Y = W if gram is None else W @ root(gram)
    energy, V = torch.linalg.eigh(Y.T @ Y)
    return torch.linalg.qr(Y @ V.flip(1)).Q, energy.flip(0).clamp_min(0)


def root(gram: Tensor) -> Tensor:
    """S (in, in) with S S^T the gram, which is taken to have no direction of zero."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp_min(1e-14 * values[-1]).sqrt()


def low_rank(weight: Tensor, rank: int, gram: Tensor | None = None, *, pivot: bool = True) -> LowRank:
    """The matrix W' of this rank with the least ||(W - W')X||: W projected on the outputs' main directions.

    Truncating the SVD of W S, where S S^T is the gram, gives U U^T W S, so W' = U U^T W: no inverse of S is
    needed. pivot: name r rows of W' itself and make the others of them, which takes r^2 weights less and
    loses nothing. At full rank W' is W.
    """
    return projected(weight, output_directions(weight, gram)[0][:, :rank], pivot)


def projected(weight: Tensor, U: Tensor, pivot: bool) -> LowRank:
    """`weight` (out, in) within the span of orthonormal U (out, rank)."""
    W, rank = weight.detach().double(), U.shape[1]
    if not pivot:
        return LowRank((U.T @ W).to(weight.dtype), U.to(weight.dtype))
    # elimination with row pivots finds rows of U that span all others, none of them by much more than 1
    P, L, _ = torch.linalg.lu(U)
    rows = P.argmax(0)  # the row of U that comes in each place
    expand = torch.linalg.solve_triangular(L[:rank], L[rank:], upper=False, left=False, unitriangular=True)
    reduce = U[rows[:rank]] @ (U.T @ W)
    return LowRank(reduce.to(weight.dtype), expand.to(weight.dtype), rows.argsort())


def svd(
    model: nn.Module,
    batches: list[Tensor] | None = None,
    *,
    fraction: float | None = None,
    rank: int | Mapping[str, int] | None = None,
    energy: float | None = None,
    budget_bytes: float | None = None,
    round_to: int = 1,
    weighing: str | None = "gram",
    pivot: bool = True,
    device=None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """Factorize the blocks' linear layers; the embedding and the head stay as they are.

    One of: fraction (0.2 if none is given), the share of each layer's weights that goes; rank, one for all
    layers or {layer: rank}; energy, the share of its outputs' sum of squares that each layer keeps;
    budget_bytes, what the whole model may take in a file. round_to: ranks are multiples of it, the next ones
    below, so that groups of this size fit when the factors are rounded next. weighing: errors count by the
    inputs' "gram", by the "norm" of each, or all alike (None, which needs no batches). pivot: see `low_rank`;
    fewer weights, but outputs that have to be put in order, so that two plain factors may be faster. A layer
    that would not become smaller stays as it is. What comes out are nn.Linear, to be rounded, pruned or
    trained next.
    Raises ValueError for settings that do not fit.
    """
    given = {"fraction": fraction, "rank": rank, "energy": energy, "budget_bytes": budget_bytes}
    check(batches, weighing, round_to, {name: value for name, value in given.items() if value is not None})
    with changing(model, inplace) as light:
        check_linears(light, whole=True)
        if budget_bytes is not None:
            fraction = fraction_for(light, budget_bytes, pivot)
        rows, ranks = [], {}
        for block in stream_blocks(light, batches, device=device, progress=progress, title="svd"):
            parts = block.dense
            grams = {name: found.value for name, found in block.collect(Gram, of=tuple(parts)).items()}
            for name, part in parts.items():
                whole, shape, gram = f"{block.name}.{name}", tuple(part.weight.shape), grams.get(name)
                U, share = output_directions(part.weight, weighed(gram, weighing))
                if energy is not None:
                    r = rank_for_energy(share.sqrt(), energy)
                else:
                    r = chosen(rank, fraction, whole, shape, pivot)
                r = max(r // round_to * round_to, min(round_to, *shape))
                if stored(shape, r, pivot) < math.prod(shape):
                    ranks[whole] = r
                    found = projected(part.weight, U[:, :r], pivot)
                    new = low_rank_linear(found.reduce, found.expand, found.order, part.bias)
                    block.replace("svd", name, new, gram, f"rank {r} of {min(shape)}")
            rows += block.rows
        if ranks:
            remember(light, FACTORIZE, {"ranks": ranks, "pivoted": pivot})
    return Compressed(light, Report(tuple(rows)))


def weighed(gram: Tensor | None, weighing: str | None) -> Tensor | None:
    """What `output_directions` is to know of inputs with this gram (in, in)."""
    return {"gram": gram, "norm": gram if gram is None else gram.diagonal(), None: None}[weighing]


def check(
    batches: list[Tensor] | None, weighing: str | None, round_to: int, given: dict[str, object]
) -> None:
    """Raise ValueError for settings of `svd` that do not fit."""
    if weighing not in WEIGHINGS:
        raise ValueError(f"weighing={weighing!r}: choose one of {', '.join(map(repr, WEIGHINGS))}")
    if round_to < 1:
        raise ValueError(f"round_to={round_to}: ranks are multiples of it; take 1 or more")
    if weighing and not batches:
        raise ValueError("svd weighs errors by the layers' inputs and needs batches; weighing=None does not")
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given: each alone says the ranks, so give one")
    for name in ("fraction", "energy"):
        if not 0 <= given.get(name, 0.5) <= 1:
            raise ValueError(f"{name}={given[name]}: give a share from 0 to 1")


def spectra(
    model: nn.Module, batches: list[Tensor], *, every: int = 1, progress: bool = True
) -> dict[str, tuple[Tensor, Tensor]]:
    """{layer: (energy of its weight, energy of its outputs)}, each (min(out, in)), largest first; sums are 1.

    Of the linear layers in the first block and each `every`-th after it; nothing is changed.
    """
    found = {}
    for i, block in enumerate(stream_blocks(model, batches, progress=progress, title="spectra")):
        if i % every == 0:
            parts = block.dense
            grams = block.collect(Gram, of=tuple(parts))
            for name, part in parts.items():
                both = (output_directions(part.weight, gram)[1] for gram in (None, grams[name].value))
                found[f"{block.name}.{name}"] = tuple((e / e.sum()).float().cpu() for e in both)
    return found
