"""Generation, watched: which tokens each head still holds after every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightlib.attention.open_cache import OpenCache


@dataclass(frozen=True)
class Traced:
    """ids (tokens,): the prompt, of which there were `first`, and what was written after it.

    held (steps, blocks, tokens): the share of a block's key-value heads that hold a token after a step, the
    first of which is the prompt; -1 for tokens that had not been cached by then.
    """

    ids: Tensor
    held: Tensor
    first: int


@torch.no_grad()
def trace(model: nn.Module, ids: Tensor, open_cache: OpenCache, new: int) -> Traced:
    """Greedy generation of `new` tokens after ids (1, prompt), and what an evicting cache holds at each step.

    Raises ValueError for more than one row, and for a cache that does not say which tokens it holds.
    """
    if ids.dim() != 2 or len(ids) != 1:
        raise ValueError(f"ids have shape {tuple(ids.shape)}; one row (1, prompt) is traced at a time")
    tokens, steps = ids, []
    with open_cache(model) as cache:
        for _ in range(new):
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, ids], 1)
            steps.append(held_now(cache))
    steps = [nn.functional.pad(step, (0, tokens.shape[1] - step.shape[1]), value=-1.0) for step in steps]
    return Traced(tokens[0].cpu(), torch.stack(steps), tokens.shape[1] - new)


def held_now(cache) -> Tensor:
    """(blocks, seen): the share of heads that hold each of the tokens seen."""
    if not all(hasattr(layer, "positions") for layer in cache.layers):
        kind = type(cache.layers[0]).__name__
        raise ValueError(f"a {kind} does not say which tokens it holds; trace a cache that evicts")
    blocks = []
    for layer in cache.layers:
        counts = torch.bincount(layer.positions.flatten().cpu(), minlength=layer.seen)
        blocks.append(counts / layer.positions.shape[1])
    return torch.stack(blocks)
