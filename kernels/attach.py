"""Ties kernels to modules: pruned layers as the kernels read them. The one file that knows both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightlib.calibration import stream_blocks
from lightlib.change import changing
from lightlib.compact import CompactLinear
from lightlib.kernels.sparse_matmul import bitmap, csl, op
from lightlib.kernels.sparse_matmul.bitmap import Bitmap
from lightlib.kernels.sparse_matmul.csl import CSL
from lightlib.report import Compressed, Report
from lightlib.sparsity.linear import SparseLinear

DENSE_ENOUGH = 0.35  # share of weights that stay from which on the bitmap is read faster than Tiled-CSL


class SparseKernelLinear(CompactLinear):
    """y = x W^T + b with W (out, in) in Tiled-CSL or as a bitmap for tensor cores, in 16 bits a value."""

    def __init__(self, weight: CSL | Bitmap, bias: Tensor | None = None):
        n_out, n_in = weight.shape
        super().__init__(n_in, n_out, bias)
        self.layout, self.dtype = "csl" if isinstance(weight, CSL) else "bitmap", weight.dtype
        self.register_buffer("words", weight.words)
        self.register_buffer("offsets", weight.offsets)
        # what a kernel is told beside the tensors
        self.knob = weight.ahead if isinstance(weight, CSL) else weight.capacity

    def packed(self) -> CSL | Bitmap:
        """The weight in its layout."""
        shape = self.out_features, self.in_features
        return LAYOUTS[self.layout](self.words, self.offsets, shape, self.dtype, self.knob)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.packed().dense().to(dtype)

    def mask(self) -> Tensor:
        """Which weights (out, in) are not zero."""
        return self.dense(self.dtype) != 0

    def fast_path(self, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
        if torch.device(device).type != "cuda":
            return "", "the sparse kernels run on CUDA devices"
        if dtype != self.dtype:
            return "", f"the sparse kernels multiply {self.dtype} weights with {self.dtype}, not {dtype}"
        return ("", op.missing()) if op.missing() else (f"lightlib::{self.layout}_matmul", "")

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.dtype or (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        y = op.multiply(self.packed(), x.reshape(-1, self.in_features))
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def settings(self) -> dict:
        sizes = {"words": len(self.words), "offsets": len(self.offsets)}
        return {"layout": self.layout, "dtype": str(self.dtype)[6:], "knob": self.knob, **sizes}

    @classmethod
    def empty(cls, in_features, out_features, bias=None, *, layout, dtype, knob, words, offsets):
        zeros = [torch.zeros(n, dtype=torch.int32) for n in (words, offsets)]
        return cls(LAYOUTS[layout](*zeros, (out_features, in_features), getattr(torch, dtype), knob), bias)


LAYOUTS = {"csl": CSL, "bitmap": Bitmap}


def attach(model: nn.Module, batches: list[Tensor] | None = None, *, inplace: bool = False) -> Compressed:
    """Store pruned layers of 16-bit values as the kernels read them; no weight changes.

    Layers that keep more than a third of their weights become bitmaps, the others Tiled-CSL. Layers whose
    inputs are not a multiple of 8, and layers that are not pruned, stay as they are. A step of `compress`.
    """
    with changing(model, inplace) as light:
        rows = []
        for block in stream_blocks(light, progress=False):
            for name, part in block.linears.items():
                if (
                    isinstance(part, SparseLinear)
                    and part.values0.itemsize == 2
                    and part.in_features % 8 == 0
                ):
                    layout = bitmap if part.density > DENSE_ENOUGH else csl
                    packed = layout.encode(part.dense(part.values0.dtype), part.mask())
                    new = SparseKernelLinear(packed, part.bias)
                    block.replace("attach", name, new, notes=new.layout)
            rows += block.rows
    return Compressed(light, Report(tuple(rows)))
