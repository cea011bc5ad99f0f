"""Magnitude pruning: the smallest weights go. The baseline that all other methods must beat.

Han et al. 2015, arXiv:1506.02626.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightlib.calibration import Gram, stream_blocks
from lightlib.change import changing
from lightlib.decoder import find_blocks, linears
from lightlib.report import Compressed, Report
from lightlib.sparsity.masks import Sparsity, mask_of, sparsities
from lightlib.sparsity.store import sparse_linear

SCOPES = ("row", "layer", "global")


def magnitude(
    model: nn.Module,
    batches: list[Tensor] | None = None,
    *,
    sparsity: Sparsity | Mapping[str, Sparsity] = 0.5,
    scope: str = "layer",
    device=None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """Keep the largest weights of the blocks' linear layers; the embedding and the head stay dense.

    sparsity: a share of zeros or a pattern "n:m", one for all layers or one for each name. scope: weights
    compete in a "row", a "layer", or "global"ly in the model; patterns have scopes of their own.
    Needs no data; with `batches` the report's errors are those of the layers' outputs.
    Raises ValueError for a sparsity that a layer cannot have.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r}: give one of {', '.join(SCOPES)}")
    with changing(model, inplace) as light:
        if scope == "global":
            sparsity = global_sparsities(light, sparsity)
        rows = []
        for block in stream_blocks(light, batches, device=device, progress=progress, title="magnitude"):
            dense = block.dense
            shares = sparsities(sparsity, block.name, dense)
            grams = block.collect(Gram, of=tuple(dense))
            for name, linear in dense.items():
                weight, share = linear.weight.detach(), shares[name]
                mask = mask_of(weight.float().abs(), share, "row" if scope == "row" else "layer")
                gram = grams[name].value if name in grams else None
                block.replace("magnitude", name, sparse_linear(weight, mask, share, linear.bias), gram)
            rows += block.rows
    return Compressed(light, Report(tuple(rows)))


def global_sparsities(model: nn.Module, sparsity: float) -> dict[str, float]:
    """{layer: its share of zeros} where one threshold on |w| in all blocks leaves `sparsity` of zeros."""
    if not isinstance(sparsity, (int, float)):
        raise ValueError(f"sparsity={sparsity!r}: weights compete in the whole model for one share of zeros")
    weights = {
        f"{block}.{name}": part.weight.detach()
        for block, module in find_blocks(model).items()
        for name, part in linears(module).items()
        if isinstance(part, nn.Linear)
    }
    wanted = sparsity * sum(W.numel() for W in weights.values())
    low, high = 0.0, max(W.abs().max().item() for W in weights.values())
    # halving finds the threshold without a copy of all weights
    for _ in range(40):
        middle = (low + high) / 2
        below = sum((W.abs() <= middle).sum().item() for W in weights.values())
        low, high = (middle, high) if below < wanted else (low, middle)
    return {
        name: min((W.abs() <= high).sum().item() / W.numel(), 1 - 1 / W.numel())
        for name, W in weights.items()
    }
