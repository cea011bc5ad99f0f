"""Keys and values as small codes: keys rounded per channel, values per token.

Keys have channels that are large at every token; with a scale of their own they do not coarsen the others.
Liu et al. 2024 (KIVI), arXiv:2402.02750; Hooper et al. 2024 (KVQuant), arXiv:2401.18079.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightlib.packing import pack, unpack

ALONG = {"channel": -2, "token": -1}  # over which axis of (..., tokens, channels) the numbers share a scale


def quantize(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """x as codes (uint8) * scale + minimum, with one scale and one minimum for all numbers along `dim`.

    Both are float16, which holds a minimum from bfloat16 exactly, and codes are taken on the grid as it is
    stored: a number is off by half a scale at most, and by what float16 loses of the minimum. Numbers that
    are all the same come back as they were, or, from float32, as float16 holds them.
    """
    x, levels = x.float(), 2**bits - 1
    minimum = x.amin(dim, keepdim=True).half()
    scale = ((x.amax(dim, keepdim=True) - minimum.float()).clamp_min(0) / levels).half()
    step = scale.float().where(scale > 0, 1.0)
    codes = ((x - minimum.float()) / step).round().clamp(0, levels)
    return codes.to(torch.uint8), scale, minimum


def dequantize(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """code * scale + minimum, in float32."""
    return codes * scale.float() + minimum.float()


@dataclass(frozen=True)
class Packed:
    """G groups of tokens of B sequences: codes (B, K, G, bytes), scale and minimum (B, K, G, ...)."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> Packed:
        return Packed(change(self.codes), change(self.scale), change(self.minimum))

    def then(self, later: Packed) -> Packed:
        """These groups and those of later tokens."""
        pairs = ((self.codes, later.codes), (self.scale, later.scale), (self.minimum, later.minimum))
        return Packed(*(torch.cat(pair, 2) for pair in pairs))


@dataclass(frozen=True)
class Rounding:
    """How keys or values become codes: `group_size` tokens share a channel's scale, or channels a token's.

    Of a head with fewer channels all share one; where they are no multiple, the greatest common divisor does.
    """

    bits: int
    group_size: int
    per: str  # "channel" or "token"

    def channels(self, head_dim: int) -> int:
        """How many channels of a token share a scale."""
        return head_dim if head_dim <= self.group_size else math.gcd(head_dim, self.group_size)

    def encode(self, x: Tensor) -> Packed:
        """x (B, K, S, D), S a multiple of group_size."""
        x = x.unflatten(2, (-1, self.group_size))  # (B, K, G, g, D)
        if self.per == "token":
            x = x.unflatten(-1, (-1, self.channels(x.shape[-1])))  # (B, K, G, g, n, c)
        codes, scale, minimum = quantize(x, self.bits, ALONG[self.per])
        # eight tokens fill whole bytes, so a group ends where a byte does
        return Packed(pack(codes, self.bits).view(*x.shape[:3], -1), scale, minimum)

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """What is left of x (B, K, S, D)."""
        shape = list(packed.scale.shape)
        shape[ALONG[self.per]] = packed.codes.numel() * 8 // self.bits // packed.scale.numel()
        codes = unpack(packed.codes.flatten(), self.bits, tuple(shape))
        x = dequantize(codes, packed.scale, packed.minimum).to(dtype)
        return x.flatten(4).flatten(2, 3)  # (B, K, G, g, ...) -> (B, K, S, D)

    def group_bytes(self, head_dim: int) -> int:
        """What a group of tokens takes for a key-value head: codes, and 4 bytes a scale with its minimum."""
        numbers = self.group_size * head_dim
        shared = self.group_size if self.per == "channel" else self.channels(head_dim)
        return numbers * self.bits // 8 + 4 * (numbers // shared)
