"""What a walk can gather of a layer's inputs X (tokens, in): each class takes them with `add`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Gram:
    """G = X^T X (in, in) over all inputs X (tokens, in) of a layer, in float32."""

    def __init__(self, n_in: int, device: torch.device):
        self.value, self.count = torch.zeros(n_in, n_in, device=device), 0

    def add(self, x: Tensor) -> None:
        x = x.float()
        self.value.addmm_(x.T, x)
        self.count += len(x)


class SquaredNorm:
    """Sum over tokens of each input channel's square (in,)."""

    def __init__(self, n_in: int, device: torch.device):
        self.value, self.count = torch.zeros(n_in, device=device), 0

    def add(self, x: Tensor) -> None:
        self.value += x.float().square().sum(0)
        self.count += len(x)


class AbsMax:
    """Largest magnitude of each input channel (in,)."""

    def __init__(self, n_in: int, device: torch.device):
        self.value = torch.zeros(n_in, device=device)

    def add(self, x: Tensor) -> None:
        self.value = torch.maximum(self.value, x.float().abs().amax(0))


class Samples:
    """The first `limit` inputs of a layer (at most limit, in)."""

    limit = 1024

    def __init__(self, n_in: int, device: torch.device):
        self.value = torch.empty(0, n_in, device=device)

    def add(self, x: Tensor) -> None:
        self.value = torch.cat([self.value, x.float()[: self.limit - len(self.value)]])


def together(*kinds: Callable) -> Callable:
    """A statistic of several statistics, so that one run collects them all; their objects are in `parts`."""

    class Together:
        def __init__(self, n_in: int, device: torch.device):
            self.parts = [kind(n_in, device) for kind in kinds]

        def add(self, x: Tensor) -> None:
            for part in self.parts:
                part.add(x)

    return Together
