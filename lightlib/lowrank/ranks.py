"""Which rank: what it takes, by budget, by energy, or by how far each layer moves the model."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from lightlib.cost import size
from lightlib.sensitivity import dense_linears

ORDER_BYTES = 4  # for each output of a pivoted layer, where it lies


def stored(shape: tuple[int, int], rank: int, pivot: bool) -> int:
    """Weights that a matrix of this shape and rank takes: r (out + in), or r (out + in - r) with pivots."""
    return rank * (sum(shape) - (rank if pivot else 0))


def rank_for(shape: tuple[int, int], weights: float, pivot: bool = True) -> int:
    """The highest rank that takes at most so many weights; at most min(out, in).

    >>> rank_for((100, 100), 5000, pivot=False), rank_for((100, 100), 5000)
    (25, 29)
    """
    total = sum(shape)
    rank = weights / total if not pivot else (total - math.sqrt(max(total**2 - 4 * weights, 0))) / 2
    return min(int(rank + 1e-9), *shape)


def rank_for_energy(values: Tensor, share: float) -> int:
    """The lowest rank that keeps `share` of the sum of squares of singular values (n), largest first.

    >>> rank_for_energy(torch.tensor([3.0, 2.0, 0.1]), 0.99)
    2
    """
    kept = values.double().square().cumsum(0)
    return min(int((kept < share * kept[-1] * (1 - 1e-12)).sum()) + 1, len(values))


def chosen(
    rank: int | Mapping[str, int] | None,
    fraction: float | None,
    name: str,
    shape: tuple[int, int],
    pivot: bool,
) -> int:
    """The rank of the layer `name`: as given for it, or by the share of its weights that goes (0.2)."""
    if rank is None:
        fraction = 0.2 if fraction is None else fraction
        found = rank_for(shape, (1 - fraction) * math.prod(shape), pivot)
        if not found:
            raise ValueError(f"{name}: fraction={fraction} of a {shape} matrix leaves it no rank; take less")
        return found
    if isinstance(rank, Mapping):
        if name not in rank:
            raise ValueError(f"{name}: no rank for it; there are {', '.join(list(rank)[:2])}, ...")
        rank = rank[name]
    if not 0 < rank <= min(shape):
        raise ValueError(f"{name}: rank={rank} does not lie from 1 to {min(shape)}")
    return rank


def fraction_for(model: nn.Module, budget_bytes: float, pivot: bool) -> float:
    """The share of the dense linear layers' weights that must go, so that the model takes so many bytes.

    Raises ValueError where even none of these weights would be too much.
    """
    weights = [part.weight for part in dense_linears(model).values()]
    orders = sum(ORDER_BYTES * len(W) for W in weights) if pivot else 0
    inside, whole = sum(W.nbytes for W in weights), size(model).stored_bytes + orders
    if budget_bytes <= whole - inside:
        raise ValueError(
            f"budget_bytes={budget_bytes:.0f}: all but the blocks' linear layers takes {whole - inside} alone"
        )
    return max(0.0, min(1.0, (whole - budget_bytes) / inside))
