"""SparseLinear: a linear layer that stores only the weights that stay, and where they belong."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from lightlib.compact import CompactLinear
from lightlib.machine import seconds
from lightlib.sparsity.layouts import SparseWeight, encode
from lightlib.sparsity.masks import pattern


class SparseLinear(CompactLinear):
    """y = x W^T + b with W (out, in) the sum of one or more sparse weights whose places do not overlap.

    Two parts serve masks that are nearly regular: most of the weight as n:m, the rest of it as CSR. The
    values are parameters, so training them keeps the mask.
    """

    def __init__(self, weight: SparseWeight | tuple[SparseWeight, ...], bias: Tensor | None = None):
        parts = weight if isinstance(weight, tuple) else (weight,)
        n_out, n_in = parts[0].shape
        super().__init__(n_in, n_out, bias)
        self.layouts = tuple(part.layout for part in parts)
        for i, part in enumerate(parts):
            for key, tensor in part.tensors.items():
                if key == "values":
                    self.register_parameter(f"values{i}", nn.Parameter(tensor, requires_grad=False))
                else:
                    self.register_buffer(f"{key}{i}", tensor)

    def parts(self) -> tuple[SparseWeight, ...]:
        """The sparse weights whose sum W is."""
        shape = self.out_features, self.in_features
        return tuple(
            SparseWeight(layout, shape, {key: getattr(self, f"{key}{i}") for key in KEYS.get(layout, NM)})
            for i, layout in enumerate(self.layouts)
        )

    def mask(self) -> Tensor:
        """Where values are stored: bool (out, in)."""
        return torch.stack([part.mask() for part in self.parts()]).any(0)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        first, *rest = (part.dense(dtype) for part in self.parts())
        return sum(rest, first)

    def fast_path(self, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
        if set(self.layouts) != {"csr"} or dtype != torch.float32 or torch.device(device).type != "cpu":
            return "", f"no product here reads {' and '.join(self.layouts)} in {str(dtype)[6:]}"
        density = self.values0.numel() / (self.out_features * self.in_features)
        gain = csr_gain(self.out_features, self.in_features, round(density, 2), torch.get_num_threads())
        if gain < 1:
            slower = f"a CSR product takes {1 / gain:.1f} times a dense one"
            return "", f"at {1 - density:.0%} zeros {slower} for a token"
        return "aten::_sparse_csr_mm", ""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        learning = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.parameters()))
        csr = set(self.layouts) == {"csr"} and x.dtype == torch.float32 and not x.is_cuda
        if not csr or learning or len(flat) > FEW:
            return super().forward(x)
        y = sum(part.times(flat) for part in self.parts())
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def settings(self) -> dict:
        return {
            "parts": [
                [part.layout, part.kept, str(part.tensors["values"].dtype)[6:]] for part in self.parts()
            ]
        }

    @classmethod
    def empty(cls, in_features, out_features, bias=None, *, parts) -> SparseLinear:
        shape = out_features, in_features
        return cls(tuple(_blank(shape, *part) for part in parts), bias)


FEW = 128  # tokens in a call from where on decoding the weight once is quicker than the CSR product
NM = ("values", "positions")
KEYS = {"bitmap": ("values", "bitmap"), "csr": ("values", "starts", "columns")}


@lru_cache(maxsize=256)
def csr_gain(n_out: int, n_in: int, density: float, threads: int) -> float:
    """How many times as fast as a dense product a CSR one is here, for a token in float32; measured."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(n_out, n_in, generator=generator)
    mask = torch.rand(n_out, n_in, generator=generator) < density
    sparse, x = encode(W, mask, "csr"), torch.randn(1, n_in, generator=generator)
    return seconds(lambda: x @ W.T, repeats=25) / seconds(lambda: sparse.times(x), repeats=25)


def _blank(shape: tuple[int, int], layout: str, kept: int, dtype: str) -> SparseWeight:
    """A weight of zeros in this layout, still to be filled."""
    mask = torch.arange(shape[0] * shape[1]).view(shape)
    if ":" in layout:
        n, m = pattern(layout)
        mask, kept = mask % m, n
    return encode(torch.zeros(shape, dtype=getattr(torch, dtype)), mask < kept, layout)
