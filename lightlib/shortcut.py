"""Shortcut: the matrix through which a residual, or a branch, passes where the stream's basis changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Shortcut(nn.Module):
    """x W + y with W (in, out). Not an nn.Linear, so that no method rounds or prunes it unasked."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    @property
    def in_features(self) -> int:
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        return self.weight.shape[1]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if y is None:
            return x @ self.weight
        # the sum is part of the product: one pass over y less
        return torch.addmm(y.flatten(0, -2), x.flatten(0, -2), self.weight).view_as(y)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
