"""The layer that a pruned weight becomes, and how to have it in another layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightlib.calibration import stream_blocks
from lightlib.change import changing
from lightlib.report import Compressed, Report
from lightlib.sparsity.csr_speed import csr_gain
from lightlib.sparsity.layouts import encode, smallest
from lightlib.sparsity.linear import SparseLinear
from lightlib.sparsity.masks import Sparsity


def sparse_linear(weight: Tensor, mask: Tensor, sparsity: Sparsity, bias: Tensor | None) -> SparseLinear:
    """`weight` (out, in) where `mask` is True, in the layout of its pattern, or else the smallest one."""
    layout = sparsity if isinstance(sparsity, str) else smallest(mask, weight.element_size() * 8)
    return SparseLinear(encode(weight, mask, layout), bias)


def relayout(
    model: nn.Module, batches: list[Tensor] | None = None, *, layout: str = "fastest", inplace: bool = False
) -> Compressed:
    """Store all sparse layers in another layout; no weight changes. A step of `compress`, needs no batches.

    layout: "bitmap", "csr" or "n:m"; "smallest" of the first two; or "fastest": CSR where its product is
    measured to be faster here than a dense one (float32 on a CPU), and as it is elsewhere. Raises ValueError
    for an unknown layout, and for a mask that breaks the pattern.
    """
    if layout not in ("smallest", "fastest", "bitmap", "csr") and ":" not in layout:
        raise ValueError(f"layout={layout!r}: give bitmap, csr, a pattern like 2:4, smallest or fastest")
    with changing(model, inplace) as light:
        rows = []
        for block in stream_blocks(light, progress=False):
            for name, part in block.linears.items():
                if isinstance(part, SparseLinear):
                    new = _stored_as(part, layout)
                    block.replace("relayout", name, new, notes=" and ".join(new.layouts))
            rows += block.rows
    return Compressed(light, Report(tuple(rows)))


def _stored_as(part: SparseLinear, layout: str) -> SparseLinear:
    dtype, mask = part.values0.dtype, part.mask()
    if layout == "fastest":
        on_cpu = dtype == torch.float32 and not part.values0.is_cuda
        shape = part.out_features, part.in_features
        if not on_cpu or csr_gain(*shape, round(part.density, 2), torch.get_num_threads()) < 1:
            return part
        layout = "csr"
    if layout == "smallest":
        layout = smallest(mask, dtype.itemsize * 8)
    return SparseLinear(encode(part.dense(dtype), mask, layout), part.bias)
