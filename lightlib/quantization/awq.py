"""AWQ: stretch the input channels that carry most before rounding, and shrink them back for free.

Lin et al. 2023, arXiv:2306.00978.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightlib.calibration import Gram, stream_blocks
from lightlib.change import changing
from lightlib.folding import folds
from lightlib.quantization.grid import Grid, Int, grid_for
from lightlib.quantization.linear import QuantLinear
from lightlib.report import Compressed, Report


def awq_scale(
    weights: list[Tensor],
    gram: Tensor,
    magnitude: Tensor,
    grids: list[Grid],
    steps: int = 20,
    tie: Callable[[Tensor], Tensor] = lambda scale: scale,
) -> tuple[Tensor, list[float]]:
    """(scale (in,), the loss at each exponent 0, 1/steps, ...) for `weights` (out, in) that read one input.

    The scale is magnitude^exponent with the exponent that makes sum ||(W - round(W s) / s) X||^2 least; at 0
    it is one everywhere, which is plain rounding. magnitude: typical |x| of each input channel (in,).
    """
    losses, best = [], torch.ones_like(magnitude)
    for step in range(steps):
        scale = tie(balanced(magnitude, step / steps))
        gone = (W - grid.rounded(W * scale) / scale for W, grid in zip(weights, grids, strict=True))
        losses.append(sum(lost_output(D, gram) for D in gone))
        if losses[-1] == min(losses):
            best = scale
    return best, losses


def balanced(magnitude: Tensor, exponent: float) -> Tensor:
    """magnitude^exponent with its largest and smallest value at equal distance from one."""
    scale = magnitude.clamp_min(1e-8).pow(exponent).clamp_min(1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


def lost_output(gone: Tensor, gram: Tensor) -> float:
    """||D X||^2 of a difference of weights D (out, in)."""
    return (gone @ gram * gone).sum().item()


def awq_clip(weight: Tensor, gram: Tensor, grid: Grid, steps: int = 10, least: float = 0.5) -> Tensor:
    """`weight` (out, in) cut off where a finer grid gains more than the cut loses, group by group.

    Each group tries ranges from its own down to `least` of it; the loss is that of the group's own part of
    the output, from its block of the gram. A group that gains nothing stays as it is.
    """
    W = grid.grouped(weight)  # (out, groups, group)
    n_groups, group = W.shape[1:]
    within = gram.view(n_groups, group, n_groups, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    widest = W.abs().amax(-1, keepdim=True)  # (out, groups, 1)
    best, least_loss = W, None
    for step in range(steps):
        cut = widest * (1 - (1 - least) * step / steps)
        clipped = W.clamp(-cut, cut)
        D = W - grid.grouped(grid.rounded(clipped.reshape(weight.shape)))
        loss = (torch.einsum("ogi,gij->ogj", D, within).mul_(D)).sum(-1, keepdim=True)  # (out, groups, 1)
        if least_loss is None:
            least_loss = loss
        else:
            best = torch.where(loss < least_loss, clipped, best)
            least_loss = torch.minimum(loss, least_loss)
    return best.reshape(weight.shape)


def awq(
    model: nn.Module,
    batches: list[Tensor],
    *,
    grid: Grid | Mapping[str, Grid] = Int(4, group_size=64),
    steps: int = 20,
    clip: bool = True,
    device=None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """AWQ on the blocks' linear layers; the embedding and the head stay dense.

    Scales are folded into what precedes a layer where that is exact (see folding.py); other layers are
    only clipped. Pruned layers keep their zeros. Raises ValueError without batches, and where a group size
    does not divide a layer's inputs.
    """
    if not batches:
        raise ValueError("awq needs batches to see the layers' inputs; rtn rounds without them")
    with changing(model, inplace) as light:
        rows, places = [], folds(light)
        for block in stream_blocks(light, batches, device=device, progress=progress, title="awq"):
            masks = block.open()
            parts = block.dense
            grids = {name: grid_for(grid, f"{block.name}.{name}") for name in parts}
            for name, part in parts.items():
                grids[name].groups(part.in_features, f"{block.name}.{name}")
            grams = {n: s.value / s.count for n, s in block.collect(Gram, of=tuple(parts)).items()}
            for fold in places:
                if all(name in parts for name in (*fold.readers, *((fold.source,) if fold.rows else ()))):
                    gram = grams[fold.readers[0]]
                    scale, _ = awq_scale(
                        [parts[name].weight.float() for name in fold.readers], gram,
                        gram.diagonal().sqrt(), [grids[name] for name in fold.readers], steps, fold.tie,
                    )  # fmt: skip
                    fold.apply(block.module, scale)
                    grams |= {name: gram / scale.outer(scale) for name in fold.readers}
            for name, part in parts.items():
                weight = part.weight.float()
                if clip and not grids[name].per_tensor:
                    weight = awq_clip(weight, grams[name], grids[name])
                whole = f"{block.name}.{name}"
                light_weight = grids[name].encode(weight, whole).within(masks.get(name), whole)
                block.replace("awq", name, QuantLinear(light_weight, part.bias), grams[name])
            rows += block.rows
    return Compressed(light, Report(tuple(rows)))
