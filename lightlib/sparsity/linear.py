"""SparseLinear: a linear layer that stores only the weights that stay, and where they belong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightlib.compact import CompactLinear
from lightlib.sparsity.csr_speed import csr_gain, csr_pays_from
from lightlib.sparsity.layouts import SparseWeight, encode
from lightlib.sparsity.masks import pattern
from lightlib.sparsity.semi_structured import hardware_places, misfit, semi_structured


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
        self.register_buffer("places", None, persistent=False)  # 2:4 on CUDA: the positions as it reads them

    def parts(self) -> tuple[SparseWeight, ...]:
        """The sparse weights whose sum W is."""
        shape = self.out_features, self.in_features
        return tuple(
            SparseWeight(layout, shape, {key: getattr(self, f"{key}{i}") for key in KEYS.get(layout, NM)})
            for i, layout in enumerate(self.layouts)
        )

    @property
    def density(self) -> float:
        """The share of weights that are stored."""
        return sum(part.kept for part in self.parts()) / (self.out_features * self.in_features)

    def mask(self) -> Tensor:
        """Where values are stored: bool (out, in)."""
        return torch.stack([part.mask() for part in self.parts()]).any(0)

    def learnable(self) -> dict[str, Tensor]:
        return {f"values{i}": part.mask() for i, part in enumerate(self.parts())}

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        first, *rest = (part.dense(dtype) for part in self.parts())
        return sum(rest, first)

    def fast_path(self, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
        shape, read = (self.out_features, self.in_features), " and ".join(self.layouts)
        if torch.device(device).type == "cuda" and self.layouts == ("2:4",):
            reason = misfit(shape, dtype)
            return "" if reason else "torch.sparse.SparseSemiStructuredTensor", reason
        reason = f"no product here reads {read} in {str(dtype)[6:]}"
        if torch.device(device).type != "cpu" or dtype != torch.float32:
            return "", reason
        threads, density = torch.get_num_threads(), self.density
        gain = csr_gain(*shape, round(density, 2), threads)
        if gain >= 1:
            faster = f"{reason}; as CSR, {gain:.1f} times as fast as dense, one does (see sparsity.store)"
            return ("aten::_sparse_csr_mm", "") if read == "csr" else ("", faster)
        slower = (
            f"at {1 - density:.0%} zeros a CSR product takes {1 / gain:.1f} times a dense one for a token, "
            f"and pays from {csr_pays_from(*shape, threads):.0%} zeros on"
        )
        return "", slower if read == "csr" else f"{reason}, and {slower}"

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.parameters())):
            return super().forward(x)
        flat, first = x.reshape(-1, self.in_features), self.parts()[0]
        cores = x.is_cuda and self.layouts == ("2:4",) and self.values0.dtype == x.dtype
        if cores and not misfit(first.shape, x.dtype):
            if self.places is None:
                self.places = hardware_places(first)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            y = F.linear(flat, semi_structured(first, self.places), bias)
        elif not x.is_cuda and self.layouts == ("csr",) and x.dtype == torch.float32 and len(flat) <= FEW:
            y = first.times(flat)
            y = y if self.bias is None else y + self.bias
        else:
            return super().forward(x)
        return y.view(*x.shape[:-1], self.out_features)

    def stored(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in super().stored().items() if name != "places"}

    def _apply(self, fn, recurse=True):
        self.places = None  # it belongs to the device, and is made anew from the positions
        return super()._apply(fn, recurse)

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


def _blank(shape: tuple[int, int], layout: str, kept: int, dtype: str) -> SparseWeight:
    """A weight of zeros in this layout, still to be filled."""
    mask = torch.arange(shape[0] * shape[1]).view(shape)
    if ":" in layout:
        n, m = pattern(layout)
        mask, kept = mask % m, n
    return encode(torch.zeros(shape, dtype=getattr(torch, dtype)), mask < kept, layout)
