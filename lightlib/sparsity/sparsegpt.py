"""SparseGPT: drop weights column by column and let the columns still to come make up for them.

Frantar & Alistarh 2023, arXiv:2301.00774.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightlib.calibration import Gram, stream_blocks
from lightlib.change import changing
from lightlib.machine import one_thread
from lightlib.report import Compressed, Report
from lightlib.second_order import inverse_factor
from lightlib.sparsity.masks import Sparsity, keep_n_of_m, mask_of, pattern, sparsities
from lightlib.sparsity.store import sparse_linear


def sparsegpt_weight(
    weight: Tensor,
    gram: Tensor,
    sparsity: Sparsity,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    name: str = "weight",
) -> tuple[Tensor, Tensor]:
    """(weight (out, in), mask): zero where the mask is False, with ||(W - W')X|| small by the gram (in, in).

    A share of zeros holds in each block of `block_size` columns, whose mask is chosen when the block is
    reached; a pattern "n:m" is chosen group by group. At sparsity 0 nothing changes.
    """
    n_in = weight.shape[1]
    n, m = pattern(sparsity) if isinstance(sparsity, str) else (0, 0)
    block_size = block_size // m * m or m if m else block_size  # a group lies in one block
    U = inverse_factor(gram, damping, name)  # (in, in), upper triangular
    pivots = U.diagonal()
    # (in, out): a column of the weight is a row here
    W = weight.detach().float().T.clone(memory_format=torch.contiguous_format)
    kept = torch.ones_like(W, dtype=torch.bool)

    with one_thread():
        for begin in range(0, n_in, block_size):
            end = min(begin + block_size, n_in)
            # what the loss grows by when a weight goes: w^2 over the squared pivot
            if not m:
                kept[begin:end] = mask_of(
                    (W[begin:end] / pivots[begin:end, None]).square(), sparsity, "layer"
                )
            errors = torch.empty(end - begin, len(weight), device=weight.device)
            for j in range(begin, end):
                if m and j % m == 0:
                    scores = (W[j : j + m] / pivots[j : j + m, None]).square()
                    kept[j : j + m] = keep_n_of_m(scores.T, n, m).T
                error = torch.mul(W[j], ~kept[j], out=errors[j - begin]).div_(pivots[j])
                W[j + 1 : end].addr_(U[j, j + 1 : end], error, alpha=-1)
            W[end:] -= U[begin:end, end:].T @ errors  # later blocks hear of it once a block
    return (W * kept).T.contiguous(), kept.T.contiguous()


def sparsegpt(
    model: nn.Module,
    batches: list[Tensor],
    *,
    sparsity: Sparsity | Mapping[str, Sparsity] = 0.5,
    damping: float = 0.01,
    block_size: int = 128,
    device=None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """SparseGPT on the blocks' linear layers; the embedding and the head stay dense.

    sparsity: a share of zeros or a pattern "n:m", one for all layers or one for each name. damping: part of
    the gram's mean diagonal that is added to it. block_size: columns that share a mask and an update.
    Raises ValueError without batches, and for a sparsity that a layer cannot have.
    """
    if not batches:
        raise ValueError("sparsegpt needs batches to see the layers' inputs; magnitude prunes without them")
    with changing(model, inplace) as light:
        rows = []
        for block in stream_blocks(light, batches, device=device, progress=progress, title="sparsegpt"):
            dense = block.dense
            shares = sparsities(sparsity, block.name, dense)
            grams = block.collect(Gram, of=tuple(dense))
            for name, linear in dense.items():
                gram, share = grams[name].value, shares[name]
                weight, mask = sparsegpt_weight(
                    linear.weight, gram, share, damping=damping, block_size=block_size,
                    name=f"{block.name}.{name}",
                )  # fmt: skip
                new = sparse_linear(weight.to(linear.weight.dtype), mask, share, linear.bias)
                block.replace("sparsegpt", name, new, gram)
            rows += block.rows
    return Compressed(light, Report(tuple(rows)))
