"""QuantLinear: a linear layer whose weight is stored as packed integer codes."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from lightlib.compact import CompactLinear
from lightlib.packing import pack, unpack, whole_bytes
from lightlib.quantization import aten
from lightlib.quantization.float_grids import FP8, NF4
from lightlib.quantization.grid import Int, QuantizedWeight

GRIDS = {kind.__name__: kind for kind in (Int, NF4, FP8)}


class QuantLinear(CompactLinear):
    """y = x W^T + b with W (out, in) as codes of `grid.bits` bits, 16-bit scales, and zero points.

    Of a pruned weight, the codes of what stays are stored, and a bit for each weight that tells which.

    In bfloat16, ATen multiplies the packed codes themselves: up to 4 bits (2 and 3 take the room of 4 in
    memory) with groups that 32 divides, and 5 to 8 bits with one scale a row. The first such call rearranges
    the codes for it, once; in every other case the weight is decoded for each call.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None):
        out_features, in_features = weight.codes.shape
        super().__init__(in_features, out_features, bias)
        grid = self.grid = weight.grid
        mask = weight.mask
        self.kept = None if mask is None else int(mask.sum())
        self.register_buffer("bitmap", None if mask is None else pack(mask.byte(), 1))
        self.register_buffer("codes", pack(weight.codes if mask is None else weight.codes[mask], grid.bits))
        self.register_buffer("scale", weight.scale.half())
        self.register_buffer("zero", None if grid.symmetric else self._packed_zero(weight.zero))
        self.register_buffer("order", None if weight.order is None else weight.order.int())
        self.register_buffer("layout", None)  # the codes, arranged for ATen; takes the place of `codes`
        self.register_buffer("layout_scale", None)
        self.register_buffer("layout_shift", None)

    # what is stored
    def settings(self) -> dict:
        kind, ordered = type(self.grid).__name__, self.order is not None
        return {"kind_of_grid": kind, "ordered": ordered, "kept": self.kept} | asdict(self.grid)

    @classmethod
    def empty(
        cls, in_features, out_features, bias=None, *, kind_of_grid, ordered, kept, **grid
    ) -> QuantLinear:
        grid = GRIDS[kind_of_grid](**grid)
        scales = torch.zeros((1, 1) if grid.per_tensor else (out_features, grid.groups(in_features)))
        codes = torch.zeros(out_features, in_features, dtype=torch.uint8)
        order = torch.arange(in_features) if ordered else None
        mask = None if kept is None else torch.arange(codes.numel()).view(codes.shape) < kept
        return cls(QuantizedWeight(grid, codes, scales, scales, order, mask), bias)

    def stored(self) -> dict[str, Tensor]:
        names = ("codes", "bitmap", "scale", "zero", "order", "bias")
        parts = {name: self._packed_codes() if name == "codes" else getattr(self, name) for name in names}
        return {name: part for name, part in parts.items() if part is not None}

    def stored_bits(self) -> int:
        rest = sum(t.nbytes * 8 for t in (self.order, self.bias, self.bitmap) if t is not None)
        if self.kept is not None:
            bits = self.grid.bits
            rest += whole_bytes(self.kept, bits) - whole_bytes(self.out_features * self.in_features, bits)
        return self.grid.stored_bits(self.out_features, self.in_features) + rest

    def _packed_zero(self, zero: Tensor) -> Tensor:
        return zero.half() if self.grid.float_zero else pack(zero.to(torch.uint8), self.grid.bits)

    # what is read
    def quantized(self) -> QuantizedWeight:
        """The weight as codes (out, in), scale and zero."""
        grid, scale = self.grid, self.scale.float()
        shape, mask = (self.out_features, self.in_features), self._mask()
        if grid.symmetric:
            zero = torch.full_like(scale, 2 ** (grid.bits - 1))
        else:
            zero = self.zero.float() if grid.float_zero else unpack(self.zero, grid.bits, scale.shape).float()
        codes = unpack(self._packed_codes(), grid.bits, shape if mask is None else (self.kept,))
        if mask is not None:
            zeros = grid.round_to_codes(torch.zeros(shape, device=scale.device), scale, zero)
            codes = zeros.masked_scatter_(mask, codes)
        return QuantizedWeight(grid, codes, scale, zero, self.order, mask)

    def _mask(self) -> Tensor | None:
        if self.bitmap is None:
            return None
        return unpack(self.bitmap, 1, (self.out_features, self.in_features)).bool()

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.quantized().dense(dtype)

    # what is fast
    def fast_path(self, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
        if not isinstance(self.grid, Int):
            return "", f"no packed matmul here reads the values of {type(self.grid).__name__}"
        if dtype != torch.bfloat16:
            return (
                "",
                f"the packed matmuls take bfloat16, not {str(dtype)[6:]} (see decoder.cast)",
            )
        device = torch.device(device)
        if self.grid.bits > 4 and self.scale.shape[1] > 1:
            return "", "ATen's 8-bit matmul takes one scale a row; these groups are decoded for each call"
        if self.grid.bits <= 4 and (self.out_features % 16 or not self._aten_group()):
            return "", f"ATen's 4-bit matmul takes groups of {aten.GROUPS} and outputs in multiples of 16"
        path = "aten::_weight_int8pack_mm" if self.grid.bits > 4 else aten.four_bits(device)
        reason = aten.missing(path, device)
        return ("", reason) if reason else (path, "")

    def forward(self, x: Tensor) -> Tensor:
        if self.layout is None and not self.fast_path(x.dtype, x.device)[0]:
            return super().forward(x)
        if x.dtype != torch.bfloat16:
            self._put_back()
            return super().forward(x)
        if self.layout is None:
            self._arrange()
        flat = x.reshape(-1, self.in_features)
        flat = flat if self.order is None else flat[:, self.order]
        if self.grid.bits > 4:
            y = torch._weight_int8pack_mm(flat, self.layout, self.layout_scale)
            if self.layout_shift is not None:
                y = y + (flat.sum(1, keepdim=True, dtype=torch.float32) * self.layout_shift).to(y.dtype)
        else:
            y = aten.matmul4(flat, self.layout, self._aten_group(), self.layout_scale)
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _aten_group(self) -> int:
        """The largest group of ATen's that divides ours, or 0."""
        ours = self.in_features // self.scale.shape[1] if not self.grid.per_tensor else self.in_features
        return next((g for g in aten.GROUPS if ours % g == 0), 0)

    @property
    def _lift(self) -> int:
        """Added to a code, it brings the middle of our grid to the middle of ATen's: 0 in 8 bits, 8 in 4."""
        return (8 if self.grid.bits <= 4 else 0) - 2 ** (self.grid.bits - 1)

    def _arrange(self) -> None:
        """Lay the codes out for ATen: w = (q - middle) scale + shift, which keeps the shift small."""
        weight, middle = self.quantized(), 2 ** (self.grid.bits - 1)
        scale, zero = (t.expand(self.out_features, -1) for t in (weight.scale, weight.zero))  # (out, groups)
        shift = zero + middle * scale if self.grid.float_zero else (middle - zero) * scale
        codes = weight.codes.int() + self._lift
        if self.grid.bits > 4:
            self.layout, self.layout_scale = codes.to(torch.int8), scale[:, 0].bfloat16()
            self.layout_shift = shift[:, 0] if shift.any() else None
        else:
            self.layout = aten.lay_out4(codes)
            repeats = self.in_features // self._aten_group() // scale.shape[1]
            pair = torch.stack([scale, shift], -1).repeat_interleave(repeats, 1)  # (out, ATen's groups, 2)
            self.layout_scale = pair.transpose(0, 1).contiguous().bfloat16()
        self.codes = None

    def _packed_codes(self) -> Tensor:
        """The codes as a file holds them, whichever way they lie now."""
        if self.codes is not None:
            return self.codes
        shape = self.out_features, self.in_features
        lifted = self.layout.int() if self.grid.bits > 4 else aten.read4(self.layout, *shape)
        codes, mask = (lifted - self._lift).to(torch.uint8), self._mask()
        return pack(codes if mask is None else codes[mask], self.grid.bits)

    def _put_back(self) -> None:
        self.codes, self.layout, self.layout_scale, self.layout_shift = self._packed_codes(), None, None, None

    def _apply(self, fn, recurse=True):
        if self.layout is not None:
            self._put_back()
        return super()._apply(fn, recurse)
