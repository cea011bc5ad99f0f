"""Which ranks a Tucker decomposition may have for so many numbers: by its modes' sizes, or their energy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightlib.lowrank.multilinear import joined, unfold
from lightlib.lowrank.tucker import Ranks


def stored_by(shape: Sequence[int], ranks: Ranks) -> int:
    """How many numbers a tensor of this shape takes at these ranks."""
    kept = [n if r is None else r for n, r in zip(shape, ranks, strict=True)]
    return math.prod(kept) + sum(n * r for n, r in zip(shape, ranks, strict=True) if r is not None)


def ranks_for(
    shape: Sequence[int], stored: int, whole: Sequence[int] = (), name: str = "tensor"
) -> tuple[int | None, ...]:
    """The largest ranks in proportion to the shape that take at most `stored` numbers; modes in `whole` stay.

    No rank exceeds the product of the others, beyond which it would hold zeros. Where not even ranks of 1
    are few enough, raises ValueError that speaks of `name`.

    >>> ranks_for((9, 64, 576), 200_000, whole=[0])
    (None, 26, 234)
    """
    modes = list(enumerate(shape))
    shares = {r / n for k, n in modes if k not in whole for r in range(1, n + 1)}
    for share in sorted(shares | {0.0}, reverse=True):
        wanted = [n if k in whole else max(1, int(share * n + 1e-9)) for k, n in modes]
        useful = [min(r, math.prod(wanted) // r) for r in wanted]
        ranks = tuple(None if k in whole or useful[k] == n else useful[k] for k, n in modes)
        if stored_by(shape, ranks) <= stored:
            return ranks
    raise too_few(shape, ranks, stored, name)


def ranks_by_energy(
    shape: Sequence[int], tails: Sequence[Tensor | None], stored: int, name: str = "tensor"
) -> tuple[int | None, ...]:
    """The ranks that lose least by HOSVD's bound, the sum of the modes' tails, in at most `stored` numbers.

    tails: of each mode, see `tails_of`; None where it stays whole. A mode that comes out whole needs no
    matrix and is None too. All ranks of all modes but the last are tried.
    Raises ValueError, which speaks of `name`, where not even ranks of 1 are few enough.
    """
    *others, last = (k for k, tail in enumerate(tails) if tail is not None)
    grids = torch.meshgrid(*(torch.arange(1, shape[k] + 1) for k in others), indexing="ij") if others else ()
    core = torch.tensor(math.prod(n for n, tail in zip(shape, tails, strict=True) if tail is None))
    matrices, lost, n = torch.tensor(0), 0.0, shape[last]
    for k, grid in zip(others, grids, strict=True):
        core, lost = core * grid, lost + tails[k].cpu()[grid]
        matrices = matrices + torch.where(grid < shape[k], grid * shape[k], 0)
    room = stored - matrices
    rank = torch.where(core * n <= room, n, (room // (core + n)).clamp(0, n - 1))  # what is left for the last
    lost = torch.where(rank > 0, lost + tails[last].cpu()[rank], math.inf)
    best = lost.argmin()
    if lost.flatten()[best].isinf():
        raise too_few(shape, [None if tail is None else 1 for tail in tails], stored, name)
    found = {k: int(grid.flatten()[best]) for k, grid in zip((*others, last), (*grids, rank), strict=True)}
    return tuple(None if found.get(k, n) == n else found[k] for k, n in enumerate(shape))


def tails_of(gram: Tensor) -> Tensor:
    """What of ||T||^2 lies beyond each rank (0 .. n) of a mode, from the gram (n, n) of its unfolding."""
    energy = torch.linalg.eigvalsh(gram.double()).clamp_min(0)  # rising
    return torch.cat([energy.new_zeros(1), energy.cumsum(0)]).flip(0)


def tails(tensor: Tensor, whole: Sequence[int] = ()) -> list[Tensor | None]:
    """The tails of each mode; None for modes that are to stay whole."""
    unfolded = (None if k in whole else unfold(tensor.double(), k) for k in range(tensor.dim()))
    return [None if M is None else tails_of(M @ M.T) for M in unfolded]


def too_few(shape: Sequence[int], ranks: Ranks, stored: int, name: str) -> ValueError:
    """What to say where even ranks of 1 take more than may be stored."""
    return ValueError(
        f"{name}: {joined(shape)} takes {stored_by(shape, ranks)} numbers at ranks of 1, {stored} may be "
        "stored; allow more of them, or split it into modes of other sizes"
    )
