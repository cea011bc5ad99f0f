"""Ties kernels to modules: pruned and rounded layers as the kernels read them. Only this file knows both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightlib.calibration import stream_blocks
from lightlib.change import changing
from lightlib.compact import CompactLinear
from lightlib.kernels import triton_driver
from lightlib.kernels.sparse_matmul import op
from lightlib.kernels.sparse_matmul.dispatch import choose
from lightlib.kernels.sparse_matmul.layouts import (
    LAYOUTS,
    Sparse,
    encode,
    knob_of,
    layout_of,
    rebuilt,
    tensors_of,
)
from lightlib.kernels.w4_matmul import op as int_op
from lightlib.kernels.w4_matmul import packed
from lightlib.kernels.w4_matmul.packed import Packed
from lightlib.quantization.grid import Int
from lightlib.quantization.linear import QuantLinear
from lightlib.report import Compressed, Report
from lightlib.sparsity.linear import SparseLinear


class SparseKernelLinear(CompactLinear):
    """y = x W^T + b with W (out, in) in a layout of `kernels.sparse_matmul`, in 16 bits a value."""

    def __init__(self, weight: Sparse, dtype: torch.dtype, bias: Tensor | None = None):
        n_out, n_in = weight.shape
        super().__init__(n_in, n_out, bias)
        self.layout, self.dtype, self.knob = layout_of(weight), dtype, knob_of(weight)
        self.names = tuple(tensors_of(weight))
        for name, tensor in tensors_of(weight).items():
            self.register_buffer(name, tensor)

    def packed(self) -> Sparse:
        """The weight in its layout."""
        shape = self.out_features, self.in_features
        return rebuilt(
            self.layout, [getattr(self, name) for name in self.names], shape, self.dtype, self.knob
        )

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
        how = op.way(self.layout, 1)
        if how in ("expand", "torch"):
            return "", op.missing() or triton_driver.missing()
        return f"lightlib::sparse_matmul ({self.layout}, {how})", ""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.dtype or (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        y = op.multiply(self.packed(), x.reshape(-1, self.in_features))
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def settings(self) -> dict:
        shapes = {name: (list(t.shape), str(t.dtype)[6:]) for name, t in tensors_of(self.packed()).items()}
        return {"layout": self.layout, "dtype": str(self.dtype)[6:], "knob": self.knob, "shapes": shapes}

    @classmethod
    def empty(cls, in_features, out_features, bias=None, *, layout, dtype, knob, shapes):
        zeros = [torch.zeros(shape, dtype=getattr(torch, kind)) for shape, kind in shapes.values()]
        dtype = getattr(torch, dtype)
        return cls(rebuilt(layout, zeros, (out_features, in_features), dtype, knob), dtype, bias)


class IntKernelLinear(CompactLinear):
    """y = x W^T + b with W (out, in) as integer codes in the order of `kernels.w4_matmul`."""

    def __init__(self, weight: Packed, order: Tensor | None = None, bias: Tensor | None = None):
        n_out, n_in = weight.shape
        super().__init__(n_in, n_out, bias)
        self.bits = weight.bits
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero", weight.zero)
        self.register_buffer("order", order)

    def packed(self) -> Packed:
        """The weight as codes; its columns lie in `order`."""
        return Packed(self.codes, self.scale, self.zero, self.bits, (self.out_features, self.in_features))

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        W = self.packed().dense(torch.float32)
        if self.order is not None:
            W = torch.empty_like(W).index_copy_(1, self.order.long(), W)
        return W.to(dtype)

    def fast_path(self, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
        if torch.device(device).type != "cuda":
            return "", "this integer kernel runs on CUDA devices"
        if dtype not in (torch.float16, torch.bfloat16):
            return "", f"the integer kernel multiplies 16-bit inputs, not {dtype} (see decoder.cast)"
        return (
            ("", int_op.missing()) if int_op.missing() else (f"lightlib::int_matmul ({self.bits} bits)", "")
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in (torch.float16, torch.bfloat16) or (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        flat = x.reshape(-1, self.in_features)
        y = int_op.multiply(self.packed(), flat if self.order is None else flat[:, self.order])
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def settings(self) -> dict:
        zero = None if self.zero is None else str(self.zero.dtype)[6:]
        return {
            "bits": self.bits, "groups": len(self.scale), "zero": zero, "ordered": self.order is not None
        }  # fmt: skip

    @classmethod
    def empty(cls, in_features, out_features, bias=None, *, bits, groups, zero, ordered):
        codes = torch.zeros(out_features, in_features * bits // 8, dtype=torch.uint8)
        scale = torch.zeros(groups, out_features, dtype=torch.float16)
        zeros = None if zero is None else torch.zeros(groups, out_features, dtype=getattr(torch, zero))
        order = torch.zeros(in_features, dtype=torch.int32) if ordered else None
        return cls(Packed(codes, scale, zeros, bits, (out_features, in_features)), order, bias)


def attach(
    model: nn.Module,
    batches: list[Tensor] | None = None,
    *,
    tokens: int = 8,
    layout: str | None = None,
    inplace: bool = False,
) -> Compressed:
    """Store pruned and rounded layers as the kernels read them; no weight changes. A step of `compress`.

    Pruned layers of 16-bit values get the layout that multiplies `tokens` tokens at once fastest on their
    device (`sparse_matmul.dispatch`), or the given one: "csl", "compact", "bitmap", "ell". Integer layers of
    2 to 4, or 8 bits, in groups that 32 divides, get the order of `w4_matmul`. Other layers stay as they are.
    Raises ValueError for a layout that there is not.
    """
    if layout not in (None, *LAYOUTS):
        raise ValueError(f"layout={layout!r}: choose one of {', '.join(LAYOUTS)}, or None for the fastest")
    with changing(model, inplace) as light:
        rows = []
        for block in stream_blocks(light, progress=False):
            for name, part in block.linears.items():
                new, note = None, ""
                if isinstance(part, SparseLinear):
                    new, note = sparse_kernel(part, tokens, layout)
                elif isinstance(part, QuantLinear):
                    new, note = int_kernel(part, name), f"{part.grid.bits} bits"
                if new is not None:
                    block.replace("attach", name, new, notes=note)
            rows += block.rows
    return Compressed(light, Report(tuple(rows)))


def sparse_kernel(
    part: SparseLinear, tokens: int, layout: str | None
) -> tuple[SparseKernelLinear | None, str]:
    """(a pruned layer in the fastest layout or the given one, its name), or (None, "")."""
    dtype, shape = part.values0.dtype, (part.out_features, part.in_features)
    if dtype.itemsize != 2:
        return None, ""
    device = torch.cuda.get_device_name(part.values0.device) if part.values0.is_cuda else ""
    layout = layout or choose(shape, 1 - part.density, tokens, device).layout
    if layout != "ell" and part.in_features % 8:
        return None, ""
    weight = encode(layout, part.dense(dtype), part.mask())
    return SparseKernelLinear(weight, dtype, part.bias), layout


def int_kernel(part: QuantLinear, name: str) -> IntKernelLinear | None:
    """An integer layer in the kernel's order, or None where no kernel reads it."""
    weight, grid = part.quantized(), part.grid
    groups = weight.scale.shape[1]
    if not isinstance(grid, Int) or grid.bits in (5, 6, 7) or weight.mask is not None:
        return None
    if part.in_features % (32 * groups):
        return None
    zero = None if grid.symmetric else weight.zero
    held = packed.encode(weight.codes, weight.scale, zero, grid.bits, float_zero=grid.float_zero, name=name)
    return IntKernelLinear(held, weight.order, part.bias)
