"""Optimal Brain Damage and Surgeon, exactly: one weight at a time, by what the loss grows when it goes.

LeCun et al. 1989 (Optimal Brain Damage); Hassibi & Stork 1993 (Optimal Brain Surgeon); a layer at a time as
in Frantar & Alistarh 2022, arXiv:2208.11580.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightlib.calibration import Gram, stream_blocks
from lightlib.change import changing
from lightlib.report import Compressed, Report
from lightlib.second_order import inverse_factor
from lightlib.sparsity.masks import dropped, keep_largest, sparsities
from lightlib.sparsity.store import sparse_linear

LARGEST = 2**27  # numbers that the inverses of one chunk of rows may hold


def obd_saliency(weight: Tensor, gram: Tensor) -> Tensor:
    """What ||(W - W')X||^2 grows by when a weight (out, in) goes and no other moves: w^2 G_jj."""
    return weight.detach().float().square() * gram.diagonal()


def obs_weight(
    weight: Tensor, gram: Tensor, sparsity: float, *, damping: float = 0.0, name: str = "weight"
) -> tuple[Tensor, Tensor]:
    """(weight (out, in), mask) after the surgeon took int(in sparsity) weights from each row.

    Each step takes the weight with the least w^2 / [H^-1]_jj, and the rest of its row moves to the best it
    can then be; H is the gram (in, in) plus `damping` times its mean diagonal. Costs out in^3 operations.
    """
    n_out, n_in = weight.shape
    U = inverse_factor(gram, damping, name)
    W, kept = weight.detach().float().clone(), torch.ones_like(weight, dtype=torch.bool)
    at_once = max(1, LARGEST // n_in**2)
    for rows in torch.arange(n_out, device=weight.device).split(at_once):
        w, stays = W[rows], kept[rows]  # (rows, in)
        inverse = (U.T @ U).repeat(len(rows), 1, 1)  # (rows, in, in): each row loses other weights
        each = torch.arange(len(rows), device=weight.device)
        for _ in range(dropped(n_in, sparsity)):
            saliency = (w.square() / inverse.diagonal(dim1=1, dim2=2)).masked_fill(~stays, torch.inf)
            j = saliency.argmin(1)
            column, pivot = inverse[each, :, j], inverse[each, j, j]  # (rows, in), (rows)
            w -= (w[each, j] / pivot)[:, None] * column
            # without weight j, the inverse of what is left of H
            inverse -= column[:, :, None] * column[:, None, :] / pivot[:, None, None]
            stays[each, j] = False
            w[each, j] = 0
        W[rows], kept[rows] = w * stays, stays
    return W, kept


def obs(
    model: nn.Module,
    batches: list[Tensor],
    *,
    sparsity: float | Mapping[str, float] = 0.5,
    surgeon: bool = True,
    damping: float = 0.01,
    device=None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """Optimal Brain Surgeon on the blocks' linear layers, or Brain Damage with surgeon=False.

    The surgeon costs out in^3 operations a layer: minutes where in is 576, hours where it is 4096; sparsegpt
    is its fast approximation. Raises ValueError without batches, and for patterns, which it does not know.
    """
    if not batches:
        raise ValueError("obs needs batches to see the layers' inputs; magnitude prunes without them")
    with changing(model, inplace) as light:
        rows = []
        for block in stream_blocks(light, batches, device=device, progress=progress, title="obs"):
            dense = block.dense
            shares = sparsities(sparsity, block.name, dense)
            grams = block.collect(Gram, of=tuple(dense))
            for name, linear in dense.items():
                whole, gram = f"{block.name}.{name}", grams[name].value
                share = shares[name]
                if isinstance(share, str):
                    raise ValueError(f"{whole}: obs takes a share of zeros, not {share}; see sparsegpt")
                if surgeon:
                    weight, mask = obs_weight(linear.weight, gram, share, damping=damping, name=whole)
                else:
                    weight, mask = linear.weight, keep_largest(obd_saliency(linear.weight, gram), share)
                new = sparse_linear(weight.to(linear.weight.dtype), mask, share, linear.bias)
                block.replace("obs" if surgeon else "obd", name, new, gram)
            rows += block.rows
    return Compressed(light, Report(tuple(rows)))
