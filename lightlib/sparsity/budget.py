"""One sparsity a layer: more where little is lost, with the share of zeros over all layers as asked for."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lightlib.calibration import Block, SquaredNorm, stream_blocks
from lightlib.change import changing
from lightlib.sensitivity import dense_linears, sensitivity, spend
from lightlib.sparsity.masks import dropped
from lightlib.sparsity.wanda import wanda_score

LEVELS = tuple(level / 20 for level in range(20))  # 0 to 0.95


def sensitive(
    model: nn.Module,
    batches: list[Tensor],
    *,
    sparsity: float = 0.5,
    levels: tuple[float, ...] = LEVELS,
    progress: bool = True,
) -> dict[str, float]:
    """{layer: sparsity} for any method's `sparsity=`: zeros where they move the model least, by a scan.

    Layers that read one input share a sparsity, one of `levels`. Each of these stages is pruned alone, as
    Wanda does, and the divergence from the dense model measured (see sensitivity.py); a few hundred tokens
    are enough. Raises ValueError without batches, and for a sparsity above all levels.
    """
    if not batches:
        raise ValueError("sensitive needs batches to see how far the model moves")
    if not 0 <= sparsity <= max(levels):
        raise ValueError(f"sparsity={sparsity}: the levels reach from 0 to {max(levels)}")
    falling = sorted(levels, reverse=True)  # costs, the weights that stay, rise

    def pruning(block: Block, norms: dict[str, Tensor]) -> Callable[[str, nn.Linear, float], Tensor]:
        # a weight's rank in its row, sorted once for all levels
        ranks = {
            name: wanda_score(part.weight, norms[name]).argsort(dim=-1, stable=True).argsort(dim=-1)
            for name, part in block.linears.items()
        }
        return lambda name, part, level: (
            part.weight.detach() * (ranks[name] >= dropped(part.in_features, level))
        )

    with changing(model, inplace=False) as copy:
        count = sum(part.weight.numel() for part in dense_linears(copy).values())
        scan = sensitivity(
            copy, batches, falling, min(levels, key=lambda level: abs(level - sparsity)), pruning,
            lambda shape, level: shape[0] * (shape[1] - dropped(shape[1], level)),
            progress=progress, title="sensitive",
        )  # fmt: skip
    chosen = spend(scan, round(count * (1 - sparsity)))
    return {name: choice.setting for choice in chosen.values() for name in choice.names}


def outlier_share(scores: Tensor, times: float) -> float:
    """The share of the scores (any shape) that exceed `times` their mean."""
    return (scores > times * scores.mean()).float().mean().item()


def spread(shares: list[float], sizes: list[int], sparsity: float, band: float) -> list[float]:
    """A sparsity for each part: `band` lower where the outlier share is largest, `band` higher where it is
    least, their mean weighted by the parts' sizes as asked for."""
    low, high = min(shares), max(shares)
    keep = [2 * band * (share - low) / max(high - low, 1e-12) for share in shares]
    mean = sum(k * n for k, n in zip(keep, sizes, strict=True)) / sum(sizes)
    return [sparsity + mean - k for k in keep]


def owl(
    model: nn.Module,
    batches: list[Tensor],
    *,
    sparsity: float = 0.5,
    times: float = 5.0,
    band: float = 0.08,
    device=None,
    progress: bool = True,
) -> dict[str, float]:
    """{layer: sparsity} for any method's `sparsity=`: blocks with more outliers keep more of their weights.

    Outliers: weights whose Wanda score exceeds `times` the mean of their layer. All layers of a block get one
    sparsity, at most 2 `band` apart. Yin et al. 2023, arXiv:2310.05175 (OWL: times 5 or 7, band 0.08).
    Raises ValueError without batches, and where sparsity and band reach beyond 0 or 1.
    """
    if not batches:
        raise ValueError("owl needs batches to see the layers' inputs")
    if not 2 * band <= sparsity < 1 - 2 * band:
        raise ValueError(f"sparsity={sparsity}, band={band}: blocks could leave 0 to 1; narrow the band")
    names, shares, sizes = [], [], []
    with changing(model, inplace=False) as copy:
        for block in stream_blocks(copy, batches, device=device, progress=progress, title="owl"):
            parts = block.dense
            norms = block.collect(SquaredNorm, of=tuple(parts))
            scores = {name: wanda_score(part.weight, norms[name].value) for name, part in parts.items()}
            count = sum(part.weight.numel() for part in parts.values())
            found = sum(outlier_share(s, times) * s.numel() for s in scores.values()) / count
            names.append([f"{block.name}.{name}" for name in parts])
            shares.append(found)
            sizes.append(count)
    each = spread(shares, sizes, sparsity, band)
    return {name: share for block, share in zip(names, each, strict=True) for name in block}
