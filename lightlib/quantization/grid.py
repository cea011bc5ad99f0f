"""Grids: the few values that a weight may take, stored as codes and read back with a scale.

Int, symmetric:   scale = max|w| / (2^(bits-1) - 1), codes from -(2^(bits-1) - 1) to the same, zero is zero.
Int, asymmetric:  scale = (max - min) / (2^bits - 1), codes from 0 to 2^bits - 1, an integer zero point.
Others (NF4, FP8: float_grids.py) are tables of values between -1 and 1, or -448 and 448, times a scale.
One scale for the tensor, for each output channel (a row of W), or for each group of inputs in a row.
Jacob et al. 2018, arXiv:1712.05877; groups as in Shen et al. 2020, arXiv:1909.05840.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from lightlib.packing import whole_bytes


class Grid:
    """What all grids share: groups, and rounding a whole weight. A grid defines the rule for one group.

    A subclass is a frozen dataclass with `bits`, `group_size`, `per_tensor`, `symmetric` and three rules:
    `fit_groups` (..., group) -> scale, zero; `nearest` and `value` work element by element.
    """

    bits: int
    group_size: int | None
    per_tensor: bool = False
    symmetric: bool = True
    float_zero: bool = False

    def groups(self, n_in: int, name: str = "weight") -> int:
        """Number of groups in a row of `n_in` inputs."""
        g = self.group_size or n_in
        if n_in % g:
            raise ValueError(
                f"{name}: in_features {n_in} is not a multiple of group_size {g}; try {gcd(n_in, g)} or None"
            )
        return n_in // g

    def stored_bits(self, n_out: int, n_in: int) -> int:
        """Bits of a weight (out, in) in a file: codes, 16-bit scales and zero points."""
        groups = 1 if self.per_tensor else n_out * self.groups(n_in)
        zeros = 0 if self.symmetric else 16 * groups if self.float_zero else whole_bytes(groups, self.bits)
        return whole_bytes(n_out * n_in, self.bits) + 16 * groups + zeros

    def fit(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, zero), each (out, groups), or (1, 1) per tensor. The scale is rounded to 16 bits, as it is
        stored.

        zero: the code that stands for 0; with float_zero the minimum itself.
        """
        return self.fit_groups(self.grouped(weight))

    def round_to_codes(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest code of each weight: uint8 (out, in)."""
        codes = self.nearest(self.grouped(weight), scale[..., None], zero[..., None])
        return codes.to(torch.uint8).reshape(weight.shape)

    def read(self, codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights that the codes stand for (out, in)."""
        values = self.value(self.grouped(codes), scale[..., None], zero[..., None])
        return values.to(dtype).reshape(codes.shape)

    def rounded(self, weight: Tensor) -> Tensor:
        """`encode(weight).dense()` without the checks and the codes: (out, in) in float32."""
        W = self.grouped(weight)
        scale, zero = (part[..., None] for part in self.fit_groups(W))
        return self.value(self.nearest(W, scale, zero), scale, zero).view(weight.shape)

    def encode(self, weight: Tensor, name: str = "weight") -> QuantizedWeight:
        """Round every weight (out, in) to its nearest grid point, outside any gradient's graph."""
        weight = weight.detach()
        if not torch.isfinite(weight).all():
            raise ValueError(
                f"{name}: {(~torch.isfinite(weight)).sum()} weights are NaN or infinite; mend them first"
            )
        self.groups(weight.shape[1], name)
        scale, zero = self.fit(weight)
        if not torch.isfinite(scale).all():
            raise ValueError(f"{name}: weights up to {weight.abs().max():.3g} need a scale beyond 16 bits")
        return QuantizedWeight(self, self.round_to_codes(weight, scale, zero), scale, zero)

    def grouped(self, matrix: Tensor) -> Tensor:
        """(out, in) as (out, groups, group), weights in float32; (1, 1, all) per tensor."""
        matrix = matrix if matrix.dtype == torch.uint8 else matrix.float()
        out, n_in = matrix.shape
        return matrix.view(1, 1, -1) if self.per_tensor else matrix.view(out, self.groups(n_in), -1)


@dataclass(frozen=True)
class Int(Grid):
    """A grid of 2^bits integers. `group_size` inputs share a scale; None: a whole row (per channel).

    float_zero: store the group's minimum as a real number instead of an integer zero point (GGUF's Q4_1 does
    so).
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = False
    per_tensor: bool = False
    float_zero: bool = False

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: integer grids have 2 to 8 bits")
        if self.group_size is not None and (self.group_size < 1 or self.per_tensor):
            raise ValueError(
                f"group_size={self.group_size}: give a positive number, and no per_tensor beside it"
            )
        if self.symmetric and self.float_zero:
            raise ValueError("a symmetric grid has no minimum to store: float_zero needs symmetric=False")

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def fit_groups(self, W: Tensor) -> tuple[Tensor, Tensor]:
        low, high = W.amin(-1), W.amax(-1)
        if self.symmetric:
            half = self.top // 2
            scale = sixteen(torch.maximum(high, -low) / half)
            return scale, torch.full_like(scale, half + 1)
        if self.float_zero:
            return sixteen((high - low) / self.top), sixteen(low)
        low, high = low.clamp_max(0), high.clamp_min(0)  # zero must lie on the grid
        scale = sixteen((high - low) / self.top)
        return scale, torch.where(scale > 0, (-low / scale).round(), 0).clamp(0, self.top)

    def nearest(self, W: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        steps = (W - zero if self.float_zero else W) / scale.where(scale > 0, 1)
        codes = steps.round_() if self.float_zero else steps.round_().add_(zero)
        return codes.clamp_(1 if self.symmetric else 0, self.top)

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return codes * scale + zero if self.float_zero else (codes - zero).mul_(scale)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on a grid: codes uint8 (out, in), scale and zero (out, groups).

    order: where groups do not lie side by side, column j of the codes is input order[j]. mask (out, in), its
    columns as those of the codes: which codes are stored; the others stand for zero.
    """

    grid: Grid
    codes: Tensor
    scale: Tensor
    zero: Tensor
    order: Tensor | None = None
    mask: Tensor | None = None

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        weight = self.grid.read(self.codes, self.scale, self.zero, dtype)
        return weight if self.order is None else weight[:, self.order.long().argsort()]

    def within(self, mask: Tensor | None, name: str = "weight") -> QuantizedWeight:
        """This weight, which is zero outside the mask (out, in), with no codes stored there."""
        if mask is None:
            return self
        if self.grid.float_zero:
            raise ValueError(
                f"{name}: a float_zero grid has no exact zero for pruned weights; use float_zero=False"
            )
        return replace(self, mask=mask if self.order is None else mask[:, self.order.long()])


def grid_for(grid: Grid | Mapping[str, Grid], name: str) -> Grid:
    """The grid of the layer `name`: one for all, or one a layer (see plan.py)."""
    if isinstance(grid, Grid):
        return grid
    if name not in grid:
        raise ValueError(f"{name}: the plan has no grid for it; it names {', '.join(list(grid)[:2])}, ...")
    return grid[name]


def sixteen(x: Tensor) -> Tensor:
    """`x` as float16 stores it."""
    return x.half().float()
