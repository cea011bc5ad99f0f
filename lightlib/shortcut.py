"""Shortcuts: what a residual, or a branch, passes through where the stream's basis changes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Shortcut(nn.Module):
    """x W + y with W (in, out). Not an nn.Linear, so that no method rounds or prunes it unasked."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    @property
    def products(self) -> tuple[int, int]:
        """(out, in) of a matrix that takes as many products a token as this does."""
        return tuple(self.weight.shape[::-1])

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if y is None:
            return x @ self.weight
        # the sum is part of the product: one pass over y less
        return torch.addmm(y.flatten(0, -2), x.flatten(0, -2), self.weight).view_as(y)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class LowRankShortcut(Shortcut):
    """x (I - B B^T) + y with weight B (in, rank): a shortcut between two bases chosen as near as can be.

    Two subspaces of k out of d dimensions share 2k - d of them or more. In bases that suit both (principal
    vectors: Bjorck and Golub 1973, Mathematics of Computation 27, 579-594) the shortcut differs from the
    identity at rank d - k, not k. Where y (..., out) is wider than x, zeros follow.
    """

    def __init__(self, weight: Tensor, out_features: int):
        super().__init__(weight)
        self.out_features = out_features

    @property
    def products(self) -> tuple[int, int]:
        n_in, rank = self.weight.shape
        return 2 * rank, n_in

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        B, wider = self.weight, self.out_features - x.shape[-1]
        total = y + (F.pad(x, (0, wider)) if wider else x)
        if not B.shape[1]:
            return total
        turned = F.linear(torch.mm(x.flatten(0, -2), B), F.pad(B, (0, 0, 0, wider)) if wider else B)
        return total - turned.view_as(total)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.out_features}, rank={self.weight.shape[1]}"
