"""Integer codes of 4 or 8 bits as the kernels read them: two halves of a block of columns in one byte.

A block is the part of a group that is multiplied at once, 128, 64 or 32 columns. Of 4-bit codes, byte j of a
block holds column j in its low and column j + block / 2 in its high bits: a load of bytes side by side yields
two runs of columns side by side, each with its own run of x, and nothing has to be interleaved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCKS = (128, 64, 32)


@dataclass(frozen=True)
class Packed:
    """A weight (out, in) of unsigned codes: W = (code - zero) scale; group inputs side by side share a scale.

    codes: uint8 (out, in / 2) in 4 bits, (out, in) in 8. scale: float16 (groups, out), so that the scales of
    rows side by side are read at once. zero: None where it is the middle code, 2^(bits - 1); uint8 (groups,
    out), a code; or float16 (groups, out), the value of code 0: W = code scale + zero.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    shape: tuple[int, int]

    @property
    def group(self) -> int:
        return self.shape[1] // len(self.scale)

    @property
    def block(self) -> int:
        """Columns that are multiplied at once: the largest of 128, 64 and 32 that divides the group."""
        return next(size for size in BLOCKS if self.group % size == 0)

    @property
    def kind_of_zero(self) -> str:
        """Which of the three `zero` is: "middle", "code" or "value"."""
        return "middle" if self.zero is None else "value" if self.zero.is_floating_point() else "code"

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (out, groups, group) in uint8; scale and zero (out, groups, 1) in float32."""
        codes = self.codes
        if self.bits == 4:
            halves = codes.view(len(codes), -1, 1, self.block // 2)
            codes = torch.cat([halves & 15, halves >> 4], 2)  # (out, blocks, 2, block / 2)
        scale = self.scale.T.float()[..., None]
        if self.zero is None:
            zero = torch.full_like(scale, 2 ** (self.bits - 1))
        else:
            zero = self.zero.T.float()[..., None]
        return codes.reshape(self.shape[0], len(self.scale), self.group), scale, zero

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out, in)."""
        codes, scale, zero = self.parts()
        W = codes * scale + zero if self.kind_of_zero == "value" else (codes - zero) * scale
        return W.flatten(1).to(dtype)

    def stored_bits(self) -> int:
        return sum(t.nbytes * 8 for t in (self.codes, self.scale, self.zero) if t is not None)


def encode(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bits: int = 4,
    *,
    float_zero: bool = False,
    name: str = "weight",
) -> Packed:
    """Codes (out, in) of 2 to 8 bits; up to 4 are stored in 4 bits, more in 8.

    scale and zero: (out, groups), or (1, 1) for all. zero: None for the middle code, a code for each group,
    or with float_zero the value of code 0. Raises ValueError for groups that 32 does not divide.
    """
    n_out, n_in = codes.shape
    groups, lift = scale.shape[1], 0
    if n_in % (32 * groups):
        raise ValueError(
            f"{name}: groups of {n_in / groups:g} in a weight of {n_out} x {n_in}; the kernels read "
            "groups that 32 divides: quantize with such a group_size, or leave this layer as it is"
        )
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"{name}: code {int(codes.max())} does not fit in {bits} bits")
    stored = 4 if bits <= 4 else 8
    if zero is None:
        lift = 2 ** (stored - 1) - 2 ** (bits - 1)  # the middle code comes to lie in the middle
    else:
        zero = turned(zero, n_out).to(torch.float16 if float_zero else torch.uint8)
    codes = codes.to(torch.uint8) + lift
    whole = Packed(codes, turned(scale, n_out).half(), zero, stored, (n_out, n_in))
    if stored == 8:
        return whole
    halves = codes.view(n_out, -1, 2, whole.block // 2)
    pairs = (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)
    return Packed(pairs, whole.scale, zero, stored, whole.shape)


def turned(part: Tensor, n_out: int) -> Tensor:
    """(out, groups), or (1, 1) for all rows, as (groups, out)."""
    return part.expand(n_out, -1).T.contiguous()
