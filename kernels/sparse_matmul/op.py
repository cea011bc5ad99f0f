"""The sparse products as one operation of torch: traced, with shapes without data, with its FLOPs counted.

On a CUDA device the kernels run; for many tokens the weight is unpacked once and cuBLAS multiplies. Where no
kernel can be compiled, Triton's take their place, and where there is no Triton either, or no such device,
plain torch unpacks.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightlib.kernels import nvrtc, triton_driver
from lightlib.kernels.sparse_matmul import launch
from lightlib.kernels.sparse_matmul.dispatch import FEW
from lightlib.kernels.sparse_matmul.layouts import Sparse, knob_of, layout_of, rebuilt, tensors_of

MANY = 128  # tokens from where on the arithmetic is what takes time, so unpacking once pays


@torch.library.custom_op("lightlib::sparse_matmul", mutates_args=())
def sparse_matmul(layout: str, tensors: Sequence[Tensor], x: Tensor, n_out: int, knob: int) -> Tensor:
    """x (tokens, in) W^T -> (tokens, out), W (out, in) taken apart by `layouts.tensors_of`."""
    weight = rebuilt(layout, tensors, (n_out, x.shape[1]), x.dtype, knob)
    how = way(layout, len(x)) if x.is_cuda else "torch"
    if how == "cuda":
        return KERNELS[layout](weight, x, nvrtc.launch, splits=splits(weight.tiles, x))
    if how == "torch":
        return x @ weight.dense().T
    with torch.cuda.device(x.device):
        return by_triton(layout, weight, x) if how == "triton" else x @ expanded(layout, weight).T


@sparse_matmul.register_fake
def _(layout, tensors, x, n_out, knob):
    return x.new_empty(len(x), n_out)


@register_flop_formula(torch.ops.lightlib.sparse_matmul)
def flops(layout, tensors, x, n_out, knob, out_shape=None, **_) -> int:
    """Those of the dense product: it is what the tensor cores compute."""
    return 2 * prod(x) * n_out


KERNELS = {
    "csl": launch.csl_matmul, "compact": launch.compact_matmul, "bitmap": launch.bitmap_matmul
}  # fmt: skip


def multiply(weight: Sparse, x: Tensor) -> Tensor:
    """x (tokens, in) W^T -> (tokens, out); x has the weight's type."""
    layout = layout_of(weight)
    return sparse_matmul(layout, list(tensors_of(weight).values()), x, weight.shape[0], knob_of(weight))


def way(layout: str, tokens: int) -> str:
    """What multiplies on a CUDA device: "cuda", "triton", "expand" (by Triton, then cuBLAS) or "torch"."""
    if layout == "ell":
        return "torch" if triton_driver.missing() else "triton" if tokens <= FEW else "expand"
    if tokens < MANY and not missing():
        return "cuda"
    if triton_driver.missing():
        return "torch"
    return "triton" if layout == "bitmap" and tokens < MANY else "expand"


def by_triton(layout: str, weight: Sparse, x: Tensor) -> Tensor:
    if layout == "ell":
        from lightlib.kernels.sparse_matmul.triton_ell import ell_matmul

        return ell_matmul(weight, x)
    from lightlib.kernels.sparse_matmul.triton_bitmap import bitmap_matmul

    return bitmap_matmul(weight, x)


def expanded(layout: str, weight: Sparse) -> Tensor:
    """The weight (out, in), unpacked by Triton."""
    from lightlib.kernels.sparse_matmul import triton_expand

    return triton_expand.EXPAND[layout](weight)


@lru_cache(maxsize=1)
def missing() -> str:
    """Why no kernel can be compiled or launched here, said once as a warning; or ""."""
    try:
        nvrtc.library(), nvrtc.driver()
    except nvrtc.Unavailable as error:
        instead = (
            "unpacked for each product" if triton_driver.missing() else "multiplied by slower Triton kernels"
        )
        warnings.warn(f"sparse weights are {instead}, since {error}", stacklevel=2)
        return str(error)
    return ""


def splits(tiles: tuple[int, int], x: Tensor) -> int:
    """In how many parts the columns of a weight of so many tiles are cut on this device."""
    token_tiles = -(-len(x) // launch.tokens_at_once(len(x)))
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return launch.splits_for(tiles[0], token_tiles, tiles[1], processors)
