"""Wanda: a small weight matters where its input is large. No weight is changed that stays.

Sun et al. 2023, arXiv:2306.11695.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightlib.calibration import Samples, SquaredNorm, stream_blocks, together
from lightlib.change import changing
from lightlib.report import Compressed, Report
from lightlib.sparsity.masks import Sparsity, mask_of, sparsities
from lightlib.sparsity.store import sparse_linear


def wanda_score(weight: Tensor, squared_norm: Tensor) -> Tensor:
    """|W_ij| ||X_j|| (out, in), from each input's sum of squares over the tokens (in,).

    Where all inputs have equal norms, it ranks the weights of a row by magnitude.
    """
    return weight.detach().float().abs() * squared_norm.sqrt()


def wanda(
    model: nn.Module,
    batches: list[Tensor],
    *,
    sparsity: Sparsity | Mapping[str, Sparsity] = 0.5,
    device=None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """Wanda on the blocks' linear layers, whose weights compete within a row; embedding and head stay dense.

    sparsity: a share of zeros or a pattern "n:m", one for all layers or one for each name.
    Raises ValueError without batches, and for a sparsity that a layer cannot have.
    """
    if not batches:
        raise ValueError("wanda needs batches to see the layers' inputs; magnitude prunes without them")
    with changing(model, inplace) as light:
        rows = []
        for block in stream_blocks(light, batches, device=device, progress=progress, title="wanda"):
            dense = block.dense
            shares = sparsities(sparsity, block.name, dense)
            found = block.collect(together(SquaredNorm, Samples), of=tuple(dense))
            for name, linear in dense.items():
                norm, samples = (part.value for part in found[name].parts)
                mask = mask_of(wanda_score(linear.weight, norm), shares[name])
                new = sparse_linear(linear.weight, mask, shares[name], linear.bias)
                block.replace("wanda", name, new, inputs=samples)
            rows += block.rows
    return Compressed(light, Report(tuple(rows)))
