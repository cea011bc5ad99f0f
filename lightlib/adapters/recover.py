"""Recovery: a short fine-tuning of what compression has left, with every mask as it is.

Han et al. 2015, arXiv:1506.02626: score, prune, fine-tune.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lightlib.adapters.masked_lora import low_rank_updates
from lightlib.change import changing
from lightlib.compact import letting_gradients_through
from lightlib.decoder import find_blocks
from lightlib.report import Compressed, Report
from lightlib.training import next_token_loss, train, whole


def recover(
    model: nn.Module,
    batches: list[Tensor],
    *,
    steps: int = 100,
    lr: float = 1e-4,
    rank: int | None = None,
    checkpoint: str | Path | None = None,
    watch: Callable[[int, float], None] = lambda step, loss: None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """Train the blocks' parameters on `batches` for `steps` batches: AdamW, learning rate down a cosine to 0.

    Sparse layers train the values they store, so their zeros stay; packed codes, the embedding and the head
    stay as they are. rank: learn updates of this rank instead (LoRA), merged within the masks at the end;
    they take less memory to train, and a learning rate about ten times as high. checkpoint: a folder from
    which the same call goes on where it was broken off (lightlib.training). watch: called with each
    step and its loss (mean nll, nats). Use it as a step of `compress`; the report has no rows, since no layer
    changes its size. Raises ValueError without batches, for half-precision parameters, whose small updates
    would be lost, and where nothing can be trained.
    """
    if not batches:
        raise ValueError("recover needs batches to train on")
    with changing(model, inplace) as light:
        blocks = find_blocks(light)
        # once each: blocks may share some
        weights = list(dict.fromkeys(p for block in blocks.values() for p in block.parameters()))
        if not weights:
            raise ValueError(
                "the blocks have no parameters left to train: all of their weights are packed codes"
            )
        if any(p.dtype != torch.float32 for p in weights):
            raise ValueError(
                f"parameters in {str(weights[0].dtype)[6:]} lose small updates; train in float32"
            )
        flags = [(p, p.requires_grad) for p in light.parameters()]
        try:
            learns = whole(weights) if rank is None else low_rank_updates(blocks, rank)
            with letting_gradients_through(light), learns as learning:
                train(
                    light,
                    learning,
                    batches,
                    steps=steps,
                    lr=lr,
                    loss=next_token_loss,
                    watch=watch,
                    checkpoint=checkpoint,
                    progress=progress,
                )
        finally:
            for p, wanted in flags:
                p.requires_grad_(wanted)
    return Compressed(light, Report(()))
