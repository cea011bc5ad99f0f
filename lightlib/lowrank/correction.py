"""What compression lost, put back at low rank: a light layer and two thin matrices beside it.

Low rank plus sparse, or plus rounded: the correction is the best of its rank for the layer's outputs.
Zhang et al. 2024 (LQER), arXiv:2402.02446; Liu et al. 2024 (EoRA), arXiv:2410.21271.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightlib.calibration import Gram, stream_blocks
from lightlib.change import changing, remember
from lightlib.compact import CompactLinear, weight_of
from lightlib.decoder import as_linear, linear_shapes
from lightlib.low_rank import CORRECT, CorrectedLinear, weight_bits
from lightlib.lowrank.ranks import chosen
from lightlib.lowrank.svd import low_rank
from lightlib.report import Compressed, LayerReport, Report, relative_error


def correct(
    model: nn.Module,
    batches: list[Tensor],
    *,
    dense: nn.Module,
    rank: int | Mapping[str, int] = 16,
    device=None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """Beside each packed layer, factors of this rank for what it lost of the weight in the `dense` model.

    They minimize ||(W - W' - BA)X|| by the gram of the inputs that the light model sees, and are stored in
    the model's dtype. Use it as a last step: `compress(model, [sparsegpt, partial(correct, dense=model)],
    batches)`. Rank or {layer: rank}. Raises ValueError without batches, and where no layer is packed.
    """
    if not batches:
        raise ValueError("correct needs batches to see the layers' inputs")
    with changing(model, inplace) as light:
        rows, ranks = [], {}
        for block in stream_blocks(light, batches, device=device, progress=progress, title="correct"):
            packed = {n: part for n, part in block.linears.items() if isinstance(part, CompactLinear)}
            grams = block.collect(Gram, of=tuple(packed))
            for name, part in packed.items():
                whole, gram = f"{block.name}.{name}", grams[name].value
                W = original(dense, whole, part).to(gram.device)
                ranks[whole] = chosen(rank, None, whole, tuple(W.shape), pivot=False)
                new = corrected(part, W, ranks[whole], gram, light.dtype)
                block.module.set_submodule(name, new)
                bits, error = (weight_bits(part), weight_bits(new)), relative_error(W, new.dense(), gram)
                notes = f"rank {ranks[whole]} beside a {type(part).__name__}"
                rows.append(LayerReport("correct", whole, tuple(W.shape), *bits, error, notes))
        if not ranks:
            raise ValueError("no layer of the model is packed, so none has lost anything; compress it first")
        remember(light, CORRECT, {"ranks": ranks, "dtype": str(light.dtype).removeprefix("torch.")})
    return Compressed(light, Report(tuple(rows)))


def original(dense: nn.Module, name: str, light: CompactLinear) -> Tensor:
    """The weight (out, in) of the layer `name` in the dense model. ValueError where it is another model."""
    shape = light.out_features, light.in_features
    if linear_shapes(dense).get(name) != shape:
        raise ValueError(f"dense: it has no {name} of {shape}; give the model that the light one came from")
    return weight_of(as_linear(dense.get_submodule(name)))


@torch.no_grad()
def corrected(
    part: CompactLinear, weight: Tensor, rank: int, gram: Tensor, dtype: torch.dtype
) -> CorrectedLinear:
    """`part` with the correction of this rank that brings it nearest to `weight` (out, in)."""
    lost = low_rank(weight - weight_of(part), rank, gram, pivot=False)
    new = CorrectedLinear(part, rank, dtype).to(weight.device)
    new.correction.A.copy_(lost.reduce)
    new.correction.B.copy_(lost.expand)
    return new
