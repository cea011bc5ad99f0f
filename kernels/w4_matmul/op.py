"""The product with 4- or 8-bit codes as an operation of torch: traced, shaped without data, FLOPs counted.

On a CUDA device the Triton kernel runs; elsewhere, for many tokens, and where Triton cannot run, the weight
is unpacked and multiplied.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightlib.kernels import triton_driver
from lightlib.kernels.w4_matmul.packed import Packed

MANY = 128  # tokens from where on the arithmetic is what takes time, so unpacking once pays


@torch.library.custom_op("lightlib::int_matmul", mutates_args=())
def int_matmul(codes: Tensor, scale: Tensor, zero: Tensor | None, x: Tensor, bits: int) -> Tensor:
    """x (tokens, in) W^T -> (tokens, out), W (out, in) as in `Packed`."""
    weight = Packed(codes, scale, zero, bits, (len(codes), x.shape[1]))
    if not runs_here(x):
        return x @ weight.dense(x.dtype).T
    from lightlib.kernels.w4_matmul import triton_matmul

    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    with torch.cuda.device(x.device):
        splits = triton_matmul.splits_for(weight, len(x), processors)
        return triton_matmul.int_matmul(weight, x, splits=splits)


@int_matmul.register_fake
def _(codes, scale, zero, x, bits):
    return x.new_empty(len(x), len(codes))


@register_flop_formula(torch.ops.lightlib.int_matmul)
def int_flops(codes, scale, zero, x, bits, out_shape=None, **_) -> int:
    """Those of the dense product: it is what the tensor cores compute."""
    return 2 * prod(x) * codes[0]


def multiply(weight: Packed, x: Tensor) -> Tensor:
    """x (tokens, in) W^T -> (tokens, out). Raises ValueError for inputs of another width."""
    if x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x is {tuple(x.shape)}; a weight of {weight.shape} takes (tokens, {weight.shape[1]})"
        )
    return int_matmul(weight.codes, weight.scale, weight.zero, x, weight.bits)


def runs_here(x: Tensor) -> bool:
    """Whether the kernel multiplies these inputs."""
    if not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16) or not 0 < len(x) < MANY:
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0) and not missing()


@lru_cache(maxsize=1)
def missing() -> str:
    """Why Triton cannot run here, said once as a warning; or ""."""
    if reason := triton_driver.missing():
        warnings.warn(f"codes are unpacked for each product, since {reason}", stacklevel=2)
    return reason
