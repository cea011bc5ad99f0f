"""Products with one row as sums, which a compiler turns into loops at the speed of memory on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

LANES = 4  # rows of a weight that one pass over the input multiplies


def write_as_sums(graph: GraphModule) -> None:
    """On a CPU, products with one row become sums, which compile into loops at the speed of memory.

    A library's matmul reads a bfloat16 weight at half that speed, and each is a call; a sum fuses with what
    comes before and after it, so that a whole block becomes one function.
    """
    for part in graph.modules():
        if isinstance(part, GraphModule):
            for node in part.graph.nodes:
                node.target = SUMS.get(node.target, node.target)
            part.recompile()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (..., in), weight (out, in) -> (..., out)."""
    if x.numel() > x.shape[-1]:
        return F.linear(x, weight, bias)
    y = row_times(x.reshape(1, -1), weight)
    return (y if bias is None else y + bias).view(*x.shape[:-1], -1)


def linear8(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """ATen's 8-bit product: x (tokens, in), codes (out, in), scale (out) -> (tokens, out)."""
    return row_times(x, codes, scale) if len(x) == 1 else torch._weight_int8pack_mm(x, codes, scale)


def linear4(x: Tensor, layout: Tensor, group: int, scale_and_shift: Tensor) -> Tensor:
    """ATen's 4-bit product, its group size a tensor: inductor loses that number inside a region."""
    return torch.ops.quantized.int4mm_packed_weight_cpu(x, layout, torch.full((), group), scale_and_shift)


def row_times(x: Tensor, weight: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """x (1, in) times weight (out, in), each output times its scale: (1, out)."""
    # lanes of equal shape fuse into one loop, which reads as many rows at once for each value of x
    lanes, x = weight.chunk(LANES) if len(weight) % LANES == 0 else [weight], written(x)
    y = torch.cat([(wide(x) * wide(lane)).sum(-1) for lane in lanes])
    return (y * scale).to(x.dtype)[None]


def mm(x: Tensor, weight: Tensor) -> Tensor:
    """torch.mm: x (rows, in), weight (in, out) -> (rows, out)."""
    return column_times(x, weight) if len(x) == 1 else torch.mm(x, weight)


def addmm(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """torch.addmm: y (rows, out) + x (rows, in) times weight (in, out)."""
    return y + column_times(x, weight) if len(x) == 1 else torch.addmm(y, x, weight)


def column_times(x: Tensor, weight: Tensor) -> Tensor:
    """x (1, in) times weight (in, out): (1, out)."""
    return (wide(written(x)).T * wide(weight)).sum(0, keepdim=True).to(x.dtype)


def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask=None, scale: float | None = None, enable_gqa=False, **named
) -> Tensor:
    """F.scaled_dot_product_attention; of one query q (batch, heads, 1, d) as sums."""
    if q.shape[2] > 1 or attn_mask is None or attn_mask.dtype != torch.bool or any(named.values()):
        return F.scaled_dot_product_attention(q, k, v, attn_mask, scale=scale, enable_gqa=enable_gqa, **named)
    k, v = wide(k)[:, :, None], wide(v)[:, :, None]  # (batch, kv heads, 1, keys, d)
    groups = wide(written(q)).reshape(
        len(q), k.shape[1], -1, 1, q.shape[-1]
    )  # (batch, kv heads, group, 1, d)
    scores = (groups * k).sum(-1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.where(attn_mask, -torch.inf)  # (batch, kv heads, group, keys)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    mean = (weights[..., None] * v).sum(3) / weights.sum(-1, keepdim=True)
    return mean.reshape(q.shape).to(q.dtype)


def written(x: Tensor) -> Tensor:
    """x, which inductor writes to memory here; else it would be computed anew for each row it multiplies."""
    return x.contiguous().as_strided(x.shape, x.contiguous().stride())


def wide(x: Tensor) -> Tensor:
    """x in the precision that sums take: float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


SUMS = {
    F.linear: linear,
    torch.mm: mm,
    torch.addmm: addmm,
    F.scaled_dot_product_attention: attention,
    torch._weight_int8pack_mm: linear8,
    torch._weight_int4pack_mm_for_cpu: linear4,
}
