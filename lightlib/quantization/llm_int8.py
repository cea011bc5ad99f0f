"""LLM.int8(): 8-bit products for almost all inputs, 16 bits for the few columns that hold outliers.

Dettmers et al. 2022, arXiv:2208.07339.
"""

from __future__ import annotations

from torch import Tensor, nn

from lightlib.calibration import AbsMax, Samples, stream_blocks, together
from lightlib.change import changing
from lightlib.quantization.int8_linear import Int8Linear
from lightlib.report import Compressed, Report


def outlier_columns(maxima: Tensor, threshold: float) -> Tensor:
    """The inputs whose largest magnitude (in,) reaches `threshold`; all of them at 0, none at infinity."""
    return (maxima >= threshold).nonzero().squeeze(1)


def llm_int8(
    model: nn.Module,
    batches: list[Tensor] | None = None,
    *,
    threshold: float = 6.0,
    dynamic: bool = True,
    device=None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """The blocks' linear layers as vector-wise int8 (a scale a token, a scale a row) plus outlier columns.

    Columns that reach `threshold` in the batches keep 16-bit weights; the report says how many a layer has.
    dynamic: those that reach it later, in a call of the layer, leave the 8-bit product for that call, as in
    the paper; their weights come from the 8-bit codes. Without batches all outliers are found that way.
    """
    if batches is None and not dynamic:
        raise ValueError("dynamic=False needs batches that show where the outliers are")
    with changing(model, inplace) as light:
        rows = []
        for block in stream_blocks(light, batches, device=device, progress=progress, title="llm_int8"):
            found = block.collect(together(AbsMax, Samples))
            for name, linear in block.linears.items():
                if isinstance(linear, nn.Linear):
                    maxima, samples = found[name].parts if found else (None, None)
                    columns = None if maxima is None else outlier_columns(maxima.value, threshold)
                    new = Int8Linear(
                        linear.weight, linear.bias, columns=columns, threshold=threshold if dynamic else None
                    )
                    notes = (
                        "" if columns is None else f"{len(columns)} of {linear.in_features} columns in 16 bit"
                    )
                    block.replace("llm_int8", name, new, notes=notes, inputs=samples and samples.value)
            rows += block.rows
    return Compressed(light, Report(tuple(rows)))
