"""Int8Linear: inputs are rounded to 8 bits too, so that integers meet integers in the product."""

from __future__ import annotations

import torch
from torch import Tensor

from lightlib.compact import CompactLinear
from lightlib.quantization.grid import sixteen

ACTIVATIONS = ("token", "tensor", "static")


class Int8Linear(CompactLinear):
    """y = s_x s_w (Q_x Q_w^T) + b with Q_x, Q_w in -127..127 and sums in 32-bit integers.

    activations: one scale a "token", or one for the "tensor" of each call, or a "static" one, fitted before.
    Weights have a scale a row, or one in all. `columns`: inputs that stay in floating point and meet weights
    in 16 bits, beside the integer product (LLM.int8()). threshold: inputs of a call that reach it join them
    for that call; their weights are read from the 8-bit codes.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        activations: str = "token",
        per_tensor: bool = False,
        columns: Tensor | None = None,
        threshold: float | None = None,
        static_scale: float = 1.0,
    ):
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features, bias)
        if activations not in ACTIVATIONS:
            raise ValueError(f"activations={activations!r}: choose one of {', '.join(ACTIVATIONS)}")
        self.activations, self.per_tensor, self.threshold = activations, per_tensor, threshold
        columns = weight.new_empty(0, dtype=torch.long) if columns is None else columns.sort().values
        inside = weight.detach().float().index_fill(1, columns, 0.0)  # (out, in) without the columns
        codes, scale = to_int8(inside, (0, 1) if per_tensor else 1, sixteen)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.half())  # (out, 1) or (1, 1)
        self.register_buffer("columns", columns.int())
        self.register_buffer("column_weights", weight.detach()[:, columns].half())  # (out, columns)
        static = max(static_scale, torch.finfo(torch.float32).tiny)
        self.register_buffer(
            "static_scale",
            weight.new_tensor(static, dtype=torch.float32) if activations == "static" else None,
        )

    def settings(self) -> dict:
        return {
            "activations": self.activations,
            "per_tensor": self.per_tensor,
            "n_columns": len(self.columns),
            "threshold": self.threshold,
        }

    @classmethod
    def empty(cls, in_features, out_features, bias=None, *, n_columns, **settings) -> Int8Linear:
        return cls(torch.zeros(out_features, in_features), bias, columns=torch.arange(n_columns), **settings)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        weight = self.codes.float() * self.scale.float()
        return weight.index_copy(1, self.columns.long(), self.column_weights.float()).to(dtype)

    def fast_path(self, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
        if torch.device(device).type == "cuda" and (self.in_features % 8 or self.out_features % 8):
            return (
                "",
                "the device's 8-bit product takes sizes in multiples of 8, so each call multiplies floats",
            )
        return "aten::_int_mm", ""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        beside = self.columns.long()
        if self.threshold is not None:
            beside = ((flat.abs() >= self.threshold).any(0).index_fill(0, beside, True)).nonzero().squeeze(1)
        y = self._integer_product(flat.index_fill(1, beside, 0.0) if len(beside) else flat)
        if len(beside):
            y = y + (flat[:, beside] @ self._weights_of(beside, flat.dtype).T).float()
        y = y if self.bias is None else y + self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _integer_product(self, flat: Tensor) -> Tensor:
        """(tokens, out) in float32 from inputs (tokens, in), rounded on the way."""
        if self.static_scale is not None:
            scale = self.static_scale
            codes = (flat / scale).round_().clamp_(-127, 127).to(torch.int8)
        else:
            codes, scale = to_int8(flat, 1 if self.activations == "token" else (0, 1))
        if not self.fast_path(flat.dtype, flat.device)[0]:
            return codes.double() @ self.codes.T.double() * scale * self.scale.float().T  # exact in 53 bits
        return int_mm(codes, self.codes.T) * scale * self.scale.float().T

    def _weights_of(self, beside: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights (out, len(beside)) of inputs that are not rounded."""
        if len(beside) == len(self.columns):
            return self.column_weights.to(dtype)
        weights = (self.codes[:, beside].float() * self.scale.float()).to(dtype)
        known = torch.searchsorted(beside, self.columns.long())
        return weights.index_copy(1, known, self.column_weights.to(dtype))


def to_int8(x: Tensor, over: int | tuple[int, int], stored=lambda scale: scale) -> tuple[Tensor, Tensor]:
    """(codes int8, scale) with max |x| over the dimensions `over` at 127; a scale of zero gives zeros."""
    scale = stored(x.abs().amax(over, keepdim=True).float() / 127)
    codes = (x / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scale


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """a (tokens, in) b (in, out), both int8, in int32."""
    # CUDA's product takes more than 16 rows
    if a.is_cuda and len(a) <= 16:
        return torch._int_mm(torch.nn.functional.pad(a, (0, 0, 0, 17 - len(a))), b)[: len(a)]
    return torch._int_mm(a, b)
