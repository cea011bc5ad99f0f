"""One rank a layer: more where little rank hurts, with the bytes of all layers as asked for."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from lightlib.calibration import Block, Gram
from lightlib.change import changing
from lightlib.lowrank.ranks import fraction_for, rank_for, stored
from lightlib.lowrank.svd import output_directions, projected
from lightlib.sensitivity import dense_linears, sensitivity, spend

LEVELS = tuple(level / 20 for level in range(1, 21))  # shares of a layer's weights that stay, 0.05 to 1


def sensitive(
    model: nn.Module,
    batches: list[Tensor],
    *,
    fraction: float | None = None,
    budget_bytes: float | None = None,
    levels: tuple[float, ...] = LEVELS,
    band: float = 0.2,
    pivot: bool = True,
    progress: bool = True,
) -> dict[str, int]:
    """{layer: rank} for `svd(rank=)`: rank goes where it moves the model least, by a scan.

    Layers that read one input keep one share of their weights, one of `levels`. Each of these stages is
    factorized alone and the divergence from the dense model measured (see sensitivity.py); a few hundred
    tokens are enough. `fraction` (0.2) of all weights go, or as many as budget_bytes, for the whole model in
    a file, asks for. band: no layer keeps less than the mean share by more than this; far from what was
    measured, a layer's loss no longer grows with the square of its error. Raises ValueError without batches,
    and where all levels exceed the budget.
    """
    if not batches:
        raise ValueError("sensitive needs batches to see how far the model moves")
    with changing(model, inplace=False) as copy:
        shapes = {name: tuple(part.weight.shape) for name, part in dense_linears(copy).items()}
        if budget_bytes is not None:
            fraction = fraction_for(copy, budget_bytes, pivot)
        keep = 0.8 if fraction is None else 1 - fraction
        near = [level for level in sorted(levels) if level >= keep - band]
        scan = sensitivity(
            copy, batches, near, min(near, key=lambda level: abs(level - keep)),
            lambda block, grams: truncating(block, grams, pivot),
            lambda shape, level: stored(shape, rank_at(shape, level, pivot), pivot),
            statistic=Gram, progress=progress, title="sensitive",
        )  # fmt: skip
    chosen = spend(scan, int(keep * sum(math.prod(shape) for shape in shapes.values())))
    return {
        name: rank_at(shapes[name], choice.setting, pivot)
        for choice in chosen.values()
        for name in choice.names
    }


def rank_at(shape: tuple[int, int], level: float, pivot: bool) -> int:
    """The rank of a matrix that keeps this share of its weights; at 1, all of it."""
    return min(shape) if level >= 1 else max(1, rank_for(shape, level * math.prod(shape), pivot))


def truncating(
    block: Block, grams: dict[str, Tensor], pivot: bool
) -> Callable[[str, nn.Linear, float], Tensor]:
    """(name, layer, level) -> its weight at that level; each layer is decomposed once for all levels."""
    U = {name: output_directions(part.weight, grams[name])[0] for name, part in block.dense.items()}

    def truncated(name: str, part: nn.Linear, level: float) -> Tensor:
        rank = rank_at(tuple(part.weight.shape), level, pivot)
        return projected(part.weight, U[name][:, :rank], pivot=False).to_tensor()

    return truncated
