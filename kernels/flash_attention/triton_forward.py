"""Attention without the T x S matrix of scores, in Triton: keys and values go by in blocks, queries stay.

For a tile of queries and the j-th block of keys, with m the largest score so far, l the sum of the weights
and A the weighted sum of the values, none of them normalised:

    s = c q k_j^T                                  c = scale log2(e), so that exp2 takes the place of exp
    m' = max(m, max s)          p = 2^(s - m')
    l' = l 2^(m - m') + sum p   A' = A 2^(m - m') + p v_j

and A / l at the end. Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691; the running maximum is
Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

from math import e, log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightlib.kernels.flash_attention.reference import WIDEST, check, output


@triton.jit
def dot(a, b, onto, UPCAST: tl.constexpr):
    """onto + a b; UPCAST: Triton's interpreter multiplies the bit patterns of bfloat16."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, onto)


@triton.jit
def absorb(acc, total, peak, scores, v, scale, UPCAST: tl.constexpr):
    """The recurrence: A, l, m of M queries and the raw scores (M, N) of N more keys, v (N, D)."""
    higher = tl.maximum(peak, tl.max(scores, 1) * scale)
    shrink = tl.exp2(peak - higher)
    weights = tl.exp2(scores * scale - higher[:, None])
    total = total * shrink + tl.sum(weights, 1)
    acc = dot(weights.to(v.dtype), v, acc * shrink[:, None], UPCAST)
    return acc, total, higher


@triton.jit
def load(x, row, column, stride, rows, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows of x, of D values each; zeros from row `rows` on, looked at where MASKED, and from column D on."""
    at = x + row[:, None] * stride + column[None, :]
    if MASKED:
        return tl.load(at, mask=(row[:, None] < rows) & (column[None, :] < D), other=0.0)
    elif column.shape[0] > D:
        return tl.load(at, mask=column[None, :] < D, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def walk(
    acc, total, peak, query, k, v, k_s, v_s, scale, reach, begin, end, S,
    D: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Absorbs the keys begin to end; where MASKED, a query sees those up to its `reach` (M)."""
    step, column = tl.arange(0, N), tl.arange(0, WIDTH)
    k += tl.cast(begin, tl.int64) * k_s
    v += tl.cast(begin, tl.int64) * v_s
    for first in range(begin, end, N):
        scores = tl.zeros([query.shape[0], N], tl.float32)
        scores = dot(query, load(k, step, column, k_s, S - first, D, MASKED).T, scores, UPCAST)
        if MASKED:
            scores = tl.where(first + step[None, :] <= reach[:, None], scores, float("-inf"))
        values = load(v, step, column, v_s, S - first, D, MASKED)
        acc, total, peak = absorb(acc, total, peak, scores, values, scale, UPCAST)
        k += N * k_s
        v += N * v_s
    return acc, total, peak


@triton.jit
def attention_kernel(
    q, k, v, out, scale, T, S, group,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_t,
    CAUSAL: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """M queries of one head; grid (tiles, H, B). x_b, x_h, x_t, x_s: strides of the tensor x."""
    # the last tile sees most keys, so it starts first
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    k += batch * k_b + head // group * k_h
    v += batch * v_b + head // group * v_h
    row, column = tl.arange(0, M), tl.arange(0, WIDTH)
    query = load(
        q + batch * q_b + head * q_h + first.to(tl.int64) * q_t, row, column, q_t, T - first, D, True
    )

    # a tile's queries all see the keys before `whole`, and none sees `end`
    end, reach = S, tl.zeros([M], tl.int32) + (S - 1)
    whole = S // N * N
    if CAUSAL:
        reach = tl.minimum(reach, first + row + S - T)
        end = tl.minimum(S, first + M + S - T)
        whole = tl.minimum(S, first + 1 + S - T) // N * N

    acc = tl.zeros([M, WIDTH], tl.float32)
    total = tl.zeros([M], tl.float32)
    peak = tl.full([M], float("-inf"), tl.float32)
    acc, total, peak = walk(
        acc, total, peak, query, k, v, k_s, v_s, scale, reach, 0, whole, S, D, WIDTH, N, False, UPCAST
    )
    acc, total, peak = walk(
        acc, total, peak, query, k, v, k_s, v_s, scale, reach, whole, end, S, D, WIDTH, N, True, UPCAST
    )
    at = out + batch * o_b + head * o_h + first.to(tl.int64) * o_t + row[:, None] * o_t + column[None, :]
    inside = (row[:, None] < T - first) & (column[None, :] < D)
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None) -> Tensor:
    """q (B, H, T, D), k and v (B, K, S, D), float16 or bfloat16 -> (B, H, T, D), its heads side by side.

    The queries are the last T of S positions; query head h reads kv head h // (H / K); scale: 1 / sqrt(D) by
    default. Raises ValueError for shapes that do not fit, TypeError for other types.
    """
    check(q, k, v, causal, scale)
    q, k, v = (readable(x, q.dtype) for x in (q, k, v))
    B, H, T, D = q.shape
    out = output(q)
    block = blocks(D, wgmma(q))
    attention_kernel[(triton.cdiv(T, block["M"]), H, B)](
        q, k, v, out, exponent(scale, D), T, k.shape[2], H // k.shape[1],
        *(x.stride(i) for x in (q, k, v, out) for i in range(3)),
        CAUSAL=causal, D=D, WIDTH=width(D), UPCAST=upcast(q), **block,
    )  # fmt: skip
    return out


def blocks(D: int, wgmma: bool) -> dict[str, int]:
    """The largest tiles (M queries, N keys) whose sums stay in registers. wgmma: Hopper's tensor cores."""
    sizes = [
        (64, (128, 64, 3)),
        (128, (128, 64, 2) if wgmma else (128, 32, 3)),
        (256, (64, 32, 2)),
        (WIDEST, (32, 16, 2)),
    ]
    M, N, stages = next(tile for most, tile in sizes if most >= D)
    return {"M": M, "N": N, "num_stages": stages, "num_warps": 8}


def width(D: int) -> int:
    """How many columns of a tensor core's product a head of D values takes."""
    return max(16, triton.next_power_of_2(D))


def wgmma(q: Tensor) -> bool:
    """Whether the device multiplies tiles from shared memory, so that no register holds keys or values."""
    return q.is_cuda and torch.cuda.get_device_capability(q.device)[0] in (9, 10)


def upcast(q: Tensor) -> bool:
    """Whether products are taken in float32: Triton's interpreter has none of bfloat16."""
    return triton.knobs.runtime.interpret and q.dtype == torch.bfloat16


def exponent(scale: float | None, D: int) -> float:
    """What a score is multiplied with before exp2."""
    return (D**-0.5 if scale is None else scale) * log2(e)


def readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x with the values of a head side by side. Raises for types and sizes that the kernels do not read."""
    if x.dtype != dtype or dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"q is {dtype}, k or v {x.dtype}; the kernels read float16 or bfloat16 in all three")
    if x.shape[3] > WIDEST:
        raise ValueError(f"a head of {x.shape[3]} values is beyond {WIDEST}; use torch's own attention")
    return x if x.stride(3) == 1 else x.contiguous()
