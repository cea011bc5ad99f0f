"""2:4 on CUDA: our packed weight as the tensor whose zeros sparse tensor cores skip.

Mishra et al. 2021, arXiv:2104.08378; the product is torch's, from CUTLASS.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import _calculate_meta_reordering_scatter_offsets

from lightlib.sparsity.layouts import SparseWeight

TYPES = (torch.float16, torch.bfloat16)


def misfit(shape: tuple[int, int], dtype: torch.dtype) -> str:
    """Why sparse tensor cores cannot multiply a 2:4 weight (out, in) of this type, or ""."""
    if dtype not in TYPES:
        return f"the 2:4 product takes float16 and bfloat16, not {str(dtype)[6:]}"
    if shape[0] % 32 or shape[1] % 64:
        return f"the 2:4 product takes multiples of 32 x 64, not {shape[0]} x {shape[1]}"
    return ""


def hardware_places(weight: SparseWeight) -> Tensor:
    """The places of a 2:4 weight (out, in) in the order that tensor cores read them: int16 (out, in / 16).

    Both hold two bits for each value. Eight of them in a row fill 16 bits here as there; only the order of
    these words differs.
    """
    n_out, n_in = weight.shape
    words = weight.tensors["positions"].view(torch.int16)
    order = _calculate_meta_reordering_scatter_offsets(n_out, n_in // 16, torch.int16, words.device)
    return torch.empty_like(words).scatter_(0, order, words).view(n_out, -1)


def semi_structured(weight: SparseWeight, places: Tensor) -> Tensor:
    """torch's sparse tensor (out, in) with the values of `weight`, shared, and its `hardware_places`."""
    values = weight.tensors["values"].detach().view(weight.shape[0], -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its interface is young, at the first one
        return SparseSemiStructuredTensorCUTLASS(torch.Size(weight.shape), values, places, None, None, None)
