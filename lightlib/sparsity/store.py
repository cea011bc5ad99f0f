"""The layer that a pruned weight becomes."""

from __future__ import annotations

from torch import Tensor

from lightlib.sparsity.layouts import encode, smallest
from lightlib.sparsity.linear import SparseLinear
from lightlib.sparsity.masks import Sparsity


def sparse_linear(weight: Tensor, mask: Tensor, sparsity: Sparsity, bias: Tensor | None) -> SparseLinear:
    """`weight` (out, in) where `mask` is True, in the layout of its pattern, or else the smallest one."""
    layout = sparsity if isinstance(sparsity, str) else smallest(mask, weight.element_size() * 8)
    return SparseLinear(encode(weight, mask, layout), bias)
