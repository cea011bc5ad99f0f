"""Attention as two operations of torch: traced, with shapes without data, with their FLOPs counted.

On a CUDA device the Triton kernels run; elsewhere, in float32, and where Triton cannot run, torch's own
scaled_dot_product_attention. For inference: neither has a gradient.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightlib.kernels import triton_driver
from lightlib.kernels.flash_attention.reference import WIDEST, check, check_lengths, output, visible


@torch.library.custom_op("lightlib::flash_attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None) -> Tensor:
    """q (B, H, T, D), k and v (B, K, S, D), H a multiple of K -> (B, H, T, D), a token's heads side by side.

    The queries are the last T of S positions: query t sees the keys up to S - T + t, all of them where not
    `causal`. scale: 1 / sqrt(D) by default. Raises ValueError for shapes that do not fit.
    """
    check(q, k, v, causal, scale)
    if runs_here(q):
        from lightlib.kernels.flash_attention import triton_forward

        with torch.cuda.device(q.device):
            return triton_forward.attention(q, k, v, causal, scale)
    T, S = q.shape[2], k.shape[2]
    # torch's own is_causal takes the queries to be the first T positions
    mask = visible(T, S, q.device) if causal and 1 < T < S else None
    y = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal and T == S, scale=scale, enable_gqa=True
    )
    return output(q).copy_(y)


@torch.library.custom_op("lightlib::flash_decode", mutates_args=())
def decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """q (B, H, 1, D), k and v (B, K, S, D), H a multiple of K -> (B, H, 1, D).

    lengths (B), int32: how many of the S places of a cache hold keys, all by default; what lies in the others
    does not matter, and 0 gives zeros. Raises ValueError for shapes that do not fit.
    """
    check(q, k, v, True, scale)
    check_lengths(q, lengths)
    if runs_here(q):
        from lightlib.kernels.flash_attention import triton_decode

        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
        with torch.cuda.device(q.device):
            splits = triton_decode.splits_for(*k.shape[:3], processors)
            return triton_decode.decode(q, k, v, lengths, scale, splits=splits)
    mask = None
    if lengths is not None:
        held = torch.arange(k.shape[2], device=q.device) < lengths[:, None]  # (B, S)
        mask = held[:, None, None]
        k, v = (x.masked_fill(~held[:, None, :, None], 0) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True).contiguous()


@attention.register_fake
def _(q, k, v, causal=True, scale=None):
    return output(q)


@decode.register_fake
def _(q, k, v, lengths=None, scale=None):
    return q.new_empty(q.shape)


@register_flop_formula([torch.ops.lightlib.flash_attention, torch.ops.lightlib.flash_decode])
def flops(q, k, *_, out_shape=None, **__) -> int:
    """Those of both products with every key, seen or not, as torch counts its own attention."""
    return 4 * prod(q) * k[2]


def runs_here(q: Tensor) -> bool:
    """Whether the kernels run on such inputs."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    if q.numel() == 0 or q.shape[3] > WIDEST:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0) and not missing()


@lru_cache(maxsize=1)
def missing() -> str:
    """Why Triton cannot run here, said once as a warning; or ""."""
    if reason := triton_driver.missing():
        warnings.warn(f"attention is torch's own, since {reason}", stacklevel=2)
    return reason
