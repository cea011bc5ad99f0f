"""Linear layers whose weights are a core with a factor for each mode, or a sum of outer products."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from lightlib.lowrank.cp import CP
from lightlib.lowrank.multilinear import khatri_rao, mode_product
from lightlib.lowrank.tensor_layers import FactoredLinear, at_least_float32
from lightlib.lowrank.tucker import Tucker
from lightlib.lowrank.work import Work, cp_flops, tucker_flops


class TuckerLinear(FactoredLinear):
    """W, as a tensor (*out_shape, *in_shape), is a `core` and a matrix for each mode that is not whole."""

    called = "factors"

    def __init__(self, tucker: Tucker, out_modes: int, bias: Tensor | None = None):
        shape = tucker.shape
        factors = {"core": tucker.core} | {f"factor{k}": U for k, U in enumerate(tucker.factors)}
        super().__init__(shape[:out_modes], shape[out_modes:], factors, bias)
        self.ranks = tuple(None if U is None else U.shape[1] for U in tucker.factors)

    def tucker(self, dtype: torch.dtype) -> Tucker:
        """The decomposition, in this dtype."""
        factors = (getattr(self, f"factor{k}") for k in range(len(self.ranks)))
        return Tucker(self.core.to(dtype), tuple(U if U is None else U.to(dtype) for U in factors))

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        tensor = self.tucker(at_least_float32(self.core)).to_tensor()
        return tensor.reshape(self.out_features, self.in_features).to(dtype)

    @cached_property
    def flops(self) -> dict[str, Work]:
        return tucker_flops(self.out_shape, self.in_shape, self.ranks)

    def contract(self, x: Tensor, order: str) -> Tensor:
        tucker, n_out = self.tucker(x.dtype), len(self.out_shape)
        z = x.reshape(-1, *self.in_shape)  # (tokens, *in_shape)
        for mode, U in enumerate(tucker.factors[n_out:], start=1):
            z = z if U is None else mode_product(z, U.T, mode)
        core = tucker.core.flatten(n_out).flatten(0, -2)  # (output ranks, input ranks)
        y = F.linear(z.flatten(1), core).view(-1, *tucker.ranks[:n_out])
        for mode, U in enumerate(tucker.factors[:n_out], start=1):
            y = y if U is None else mode_product(y, U, mode)
        return y.reshape(*x.shape[:-1], self.out_features)

    def settings(self) -> dict:
        return {"out_shape": list(self.out_shape), "in_shape": list(self.in_shape), "ranks": list(self.ranks)}

    @classmethod
    def empty(cls, in_features, out_features, bias=None, *, out_shape, in_shape, ranks) -> TuckerLinear:
        shape = (*out_shape, *in_shape)
        core = torch.zeros([n if r is None else r for n, r in zip(shape, ranks, strict=True)])
        factors = tuple(None if r is None else torch.zeros(n, r) for n, r in zip(shape, ranks, strict=True))
        return cls(Tucker(core, factors), len(out_shape), bias)


class CPLinear(FactoredLinear):
    """W, as a tensor (*out_shape, *in_shape), is a sum of outer products of the columns of its factors.

    So it is of low rank, with factors (out, rank) and (in, rank) that are Khatri-Rao products themselves.
    """

    called = "factors"

    def __init__(self, cp: CP, out_modes: int, bias: Tensor | None = None):
        # each factor takes its share of the weights, so that none is far from the others in size
        share = cp.weights.abs() ** (1 / len(cp.factors))
        first, *others = (A * share for A in cp.factors)
        factors = {f"factor{k}": A for k, A in enumerate([first * cp.weights.sign(), *others])}
        super().__init__(cp.shape[:out_modes], cp.shape[out_modes:], factors, bias)
        self.rank = cp.rank

    def sides(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Factors (out, rank) and (in, rank) of W, in this dtype."""
        modes, n_out = len(self.out_shape) + len(self.in_shape), len(self.out_shape)
        factors = [getattr(self, f"factor{k}").to(dtype) for k in range(modes)]
        return khatri_rao(factors[:n_out]), khatri_rao(factors[n_out:])

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        out, inward = self.sides(at_least_float32(self.factor0))
        return (out @ inward.T).to(dtype)

    @cached_property
    def flops(self) -> dict[str, Work]:
        return cp_flops(self.out_shape, self.in_shape, self.rank)

    def contract(self, x: Tensor, order: str) -> Tensor:
        out, inward = self.sides(x.dtype)
        return F.linear(x @ inward, out)

    def settings(self) -> dict:
        return {"out_shape": list(self.out_shape), "in_shape": list(self.in_shape), "rank": self.rank}

    @classmethod
    def empty(cls, in_features, out_features, bias=None, *, out_shape, in_shape, rank) -> CPLinear:
        factors = tuple(torch.zeros(n, rank) for n in (*out_shape, *in_shape))
        return cls(CP(torch.zeros(rank), factors), len(out_shape), bias)
