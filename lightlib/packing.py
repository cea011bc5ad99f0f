"""Small numbers without gaps between them: codes of 1 to 8 bits, eight at a time in `bits` bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def whole_bytes(n: int, bits: int) -> int:
    """The bits that `n` packed codes take: 8 codes at a time."""
    return -(-n // 8) * 8 * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (uint8, any shape) without gaps, 8 codes in `bits` bytes; the end is filled with 0."""
    flat = codes.flatten()
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8).long()
    word = (flat << torch.arange(0, 8 * bits, bits, device=flat.device)).sum(1, keepdim=True)
    return (word >> torch.arange(0, 8 * bits, 8, device=flat.device) & 255).to(torch.uint8).flatten()


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The codes (uint8) of `shape` that `pack` laid side by side."""
    if bits == 8:
        flat = packed
    elif bits in (1, 2, 4):
        places = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        flat = (packed[:, None] >> places & 2**bits - 1).flatten()
    else:
        word = (packed.view(-1, bits).long() << torch.arange(0, 8 * bits, 8, device=packed.device)).sum(
            1, keepdim=True
        )
        flat = (
            (word >> torch.arange(0, 8 * bits, bits, device=packed.device) & 2**bits - 1)
            .to(torch.uint8)
            .flatten()
        )
    return flat[: torch.Size(shape).numel()].view(shape)
