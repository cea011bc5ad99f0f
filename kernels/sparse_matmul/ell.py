"""Row-ELL with short columns: for one or two tokens, where every value should cost little more than itself.

A row's values stand in groups of 32 whose columns lie within 256: each value takes 2 bytes and one for its
column, counted from the first of its group, which takes 2 bytes. Where 32 values spread over more than 256
columns, the group is filled up with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

GROUP, SPAN = 32, 256  # values of a group; columns that they lie in
GROUPS = 8  # of a chunk: what 32 lanes load at once, 8 values each
CHUNK = GROUP * GROUPS


@dataclass(frozen=True)
class ELL:
    """A weight (out, in) of 16-bit values; every row takes as many chunks of 256 as the longest one.

    values: 16 bits (out, chunks, 256). columns: uint8 (out, chunks, 256), from the first of the group. first:
    int16 (out, chunks, 8), the first column of each group, as an unsigned number. Slot 8 lane + g of a chunk
    holds value `lane` of group g: lanes load 8 slots at once, and then read inputs that lie side by side.
    """

    values: Tensor
    columns: Tensor
    first: Tensor
    shape: tuple[int, int]

    def stored_bits(self) -> int:
        return sum(t.numel() * t.element_size() * 8 for t in (self.values, self.columns, self.first))

    def dense(self) -> Tensor:
        """The weight (out, in)."""
        n_out = self.shape[0]
        group = torch.arange(CHUNK, device=self.values.device) % GROUPS
        first = (self.first.long() & 0xFFFF)[:, :, group]  # (out, chunks, 256)
        places = (first + self.columns.long()).view(n_out, -1)
        values = self.values.view(torch.int16).view(n_out, -1).int() & 0xFFFF
        # filled-up slots hold zeros, and no value is stored twice: adding bits puts each in its place
        whole = torch.zeros(n_out, self.shape[1] + SPAN, dtype=torch.int32, device=values.device)
        whole.scatter_add_(1, places, values)
        return whole[:, : self.shape[1]].to(torch.int16).view(self.values.dtype).contiguous()


def encode(weight: Tensor, mask: Tensor | None = None) -> ELL:
    """`weight` (out, in) of 16-bit values where `mask` is True; by default where it is not zero, or NaN.

    Raises TypeError for values of another size, ValueError for more than 65536 columns.
    """
    if weight.element_size() != 2:
        raise TypeError(f"ELL stores 16-bit values, not {weight.dtype}; cast the weight first")
    n_out, n_in = weight.shape
    if n_in > 2**16:
        raise ValueError(f"in_features {n_in} exceed the 65536 columns that 16 bits tell apart")
    mask = weight != 0 if mask is None else mask
    counts, device = mask.sum(1), weight.device
    longest = int(counts.max())
    # the columns of each row's values, left-aligned; what is beyond lies out of any group's reach
    order = (~mask).int().argsort(dim=1, stable=True)[:, :longest]
    beyond = torch.arange(longest, device=device) >= counts[:, None]
    columns = torch.nn.functional.pad(order.masked_fill(beyond, 2**20), (0, GROUP), value=2**20)
    at, firsts, places = torch.zeros(n_out, 1, dtype=torch.long, device=device), [], []
    while (at[:, 0] < counts).any():
        within = columns.gather(1, at.clamp_max(longest) + torch.arange(GROUP, device=device))  # (out, 32)
        base = within[:, :1] * (within[:, :1] < n_in)
        inside = within - base < SPAN
        firsts.append(base[:, 0])
        places.append(torch.where(inside, within - base, -1))
        at = at + inside.sum(1, keepdim=True)
    chunks = max(1, ceil(len(places) / GROUPS))
    first = torch.zeros(n_out, chunks * GROUPS, dtype=torch.long, device=device)
    offsets = torch.full((n_out, chunks * GROUPS, GROUP), -1, device=device)
    if places:
        first[:, : len(firsts)], offsets[:, : len(places)] = torch.stack(firsts, 1), torch.stack(places, 1)
    filled = offsets >= 0
    offsets = offsets.clamp_min(0)
    rows = torch.arange(n_out, device=device)[:, None, None]
    bits = weight.view(torch.int16)[rows, first[..., None] + offsets * filled] * filled
    # (out, chunks, groups, values) -> slots: value by value, its groups side by side
    parts = (t.view(n_out, chunks, GROUPS, GROUP).transpose(2, 3).flatten(2) for t in (bits, offsets))
    values, columns = (t.contiguous() for t in parts)
    first = (first - (first >> 15 << 16)).to(torch.int16).view(n_out, chunks, GROUPS)
    return ELL(values.to(torch.int16).view(weight.dtype), columns.to(torch.uint8), first, (n_out, n_in))
