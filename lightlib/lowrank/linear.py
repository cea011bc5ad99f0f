"""Layers of low rank, made from what was computed for their weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightlib.low_rank import LowRankLinear


@torch.no_grad()
def low_rank_linear(
    reduce: Tensor, expand: Tensor, order: Tensor | None, bias: Tensor | None
) -> LowRankLinear:
    """The layer of these factors, see `LowRankLinear`; bias (out)."""
    rank, n_in = reduce.shape
    n_out = len(expand) + (0 if order is None else rank)
    layer = LowRankLinear(n_in, n_out, rank, bias is not None, order is not None)
    layer.reduce.weight = nn.Parameter(reduce, requires_grad=False)
    layer.expand.weight = nn.Parameter(expand, requires_grad=False)
    if order is not None:
        layer.order = order.int()
    if bias is not None and order is None:
        layer.expand.bias = nn.Parameter(bias.clone(), requires_grad=False)
    elif bias is not None:
        # `reduce` adds its outputs' biases, and `expand` what the others' still lack
        ordered = bias.double()[order.argsort()]
        lacking = ordered[rank:] - expand.double() @ ordered[:rank]
        layer.reduce.bias = nn.Parameter(ordered[:rank].to(bias.dtype), requires_grad=False)
        layer.expand.bias = nn.Parameter(lacking.to(bias.dtype), requires_grad=False)
    return layer
