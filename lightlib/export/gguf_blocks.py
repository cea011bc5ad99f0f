"""GGUF's blocks: 32 inputs of a row of W (out, in) with a 16-bit scale d, and in Q4_1 a minimum m.

Q8_0: d, 32 signed bytes        w = d * q
Q4_0: d, 32 nibbles             w = d * (q - 8)      nibbles: byte j holds input j below, input j + 16 above
Q4_1: d, m, 32 nibbles          w = d * q + m
"""

from __future__ import annotations

import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from lightlib.compact import CompactLinear
from lightlib.export.codes import DENSE_WAY_OUT, integer_codes

BLOCK = 32
PLAIN = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}


def blocks(name: str, layer: CompactLinear) -> tuple[Kind, Tensor]:
    """(kind of block, the layer's weight as bytes (out, bytes a row)); larger groups repeat their scale.

    Symmetric codes and float_zero minima are kept exactly. The minimum that an integer zero point means,
    -zero * scale, is rounded to 16 bits: a weight moves by up to 15/2048 of a step.
    """
    weight = integer_codes(name, layer)
    grid, (out, n_in) = weight.grid, weight.codes.shape
    group = n_in // weight.scale.shape[1]
    if group % BLOCK:
        raise ValueError(
            f"{name}: GGUF's blocks hold {BLOCK} inputs, its groups {group}; "
            f"quantize with group_size={BLOCK}, or {DENSE_WAY_OUT}"
        )
    scale, zero = (t.repeat_interleave(group // BLOCK, 1)[..., None] for t in (weight.scale, weight.zero))
    codes = weight.codes.view(out, -1, BLOCK)  # (out, blocks, 32)
    if grid.symmetric and grid.bits <= 4:
        return Kind.Q4_0, rows(scale.half(), nibbles(codes + 8 - 2 ** (grid.bits - 1)))
    if grid.symmetric:
        return Kind.Q8_0, rows(scale.half(), (codes.int() - 2 ** (grid.bits - 1)).to(torch.int8))
    if grid.bits <= 4:
        minimum = zero if grid.float_zero else -zero * scale
        return Kind.Q4_1, rows(scale.half(), minimum.half(), nibbles(codes))
    raise ValueError(
        f"{name}: GGUF's blocks of more than 4 bits have no zero point; quantize with "
        f"Int({grid.bits}, group_size={grid.group_size}, symmetric=True), or {DENSE_WAY_OUT}"
    )


def plain(tensor: Tensor) -> tuple[Kind, Tensor]:
    """(kind, bytes) of a dense tensor: a matrix in its dtype, a vector in float32, as llama.cpp asks."""
    tensor = tensor.detach().cpu()
    tensor = (tensor.float() if tensor.dim() == 1 else tensor).contiguous()
    return PLAIN[tensor.dtype], tensor.view(torch.uint8)


def nibbles(codes: Tensor) -> Tensor:
    """Codes below 16 (..., 32), two in a byte (..., 16)."""
    return codes[..., :16] | codes[..., 16:] << 4


def rows(*parts: Tensor) -> Tensor:
    """The parts of each block (out, blocks, n) side by side as bytes: uint8 (out, bytes a row)."""
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1).flatten(1)


def halves_to_pairs(weight: Tensor, heads: int) -> Tensor:
    """The rows of a query or key weight in the order of llama.cpp, which rotates neighbours, not halves.

    >>> halves_to_pairs(torch.tensor([[0], [1], [2], [3]]), heads=1).flatten()
    tensor([0, 2, 1, 3])
    """
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
