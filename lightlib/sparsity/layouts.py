"""How a sparse weight is stored: what stays of it, and where each value belongs.

| layout | a weight takes, beside the values that stay |
| "bitmap" | one bit for each weight, kept or not |
| "csr" | 32 bits for each value (its column) and for each row |
| "n:m" | ceil(log2 m) bits for each value: its place in its group |
| "csl" | 16 bits for each value (its place in a tile of 128 x 64) and 32 for each tile; only counted here |

"csl" is Flash-LLM's, Xia et al. 2023, arXiv:2309.10285.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log2

import torch
from torch import Tensor

from lightlib.packing import pack, unpack, whole_bytes
from lightlib.sparsity.masks import pattern


@dataclass(frozen=True)
class SparseWeight:
    """A weight (out, in) in a layout. tensors: its values, row by row, and what tells their places."""

    layout: str
    shape: tuple[int, int]
    tensors: dict[str, Tensor]

    @property
    def kept(self) -> int:
        """How many values are stored."""
        return self.tensors["values"].numel()

    def stored_bits(self) -> int:
        return sum(t.numel() * t.element_size() * 8 for t in self.tensors.values())

    def mask(self) -> Tensor:
        """Where values are stored, zeros among them too: bool (out, in)."""
        if self.layout == "bitmap":
            return unpack(self.tensors["bitmap"], 1, self.shape).bool()
        flat = torch.zeros(self.shape, dtype=torch.bool, device=self.tensors["values"].device).view(-1)
        flat[self._places()] = True
        return flat.view(self.shape)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in), zeros where nothing is stored. Gradients reach the values."""
        values = self.tensors["values"].to(dtype)
        if self.layout == "bitmap":
            return values.new_zeros(self.shape).masked_scatter(self.mask(), values)
        if self.layout != "csr":
            n, m = pattern(self.layout)
            groups = values.new_zeros(self.shape[0] * self.shape[1] // m, m)
            return groups.scatter(1, self._within().view(-1, n), values.view(-1, n)).view(self.shape)
        return values.new_zeros(self.shape).view(-1).index_put((self._places(),), values).view(self.shape)

    def times(self, x: Tensor) -> Tensor:
        """x (tokens, in) W^T -> (tokens, out) for the layout "csr", without building W."""
        _told_once_that_csr_is_new()
        starts, columns, values = (self.tensors[key] for key in ("starts", "columns", "values"))
        W = torch.sparse_csr_tensor(starts, columns, values.detach(), self.shape, check_invariants=False)
        return (W @ x.T).T

    def _places(self) -> Tensor:
        """The place of each value in the weight read row by row: int64 (kept)."""
        n_out, n_in = self.shape
        if self.layout == "csr":
            starts = self.tensors["starts"].long()
            rows = torch.arange(n_out, device=starts.device).repeat_interleave(starts.diff())
            return rows * n_in + self.tensors["columns"].long()
        n, m = pattern(self.layout)
        within = self._within()
        return within + torch.arange(n_out * n_in // m, device=within.device).repeat_interleave(n) * m

    def _within(self) -> Tensor:
        """The place of each value of an n:m weight in its group: int64 (kept)."""
        return unpack(self.tensors["positions"], bits_for(pattern(self.layout)[1]), (self.kept,)).long()


def encode(weight: Tensor, mask: Tensor, layout: str) -> SparseWeight:
    """The values of `weight` (out, in) where `mask` is True. ValueError where the mask does not fit."""
    shape, values = tuple(weight.shape), weight.detach()[mask]
    if layout == "bitmap":
        return SparseWeight(layout, shape, {"values": values, "bitmap": pack(mask.byte(), 1)})
    if layout == "csr":
        starts = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        columns = mask.nonzero()[:, 1]
        return SparseWeight(
            layout, shape, {"values": values, "starts": starts.int(), "columns": columns.int()}
        )
    n, m = pattern(layout)
    counts = mask.view(-1, m).sum(1) if shape[1] % m == 0 else None
    if counts is None or (counts != n).any():
        raise ValueError(f"not every {m} weights of a row {shape} keep {n}: the mask is not {layout}")
    within = mask.view(-1, m).nonzero()[:, 1]
    return SparseWeight(layout, shape, {"values": values, "positions": pack(within.byte(), bits_for(m))})


def layout_bits(layout: str, shape: tuple[int, int], kept: int, value_bits: int) -> int:
    """The bits that `kept` values of `value_bits` take in `layout`, without building it."""
    n_out, n_in = shape
    if layout == "bitmap":
        return kept * value_bits + whole_bytes(n_out * n_in, 1)
    if layout == "csr":
        return kept * (value_bits + 32) + 32 * (n_out + 1)
    if layout == "csl":
        return kept * (value_bits + 16) + 32 * (ceil(n_out / 128) * ceil(n_in / 64) + 1)
    return kept * value_bits + whole_bytes(kept, bits_for(pattern(layout)[1]))


def smallest(mask: Tensor, value_bits: int, layouts: tuple[str, ...] = ("bitmap", "csr")) -> str:
    """The layout that takes the fewest bits for this mask."""
    kept, shape = int(mask.sum()), tuple(mask.shape)
    return min(layouts, key=lambda layout: layout_bits(layout, shape, kept, value_bits))


@lru_cache(maxsize=1)
def _told_once_that_csr_is_new() -> None:
    """torch warns at the first CSR tensor of a process, which is this one; no user could act on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1))


def bits_for(m: int) -> int:
    """Bits that tell one of m places."""
    return ceil(log2(m))
