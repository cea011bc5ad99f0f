"""RTN: round every weight to the nearest point of a grid. The baseline that all other methods must beat."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightlib.calibration import Gram, stream_blocks
from lightlib.change import changing
from lightlib.quantization.grid import Grid, Int, QuantizedWeight, grid_for
from lightlib.quantization.linear import QuantLinear
from lightlib.report import Compressed, Report


def rtn_weight(weight: Tensor, grid: Grid, name: str = "weight") -> QuantizedWeight:
    """`weight` (out, in) rounded to the nearest points of `grid`. A weight on the grid comes back unchanged.

    >>> rtn_weight(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), Int(2)).dense()
    tensor([[0., 1., 2., 3.]])
    """
    return grid.encode(weight, name)


def rtn(
    model: nn.Module,
    batches: list[Tensor] | None = None,
    *,
    grid: Grid | Mapping[str, Grid] = Int(4, group_size=64),
    device=None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """Round the blocks' linear layers to `grid`, one for all or one for each layer's name; the embedding and
    the head stay dense.

    Pruned layers keep their zeros. Needs no data; with `batches` the report's errors are those of the
    layers' outputs.
    Raises ValueError where a group size does not divide a layer's inputs, before anything is changed.
    """
    with changing(model, inplace) as light:
        rows = []
        for block in stream_blocks(light, batches, device=device, progress=progress, title="rtn"):
            masks, grams = block.open(), block.collect(Gram)
            for name, linear in block.linears.items():
                if isinstance(linear, nn.Linear):
                    whole = f"{block.name}.{name}"
                    weight = rtn_weight(linear.weight, grid_for(grid, whole), whole)
                    weight = weight.within(masks.get(name), whole)
                    gram = grams[name].value if name in grams else None
                    block.replace("rtn", name, QuantLinear(weight, linear.bias), gram)
            rows += block.rows
    return Compressed(light, Report(tuple(rows)))
