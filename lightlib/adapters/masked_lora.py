"""LoRA within a mask: a low-rank update of the weights that are stored, merged into them at the end.

Hu et al. 2021, arXiv:2106.09685. Outside the mask nothing is added, so merging keeps every zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from lightlib.compact import CompactLinear
from lightlib.decoder import linears


class MaskedUpdate(nn.Module):
    """values + B A, or of it what the mask lets through: values (out, in) or (kept), row by row."""

    def __init__(self, shape: tuple[int, int], rank: int, mask: Tensor | None, generator: torch.Generator):
        super().__init__()
        n_out, n_in = shape
        self.A = nn.Parameter(torch.randn(rank, n_in, generator=generator) / n_in**0.5)
        self.B = nn.Parameter(torch.zeros(n_out, rank))
        self.register_buffer("mask", mask)

    def forward(self, values: Tensor) -> Tensor:
        update = self.B @ self.A  # (out, in)
        return values + (update if self.mask is None else update[self.mask])


@contextmanager
def low_rank_updates(blocks: dict[str, nn.Module], rank: int) -> Iterator[list[nn.Parameter]]:
    """The A and B of every layer in `blocks` that can learn; merged at the end, dropped on an error.

    B begins at 0, so that the model begins as it is. Raises ValueError for a rank that a layer cannot have.
    """
    generator, sites = torch.Generator().manual_seed(0), []
    merge = False
    try:
        for block, module in blocks.items():
            for name, part in linears(module).items():
                shape = part.out_features, part.in_features
                if not 0 < rank <= min(shape):
                    raise ValueError(f"{block}.{name}: rank={rank} does not lie from 1 to {min(shape)}")
                for key, mask in learnable(part).items():
                    device = getattr(part, key).device
                    update = MaskedUpdate(shape, rank, mask, generator).to(device)
                    register_parametrization(part, key, update)
                    sites.append((part, key, update))
        yield [p for _, _, update in sites for p in (update.A, update.B)]
        merge = True
    finally:
        for part, key, _ in sites:
            remove_parametrizations(part, key, leave_parametrized=merge)


def learnable(part: nn.Linear | CompactLinear) -> dict[str, Tensor | None]:
    """{parameter: mask (out, in) of the weights that it holds} of a layer; None: it holds all of them."""
    return part.learnable() if isinstance(part, CompactLinear) else {"weight": None}
