"""Grids whose points are not evenly spaced: NormalFloat4 and 8-bit floating point, with a scale a group.

NF4: 16 quantiles of a normal distribution, -1 to 1, times max|w|. Dettmers et al. 2023, arXiv:2305.14314.
FP8: a sign, 4 (5) bits of exponent, 3 (2) of mantissa. Micikevicius et al. 2022, arXiv:2209.05433.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from lightlib.quantization.grid import Grid, sixteen


@dataclass(frozen=True)
class NF4(Grid):
    """Sixteen values, dense around zero, where trained weights are; a scale for each group (block)."""

    group_size: int | None = 64
    bits: ClassVar[int] = 4

    def fit_groups(self, W: Tensor) -> tuple[Tensor, Tensor]:
        scale = sixteen(W.abs().amax(-1))
        return scale, torch.full_like(scale, 7)  # the eighth value of the table is 0

    def nearest(self, W: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        table = nf4_table().to(W.device)
        middles = (table[1:] + table[:-1]) / 2
        return torch.bucketize(W / scale.where(scale > 0, 1), middles)

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return nf4_table().to(codes.device)[codes.long()] * scale


@dataclass(frozen=True)
class FP8(Grid):
    """Eight-bit floats: relative precision, so small weights beside a large one survive.

    kind: "e4m3" (up to 448, 3 bits of mantissa) or "e5m2" (up to 57344, 2 bits). The codes are the floats'
    own bits.
    """

    kind: str = "e4m3"
    group_size: int | None = 128
    per_tensor: bool = False
    bits: ClassVar[int] = 8

    def __post_init__(self):
        if self.kind not in FLOATS:
            raise ValueError(f"kind={self.kind!r}: 8-bit floats are {' or '.join(FLOATS)}")
        if self.group_size is not None and (self.group_size < 1 or self.per_tensor):
            raise ValueError(
                f"group_size={self.group_size}: give a positive number, and None with per_tensor"
            )

    @property
    def largest(self) -> float:
        return torch.finfo(FLOATS[self.kind]).max

    def fit_groups(self, W: Tensor) -> tuple[Tensor, Tensor]:
        # the middle of the range is enough and keeps the scale above float16's smallest numbers
        scale = sixteen(W.abs().amax(-1) / min(self.largest, 448))
        return scale, torch.zeros_like(scale)

    def nearest(self, W: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        steps = (W / scale.where(scale > 0, 1)).clamp_(-self.largest, self.largest)
        return steps.to(FLOATS[self.kind]).view(torch.uint8)

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return codes.to(torch.uint8).view(FLOATS[self.kind]).float() * scale


FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@cache
def nf4_table() -> Tensor:
    """Quantiles of a normal distribution, 7 below zero and 8 above it, scaled to [-1, 1].

    The outermost probability is the mean of what 15 and 16 equal shares would leave half a share beside it.
    """
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    edge = (1 - 1 / 30 + 1 - 1 / 32) / 2
    above = normal.icdf(torch.linspace(0.5, edge, 9, dtype=torch.float64))[1:]
    below = -normal.icdf(torch.linspace(0.5, edge, 8, dtype=torch.float64))[1:].flip(0)
    values = torch.cat([below, torch.zeros(1, dtype=torch.float64), above])
    return (values / values.abs().max()).float()
