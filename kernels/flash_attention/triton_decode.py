"""Attention of one new query to a long cache, in Triton: the keys are cut in parts, read side by side.

One query leaves most of a GPU idle, so every part has a program of its own (flash decoding), which leaves the
m_i, l_i and A_i of triton_forward.py for its keys. With m the largest m_i, a second kernel puts together

    sum A_i 2^(m_i - m) / sum l_i 2^(m_i - m)

The query heads that share keys and values are the rows of one product, filled up to the 16 of a tensor core.
Dao et al. 2023, "Flash-Decoding for long-context inference"; the recurrence is that of arXiv:2205.14135.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightlib.kernels.flash_attention.reference import check, check_lengths
from lightlib.kernels.flash_attention.triton_forward import exponent, load, readable, upcast, walk, width

PROGRAMS = 2  # a multiprocessor should have at least so many, or the keys are cut
LONGEST = 64  # keys in a block, at most; a part is of whole blocks
PARTS = tl.constexpr(16)  # how many are put together at once


@triton.jit
def decode_kernel(
    q, k, v, lengths, sums, totals, peaks, scale, S, group,
    q_b, q_h, k_b, k_h, k_s, v_b, v_h, v_s,
    D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The `group` queries that share a kv head, and one part of its keys; grid (parts, K, B)."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    length = S
    if lengths is not None:
        length = tl.minimum(S, tl.load(lengths + batch))
    each = tl.cdiv(tl.cdiv(length, parts), N) * N
    begin, end = part * each, tl.minimum(length, part * each + each)

    row, column = tl.arange(0, M), tl.arange(0, WIDTH)
    query = load(q + batch * q_b + head * group * q_h, row, column, q_h, group, D, True)
    acc = tl.zeros([M, WIDTH], tl.float32)
    total = tl.zeros([M], tl.float32)
    peak = tl.full([M], float("-inf"), tl.float32)
    reach = tl.zeros([M], tl.int32) + (end - 1)
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    # keys from `end` on are not read, whatever lies there
    acc, total, peak = walk(
        acc, total, peak, query, k, v, k_s, v_s, scale, reach, begin, end, end, D, WIDTH, N, True, UPCAST
    )
    place = ((batch * tl.num_programs(1) + head) * group + row) * parts + part
    tl.store(totals + place, total, mask=row < group)
    tl.store(peaks + place, peak, mask=row < group)
    inside = (row[:, None] < group) & (column[None, :] < D)
    tl.store(sums + place[:, None] * D + column[None, :], acc, mask=inside)


@triton.jit
def combine_kernel(sums, totals, peaks, out, parts, D: tl.constexpr, WIDTH: tl.constexpr):
    """out (D) of one head from its parts: the recurrence again, on sums; grid (B H)."""
    head = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    acc = tl.zeros([WIDTH], tl.float32)
    total = tl.zeros([1], tl.float32)
    # finite, so that a cache without a key gives no -inf - -inf
    peak = tl.full([1], -1e38, tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        at, here = head * parts + part, part < parts
        peaks_here = tl.load(peaks + at, mask=here, other=float("-inf"))
        higher = tl.maximum(peak, tl.max(peaks_here, 0))
        share = tl.exp2(peaks_here - higher)
        shrink = tl.exp2(peak - higher)
        inside = here[:, None] & (column[None, :] < D)
        part_sums = tl.load(sums + at[:, None] * D + column[None, :], mask=inside, other=0.0)
        acc = acc * shrink + tl.sum(part_sums * share[:, None], 0)
        total = total * shrink + tl.sum(tl.load(totals + at, mask=here, other=0.0) * share, 0)
        peak = higher
    row = tl.where(total > 0, acc / total, 0.0)
    tl.store(out + head * D + column, row.to(out.dtype.element_ty), mask=column < D)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    scale: float | None = None,
    *,
    splits: int = 1,
) -> Tensor:
    """q (B, H, 1, D), k and v (B, K, S, D), float16 or bfloat16 -> (B, H, 1, D).

    lengths (B), int32: how many of the S places of a cache hold keys, all by default; 0 gives zeros. splits:
    in how many parts the keys are cut. Raises ValueError for shapes that do not fit, TypeError for types.
    """
    check(q, k, v, True, scale)
    check_lengths(q, lengths)
    q, k, v = (readable(x, q.dtype) for x in (q, k, v))
    B, H, _, D = q.shape
    K, S = k.shape[1:3]
    sums = torch.empty(B, H, splits, D, device=q.device)
    totals, peaks = torch.empty(2, B, H, splits, device=q.device)
    out = q.new_empty(B, H, 1, D)
    lengths = None if lengths is None else lengths.contiguous()
    decode_kernel[(splits, K, B)](
        q, k, v, lengths, sums, totals, peaks, exponent(scale, D), S, H // K,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        D=D, WIDTH=width(D), UPCAST=upcast(q), **blocks(D, H // K),
    )  # fmt: skip
    combine_kernel[(B * H,)](sums, totals, peaks, out, splits, D=D, WIDTH=width(D))
    return out


def blocks(D: int, group: int) -> dict[str, int]:
    """M queries, N keys: two or three blocks of keys and of values are under way in shared memory."""
    N, stages = (LONGEST, 3) if D <= 128 else (32, 2) if D <= 256 else (16, 2)
    return {"M": max(16, triton.next_power_of_2(group)), "N": N, "num_stages": stages, "num_warps": 4}


def splits_for(batch: int, kv_heads: int, keys: int, processors: int) -> int:
    """In how many parts the keys are cut, so that all multiprocessors have work and no part is empty.

    >>> splits_for(1, 8, 8192, 132)
    32
    """
    wanted = max(1, PROGRAMS * processors // (batch * kv_heads))
    each = triton.cdiv(triton.cdiv(keys, wanted), LONGEST) * LONGEST
    return triton.cdiv(keys, each)
