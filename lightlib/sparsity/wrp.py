"""WRP: prune to 2:4, then bring back the few most important weights that the pattern took.

Weight Recover Prune, ACL 2024, long papers, pages 6433-6443.
"""

from __future__ import annotations

from torch import Tensor, nn

from lightlib.calibration import Samples, SquaredNorm, stream_blocks, together
from lightlib.change import changing
from lightlib.report import Compressed, Report
from lightlib.sparsity.layouts import encode
from lightlib.sparsity.linear import SparseLinear
from lightlib.sparsity.masks import keep_largest, mask_of, sparsities
from lightlib.sparsity.wanda import wanda_score


def recovered(scores: Tensor, regular: Tensor, alpha: float) -> Tensor:
    """Which weights come back: those among the best `alpha` of their row's scores (out, in) that the regular
    mask (out, in) has taken. At alpha 0 none."""
    return keep_largest(scores, 1 - alpha) & ~regular


def wrp(
    model: nn.Module,
    batches: list[Tensor],
    *,
    pattern: str = "2:4",
    alpha: float = 0.25,
    device=None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """WRP on the blocks' linear layers, scored as Wanda does; the embedding and the head stay dense.

    Weights in the pattern are stored as such, those that come back as CSR. alpha: the share of each row, by
    score, that must be there in the end. Raises ValueError without batches, and where no pattern fits.
    """
    if not batches:
        raise ValueError("wrp needs batches to see the layers' inputs; magnitude prunes without them")
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha={alpha}: the share of a row that must be there lies from 0 to below 1")
    with changing(model, inplace) as light:
        rows = []
        for block in stream_blocks(light, batches, device=device, progress=progress, title="wrp"):
            dense = block.dense
            sparsities(pattern, block.name, dense)  # refuses a pattern that does not fit
            found = block.collect(together(SquaredNorm, Samples), of=tuple(dense))
            for name, linear in dense.items():
                norm, samples = (part.value for part in found[name].parts)
                scores = wanda_score(linear.weight, norm)
                regular = mask_of(scores, pattern)
                extra = recovered(scores, regular, alpha)
                parts = encode(linear.weight, regular, pattern), encode(linear.weight, extra, "csr")
                share = extra.float().mean().item()
                block.replace(
                    "wrp", name, SparseLinear(parts, linear.bias), notes=f"{100 * share:.2f}% recovered",
                    inputs=samples,
                )  # fmt: skip
            rows += block.rows
    return Compressed(light, Report(tuple(rows)))
