"""How well the model goes on after a prompt it no longer holds whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from lightlib.attention.open_cache import OpenCache
from lightlib.quality import LOGITS_AT_ONCE, device_of


@torch.no_grad()
def continuation_nll(
    model: nn.Module,
    pieces: list[Tensor],
    open_cache: OpenCache,
    *,
    prompt: int = 1024,
    step: int | None = None,
) -> float:
    """Mean nll, in nats, of the tokens after a prompt, given the prompt's compressed cache.

    pieces: LongTensors (batch, tokens). The first `prompt` tokens of each row run in one call, after which
    the cache has compressed them. The others follow as they are written (teacher forcing), each predicting
    the next, in one call or `step` at a time: 1 as in generation, so that a cache that evicts at each call
    is measured as it runs. Token number `prompt` is given, not predicted: the prompt's own call sees it all.
    With a cache that loses nothing this is the nll of those tokens after all that came before them.
    """
    check(model, pieces, prompt, step)
    device, total, count = device_of(model), 0.0, 0
    model.eval()
    for piece in pieces:
        following = piece.shape[1] - prompt - 1
        at_once = max(1, LOGITS_AT_ONCE // (min(step or following, following) * model.config.vocab_size))
        for ids in piece.to(device).split(at_once):
            with open_cache(model) as cache:
                model(ids[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
                total += nll_after(model, ids[:, prompt:], cache, step or following)
            count += len(ids) * following
    return total / count


def nll_after(model: nn.Module, ids: Tensor, cache: Cache, step: int) -> float:
    """The sum of -log p of ids[:, 1:] (batch, tokens), which follow what the cache holds."""
    total = 0.0
    for given, wanted in zip(ids[:, :-1].split(step, 1), ids[:, 1:].split(step, 1), strict=True):
        logits = model(given, past_key_values=cache, use_cache=True).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum").item()
    return total


def check(model: nn.Module, pieces: list[Tensor], prompt: int, step: int | None) -> None:
    """Raises ValueError where nothing is left to predict, or the model holds no text of that length."""
    if not pieces:
        raise ValueError("no pieces: lightlib.zoo.batches(tokenizer, text, length=prompt + 128) makes them")
    if prompt < 1 or (step is not None and step < 1):
        raise ValueError(f"prompt={prompt}, step={step}: both must be at least 1")
    shortest, longest = (f(ids.shape[1] for ids in pieces) for f in (min, max))
    if shortest < prompt + 2:
        raise ValueError(
            f"a piece of {shortest} tokens leaves none to predict after a prompt of {prompt} and the token "
            f"that is given next; take prompt={shortest - 2} or less, or longer pieces"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and longest > limit:
        raise ValueError(f"a piece of {longest} tokens exceeds the model's context of {limit}")
