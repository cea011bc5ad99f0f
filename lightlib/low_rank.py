"""Linear layers made of several: a weight of low rank as two thin ones, or beside another weight.

Not packed layers: each factor is an nn.Linear or a parameter, to be rounded, pruned or trained next.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightlib.compact import CompactLinear, weight_of
from lightlib.shared_linear import SharedLinear


class LowRankLinear(nn.Module):
    """y = expand(reduce(x)) with `reduce` (rank, in) and `expand` (out, rank).

    With `pivoted`, `rank` of the outputs are those of `reduce` themselves, `expand` (out - rank, rank) makes
    the others from them, and `order` (out) says where each output lies among both.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, pivoted: bool):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.reduce = nn.Linear(in_features, rank, bias=bias and pivoted)
        self.expand = nn.Linear(rank, out_features - rank if pivoted else out_features, bias=bias)
        self.register_buffer("order", torch.arange(out_features, dtype=torch.int32) if pivoted else None)

    @property
    def stages(self) -> list[tuple[str, ...]]:
        """Its linears in the order they run."""
        return [("reduce",), ("expand",)]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W (out, in)."""
        reduce, expand = (weight_of(part) for part in (self.reduce, self.expand))
        W = expand @ reduce
        return (W if self.order is None else torch.cat([reduce, W])[self.order]).to(dtype)

    def stored_bits(self) -> int:
        """Bits that its weights take in a file, biases left out."""
        order = 0 if self.order is None else self.order.nbytes * 8
        return order + sum(weight_bits(part) for part in (self.reduce, self.expand))

    def forward(self, x: Tensor) -> Tensor:
        z = self.reduce(x)  # (..., rank)
        if self.order is None:
            return self.expand(z)
        both = torch.cat([z, self.expand(z)], -1)
        # index_select would take four times as long on a CPU
        return both.gather(-1, self.order.long().expand(both.shape))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class Correction(nn.Module):
    """x A^T B^T with A (rank, in) and B (out, rank). Not an nn.Linear: no method rounds it unasked."""

    def __init__(self, in_features: int, out_features: int, rank: int, dtype: torch.dtype):
        super().__init__()
        self.A = nn.Parameter(torch.zeros(rank, in_features, dtype=dtype), requires_grad=False)
        self.B = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype), requires_grad=False)

    @property
    def products(self) -> tuple[int, int]:
        """(out, in) of a matrix that takes as many products a token as this does."""
        return len(self.A), len(self.B) + self.A.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.A), self.B)

    def extra_repr(self) -> str:
        return f"rank={len(self.A)}"


class CorrectedLinear(nn.Module):
    """y = base(x) + correction(x): a correction of low rank for what was lost when `base` was compressed."""

    def __init__(self, base: nn.Linear | CompactLinear, rank: int, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base, self.correction = base, Correction(base.in_features, base.out_features, rank, dtype)

    @property
    def stages(self) -> list[tuple[str, ...]]:
        return [("base",)]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        more = self.correction.B.float() @ self.correction.A.float()
        return (weight_of(self.base) + more).to(dtype)

    def stored_bits(self) -> int:
        return weight_bits(self.base) + 8 * sum(p.nbytes for p in self.correction.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.correction(x)


COMPOSITE = (LowRankLinear, CorrectedLinear, SharedLinear)


def weight_bits(linear: nn.Module) -> int:
    """Bits of the layer's weight in a file, without its bias."""
    if isinstance(linear, CompactLinear):
        return linear.stored_bits() - (0 if linear.bias is None else linear.bias.nbytes * 8)
    if isinstance(linear, COMPOSITE):
        return linear.stored_bits()
    return 8 * sum(p.nbytes for name, p in linear.named_parameters() if name != "bias")


# what a model of such layers is when it is loaded
FACTORIZE, CORRECT = "lightlib.low_rank:factorize", "lightlib.low_rank:correct"


def factorize(model: nn.Module, ranks: dict[str, int], pivoted: bool) -> nn.Module:
    """Put layers of these ranks in place of nn.Linear, with weights still to be filled. In place."""
    for name, rank in ranks.items():
        old = model.get_submodule(name)
        new = LowRankLinear(old.in_features, old.out_features, rank, old.bias is not None, pivoted)
        model.set_submodule(name, new)
    return model


def correct(model: nn.Module, ranks: dict[str, int], dtype: str) -> nn.Module:
    """Put factors of these ranks beside layers, still to be filled. In place."""
    for name, rank in ranks.items():
        model.set_submodule(name, CorrectedLinear(model.get_submodule(name), rank, getattr(torch, dtype)))
    return model
