"""The sparse products as operations of torch: traced, with shapes without data, with their FLOPs counted.

On a CUDA device the kernels run; elsewhere, for many tokens, and where no kernel can be compiled, the weight
is unpacked and multiplied.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightlib.kernels import nvrtc
from lightlib.kernels.sparse_matmul import launch
from lightlib.kernels.sparse_matmul.bitmap import Bitmap
from lightlib.kernels.sparse_matmul.csl import CSL

MANY = 128  # tokens from where on the arithmetic is what takes time, so unpacking once pays


@torch.library.custom_op("lightlib::csl_matmul", mutates_args=())
def csl_matmul(words: Tensor, offsets: Tensor, x: Tensor, n_out: int, ahead: int) -> Tensor:
    """x (tokens, in) W^T -> (tokens, out), W (out, in) in Tiled-CSL."""
    weight = CSL(words, offsets, (n_out, x.shape[1]), x.dtype, ahead)
    if not runs_here(x):
        return x @ weight.dense().T
    return launch.csl_matmul(weight, x, nvrtc.launch, splits=splits(weight.tiles, x))


@torch.library.custom_op("lightlib::bitmap_matmul", mutates_args=())
def bitmap_matmul(words: Tensor, offsets: Tensor, x: Tensor, n_out: int, capacity: int) -> Tensor:
    """x (tokens, in) W^T -> (tokens, out), W (out, in) as a bitmap for tensor cores."""
    weight = Bitmap(words, offsets, (n_out, x.shape[1]), x.dtype, capacity)
    if not runs_here(x):
        return x @ weight.dense().T
    return launch.bitmap_matmul(weight, x, nvrtc.launch, splits=splits(weight.tiles, x))


@csl_matmul.register_fake
def _(words, offsets, x, n_out, ahead):
    return x.new_empty(len(x), n_out)


@bitmap_matmul.register_fake
def _(words, offsets, x, n_out, capacity):
    return x.new_empty(len(x), n_out)


@register_flop_formula(torch.ops.lightlib.csl_matmul)
def csl_flops(words, offsets, x, n_out, ahead, out_shape=None, **_) -> int:
    """Those of the dense product: it is what the tensor cores compute."""
    return 2 * prod(x) * n_out


@register_flop_formula(torch.ops.lightlib.bitmap_matmul)
def bitmap_flops(words, offsets, x, n_out, capacity, out_shape=None, **_) -> int:
    """Those of the dense product: it is what the tensor cores compute."""
    return 2 * prod(x) * n_out


def multiply(weight: CSL | Bitmap, x: Tensor) -> Tensor:
    """x (tokens, in) W^T -> (tokens, out) by the operation of the weight's layout."""
    if isinstance(weight, CSL):
        return csl_matmul(weight.words, weight.offsets, x, weight.shape[0], weight.ahead)
    return bitmap_matmul(weight.words, weight.offsets, x, weight.shape[0], weight.capacity)


def runs_here(x: Tensor) -> bool:
    """Whether the kernels multiply these inputs."""
    return x.is_cuda and len(x) < MANY and not missing()


@lru_cache(maxsize=1)
def missing() -> str:
    """Why no kernel can be compiled or launched here, said once as a warning; or ""."""
    try:
        nvrtc.library(), nvrtc.driver()
    except nvrtc.Unavailable as error:
        warnings.warn(f"sparse weights are unpacked for each product, since {error}", stacklevel=2)
        return str(error)
    return ""


def splits(tiles: tuple[int, int], x: Tensor) -> int:
    """In how many parts the columns of a weight of so many tiles are cut on this device."""
    token_tiles = -(-len(x) // launch.tokens_at_once(len(x)))
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return launch.splits_for(tiles[0], token_tiles, tiles[1], processors)
