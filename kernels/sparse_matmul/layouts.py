"""The layouts by name, and what they have in common: tensors, a shape, and a number that a kernel is told."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from lightlib.kernels.sparse_matmul import bitmap, compact, csl, ell
from lightlib.kernels.sparse_matmul.bitmap import Bitmap
from lightlib.kernels.sparse_matmul.compact import CompactCSL
from lightlib.kernels.sparse_matmul.csl import CSL
from lightlib.kernels.sparse_matmul.ell import ELL

LAYOUTS = {"csl": csl, "compact": compact, "bitmap": bitmap, "ell": ell}
KINDS = {"csl": CSL, "compact": CompactCSL, "bitmap": Bitmap, "ell": ELL}
KNOBS = {"csl": "ahead", "compact": "ahead", "bitmap": "capacity"}

Sparse = CSL | CompactCSL | Bitmap | ELL


def encode(layout: str, weight: Tensor, mask: Tensor | None = None) -> Sparse:
    """`weight` (out, in) of 16-bit values in one of LAYOUTS, where `mask` is True (default: not zero)."""
    return LAYOUTS[layout].encode(weight, mask)


def layout_of(weight: Sparse) -> str:
    """Its name in LAYOUTS."""
    return next(name for name, kind in KINDS.items() if isinstance(weight, kind))


def tensors_of(weight: Sparse) -> dict[str, Tensor]:
    """What is stored, by name."""
    parts = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return {name: part for name, part in parts.items() if isinstance(part, Tensor)}


def knob_of(weight: Sparse) -> int:
    """What a kernel is told beside the tensors; 0 if nothing."""
    return getattr(weight, KNOBS.get(layout_of(weight), ""), 0)


def rebuilt(
    layout: str, tensors: list[Tensor], shape: tuple[int, int], dtype: torch.dtype, knob: int
) -> Sparse:
    """The weight that `tensors_of` and `knob_of` took apart."""
    return ELL(*tensors, shape) if layout == "ell" else KINDS[layout](*tensors, shape, dtype, knob)
