"""Tucker: a small core tensor, and along each mode a matrix that leads from it to the whole.

Tucker 1966, Psychometrika 31(3), 279-311. HOSVD: De Lathauwer, De Moor, Vandewalle 2000, SIAM J. Matrix Anal.
Appl. 21(4), 1253-1278; HOOI: the same authors, 21(4), 1324-1342.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightlib.lowrank.multilinear import joined, leading, mode_product, unfold

Ranks = Sequence[int | None]  # one for each mode; None: the mode stays whole and needs no matrix


@dataclass(frozen=True)
class Tucker:
    """T = core x_1 U_1 x_2 U_2 ... with U_k (n_k, r_k); None stands for the identity."""

    core: Tensor
    factors: tuple[Tensor | None, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(self.core.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(r if U is None else len(U) for r, U in zip(self.ranks, self.factors, strict=True))

    @property
    def stored(self) -> int:
        """How many numbers it holds."""
        return self.core.numel() + sum(U.numel() for U in self.factors if U is not None)

    def to_tensor(self) -> Tensor:
        """The tensor itself, dense."""
        tensor = self.core
        for mode, U in enumerate(self.factors):
            tensor = tensor if U is None else mode_product(tensor, U, mode)
        return tensor


def hosvd(tensor: Tensor, ranks: Ranks) -> Tucker:
    """The leading singular vectors of each unfolding, and the core that they see. At full ranks it is exact.

    Its error is at most sqrt(d) times the best of these ranks, d being the number of modes.
    Raises ValueError for ranks that do not fit.
    """
    check(tensor.shape, ranks)
    T = tensor.double()
    factors = [None if r is None else leading(unfold(T, mode), r) for mode, r in enumerate(ranks)]
    return in_dtype(project(T, factors), factors, tensor)


def hooi(tensor: Tensor, ranks: Ranks, sweeps: int = 10, tolerance: float = 1e-10) -> Tucker:
    """From HOSVD on, each mode's matrix anew for what the others let through; the error never grows.

    Ends after `sweeps`, or when ||core||^2, which is what is kept of ||T||^2, grows by less than `tolerance`
    of itself. Raises ValueError for ranks that do not fit.
    """
    check(tensor.shape, ranks)
    T = tensor.double()
    factors = [None if r is None else leading(unfold(T, mode), r) for mode, r in enumerate(ranks)]
    kept = project(T, factors).square().sum()
    for _ in range(sweeps):
        for mode, r in enumerate(ranks):
            if r is not None:
                factors[mode] = leading(unfold(project(T, factors, but=mode), mode), r)
        before, kept = kept, project(T, factors).square().sum()
        if kept - before <= tolerance * kept:
            break
    return in_dtype(project(T, factors), factors, tensor)


def project(tensor: Tensor, factors: Sequence[Tensor | None], but: int | None = None) -> Tensor:
    """The tensor in the bases `factors`, U_k^T along each mode, except along the mode `but`."""
    for mode, U in enumerate(factors):
        if U is not None and mode != but:
            tensor = mode_product(tensor, U.T, mode)
    return tensor


def in_dtype(core: Tensor, factors: Sequence[Tensor | None], like: Tensor) -> Tucker:
    """The decomposition in the dtype of `like`."""
    return Tucker(core.to(like.dtype), tuple(U if U is None else U.to(like.dtype) for U in factors))


def check(shape: Sequence[int], ranks: Ranks) -> None:
    """Raise ValueError for ranks that a tensor of this shape cannot have."""
    if len(ranks) != len(shape):
        raise ValueError(f"{joined(shape)} has {len(shape)} modes, and ranks for {len(ranks)} are given")
    for mode, (n, r) in enumerate(zip(shape, ranks, strict=True)):
        if r is not None and not 1 <= r <= n:
            raise ValueError(f"mode {mode}: rank {r} does not lie from 1 to {n}, or None for the whole mode")
