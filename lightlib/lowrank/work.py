"""What a product with a factored weight costs in each order, and which is the cheapest for so many tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

DENSE = "dense"  # decode the weight, then multiply by it
FACTORS = "factor by factor"


@dataclass(frozen=True)
class Work:
    """FLOPs of a call, a multiply and an add being two: some `once`, some for each `token`."""

    once: int
    token: int

    def of(self, tokens: int) -> int:
        return self.once + tokens * self.token


def cheapest(orders: dict[str, Work], tokens: int) -> str:
    """The order that takes the fewest FLOPs for so many tokens."""
    return min(orders, key=lambda order: orders[order].of(tokens))


def contraction_flops(
    out_shape: Sequence[int], in_shape: Sequence[int], ranks: Sequence[int]
) -> dict[str, Work]:
    """{order: work} of a train of matrices: core by core from either end, or decoded to dense.

    >>> contraction_flops((4, 4), (4, 4), (2,))
    {'left to right': Work(once=0, token=512), ..., 'dense': Work(once=1024, token=512)}
    """
    O, I, R = tuple(out_shape), tuple(in_shape), (1, *ranks, 1)
    size = math.prod
    cores = [R[k] * O[k] * I[k] * R[k + 1] for k in range(len(O))]
    left = sum(size(O[:k]) * core * size(I[k + 1 :]) for k, core in enumerate(cores))
    right = sum(size(I[:k]) * core * size(O[k + 1 :]) for k, core in enumerate(cores))
    decoding = sum(size(O[:k]) * size(I[:k]) * core for k, core in enumerate(cores) if k)
    return {
        "left to right": Work(0, 2 * left),
        "right to left": Work(0, 2 * right),
        DENSE: Work(2 * decoding, 2 * size(O) * size(I)),
    }


def tucker_flops(
    out_shape: Sequence[int], in_shape: Sequence[int], ranks: Sequence[int | None]
) -> dict[str, Work]:
    """{order: work} of a Tucker weight: input factors, core, output factors; or decoded to dense."""
    shape, n_out = (*out_shape, *in_shape), len(out_shape)
    kept = [n if r is None else r for n, r in zip(shape, ranks, strict=True)]
    inwards = through(in_shape, kept[n_out:])
    outwards = through(kept[:n_out], out_shape)
    token = inwards + math.prod(kept) + outwards
    return {
        FACTORS: Work(0, 2 * token),
        DENSE: Work(2 * through(kept, shape), 2 * math.prod(shape)),
    }


def cp_flops(out_shape: Sequence[int], in_shape: Sequence[int], rank: int) -> dict[str, Work]:
    """{order: work} of a CP weight: through `rank` numbers, or decoded to dense."""
    n_out, n_in = math.prod(out_shape), math.prod(in_shape)
    columns = sum(
        rank * math.prod(side[:k]) for side in (out_shape, in_shape) for k in range(2, len(side) + 1)
    )
    return {
        FACTORS: Work(columns, 2 * rank * (n_out + n_in)),
        DENSE: Work(columns + 2 * rank * n_out * n_in, 2 * n_out * n_in),
    }


def through(before: Sequence[int], after: Sequence[int]) -> int:
    """Multiplications of a tensor's mode products, first mode first; modes that do not change take none."""
    sizes, total = list(before), 0
    for mode, n in enumerate(after):
        total += 0 if sizes[mode] == n else math.prod(sizes) * n
        sizes[mode] = n
    return total
