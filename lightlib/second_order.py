"""What a layer's Gram matrix says about moving its weights: shared by GPTQ, SparseGPT and OBS."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def inverse_factor(gram: Tensor, damping: float, name: str = "weight") -> Tensor:
    """U (in, in), upper triangular, with U^T U = H^-1. H is the gram plus `damping` times its mean diagonal.

    Where rounding leaves the gram without a Cholesky factor, the damping grows tenfold, with a warning.
    """
    mean = gram.diagonal().mean().clamp_min(1e-12)
    if not torch.isfinite(mean):
        raise ValueError(
            f"{name}: its inputs hold NaN or infinite numbers; the model overflows in this dtype"
        )
    eye = torch.eye(len(gram), device=gram.device)
    while True:
        # flipped, the lower factor is an upper one: H = M M^T, so the inverse of M is U
        lower, failed = torch.linalg.cholesky_ex((gram + damping * mean * eye).flip(0, 1))
        if not failed:
            return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
        damping = max(10 * damping, 1e-6)
        warnings.warn(f"{name}: the gram has no Cholesky factor; damping grows to {damping:g}", stacklevel=2)
