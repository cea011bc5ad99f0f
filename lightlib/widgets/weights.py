"""What the explorers of real matrices share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MOST = 400_000  # weights that a slider can have rounded a few times over within its 200 ms
GROUPS = (512, 256, 128, 64, 32, 16)
ODD_GROUPS = (192, 96, 64, 32, 16)  # for widths such as 576, which 128 does not divide


def part_to_show(weight: Tensor) -> Tensor:
    """`weight` (out, in) as float32 on the CPU; if it has more than MOST entries, its first rows."""
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"the weight must be a matrix (out, in), not of shape {tuple(weight.shape)}")
    if weight.shape[1] > MOST:
        raise ValueError(f"a row of {weight.shape[1]} weights is too long to explore; the most is {MOST}")
    part = weight.detach()[: max(1, MOST // weight.shape[1])].float().cpu()
    if not torch.isfinite(part).all() or not part.any():
        raise ValueError("the weight has NaN or infinite entries, or is all zero; give one that is not")
    return part


def cut(part: Tensor, weight: Tensor) -> dict[str, str]:
    """What to say of a matrix of which only a part is shown; of a whole one, nothing."""
    return {"rows": f"first {len(part)} of {len(weight)}"} if len(part) < len(weight) else {}


def groups_of(n_in: int) -> list[int]:
    """The group sizes on offer that divide `n_in`, large to small."""
    sizes = ODD_GROUPS if n_in % 128 else GROUPS
    return [g for g in sizes if n_in % g == 0 and g < n_in]


def downsampled(matrix: Tensor, side: int = 64) -> np.ndarray:
    """At most (side, side): the root mean square of each tile of `matrix`."""
    square = matrix.square()
    return (
        torch.nn.functional.adaptive_avg_pool2d(square[None], [min(side, n) for n in square.shape])[0]
        .sqrt()
        .numpy()
    )
