"""Attention of our own in any decoder, as long as a `with` lasts: patterns, scores, and caches that evict."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from lightlib.attention.eviction import EvictingLayer, budget, check_budget, evicting_cache
from lightlib.attention.seen import Seen, attention_weights, per_query_head, sees
from lightlib.decoder import find_blocks

Pattern = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Score = Callable[[Seen], Tensor | None]


@contextmanager
def attend(
    model: nn.Module,
    *,
    pattern: Pattern | Sequence[Pattern | None] | None = None,
    score: Score | None = None,
    keep: int | float | None = None,
) -> Iterator[Cache | None]:
    """While it lasts, the model's attention is ours, and as it was before at the end.

    pattern(batch, head, query, key): which keys a query may see, beside causality; positions, as tensors that
    broadcast to (B, H, T, S), and a boolean back. One for all blocks, or a list with one (or None) a block.

    score(seen): called after each block's attention with what it has seen. Alone it watches. With `keep`, it
    gives the worth (B, K, S) of each key to each key-value head: the best `keep` (a number of tokens, or a
    share of those seen) stay after each call, the others are gone from memory. The `with` then gives the
    cache that the model is to be called with: `model.generate(ids, past_key_values=cache)`. Blocks with a
    sliding window let go first of what has left it. With keep of all tokens the logits are those without.

    Raises ValueError for a budget without a score, patterns that are not one a block, and, while it lasts,
    for a call without that cache, or with padding: an evicted token has no place in its mask.
    """
    blocks = find_blocks(model)
    patterns = list(pattern) if isinstance(pattern, Sequence) else [pattern] * len(blocks)
    if len(patterns) != len(blocks):
        raise ValueError(f"{len(patterns)} patterns for {len(blocks)} blocks; give one, or one a block")
    if keep is not None:
        check_budget(keep)
        if score is None:
            raise ValueError(f"keep={keep} needs a score to tell which tokens stay, such as H2O()")
    cache = None if keep is None else evicting_cache(model)
    ours = Watching(patterns, score) if cache is None else Evicting(patterns, score, keep, cache)
    with using(model, ours.attention, ours.mask):
        yield cache


@contextmanager
def using(model: nn.Module, attention: Callable, mask: Callable) -> Iterator[None]:
    """While it lasts, the model calls `attention`, with what `mask` makes of its masks."""
    name, before = f"lightlib-{uuid.uuid4().hex}", model.config._attn_implementation
    # a pruned block may have a config of its own
    own = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    AttentionInterface.register(name, attention)
    # without a mask of the same name, transformers would give none, and the first queries would see the last
    AttentionMaskInterface.register(name, mask)
    try:
        for config in own.values():
            config._attn_implementation = name
        yield
    finally:
        for config in own.values():
            config._attn_implementation = before
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(name)  # there is no public way back


class Watching:
    """Attention with a pattern beside the model's own mask, shown to a score."""

    def __init__(self, patterns: list[Pattern | None], score: Score | None):
        self.patterns, self.score, self.first = patterns, score, 0

    def mask(self, *, q_offset: int = 0, allow_is_causal_skip: bool = True, **settings) -> Tensor:
        self.first = int(q_offset)
        return sdpa_mask(q_offset=q_offset, allow_is_causal_skip=False, **settings)

    def attention(
        self, module, q, k, v, mask, *, scaling, dropout=0.0, softcap=None, sliding_window=None, **_
    ):
        T, S = q.shape[2], k.shape[2]
        at = torch.arange(self.first, self.first + T, device=q.device)
        positions = (at[-1] + 1 - S + torch.arange(S, device=q.device)).view(1, 1, S)
        visible = within(mask, self.patterns[module.layer_idx], q, at, positions)
        out = mixed(module, q, k, v, visible, scaling, dropout, softcap)
        if self.score is not None:
            facts = at, positions, scaling, softcap, sliding_window, visible
            self.score(Seen(module.layer_idx, q, k, v, *facts))
        return out, None


class Evicting:
    """Attention over a cache that lets go, after each call, of all but the tokens that score best."""

    def __init__(self, patterns: list[Pattern | None], score: Score, keep: int | float, cache: Cache):
        self.patterns, self.score, self.keep, self.cache = patterns, score, keep, cache

    def mask(self, *, attention_mask: Tensor | None = None, **_) -> None:
        check_padding(attention_mask)

    def attention(
        self, module, q, k, v, mask, *, scaling, dropout=0.0, softcap=None, sliding_window=None, **_
    ):
        if mask is not None:
            raise ValueError("a mask with four dimensions names tokens that may be evicted; give none")
        layer = layer_of(self.cache, module.layer_idx, k)
        T, S = q.shape[2], k.shape[2]
        at = torch.arange(layer.seen - T, layer.seen, device=q.device)
        pattern = self.patterns[module.layer_idx]
        visible = None
        if sliding_window is not None or pattern is not None:
            visible = per_query_head(sees(at, layer.positions, sliding_window), q.shape[1])
            visible = within(visible, pattern, q, at, per_query_head(layer.positions, q.shape[1]))
        elif 1 < T < S:  # what is held comes before the queries, wherever it stood
            visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)[None, None]
        out = mixed(module, q, k, v, visible, scaling, dropout, softcap)
        keep = budget(self.keep, layer.seen)
        if sliding_window is not None:
            keep = min(keep, sliding_window - 1)  # the next query sees no more of them
        facts = at, layer.positions, scaling, softcap, sliding_window
        scores = self.score(Seen(module.layer_idx, q, k, v, *facts, layer=layer, keep=keep))
        if keep < S:
            if sliding_window is not None:
                left = layer.positions <= layer.seen - sliding_window
                scores = scores.masked_fill(left, -torch.inf)
            layer.retain(scores, keep)
        return out, None


def check_padding(attention_mask: Tensor | None) -> None:
    """Raises ValueError where a row is padded."""
    if attention_mask is not None and not attention_mask.all():
        padded = int((~attention_mask.bool()).any(-1).sum())
        raise ValueError(
            f"{padded} of {len(attention_mask)} rows are padded, and an evicting cache counts positions from "
            "the first token; run prompts of other lengths one by one"
        )


def layer_of(cache: Cache, block: int, keys: Tensor) -> EvictingLayer:
    """The block's part of the cache. Raises ValueError where the model was called without it."""
    layer = cache.layers[block]
    if layer.keys is not keys:
        raise ValueError("the model was called without the cache to evict from: past_key_values=cache")
    return layer


def within(visible: Tensor, pattern: Pattern | None, q: Tensor, at: Tensor, positions: Tensor) -> Tensor:
    """`visible` and the pattern, for queries at `at` (T,) and keys at `positions` (B or 1, H or 1, S)."""
    if pattern is None:
        return visible
    batch, head = (torch.arange(n, device=q.device) for n in q.shape[:2])
    return visible & pattern(
        batch[:, None, None, None], head[:, None, None], at[:, None], positions[:, :, None, :]
    )


def mixed(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scaling, dropout, softcap
) -> Tensor:
    """What the queries read of the values, (B, T, H, D). visible=None: all that comes no later."""
    if softcap is None:
        return sdpa_attention_forward(module, q, k, v, visible, dropout=dropout, scaling=scaling)[0]
    if visible is None:
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(
            k.shape[2] - q.shape[2]
        )
    weights = attention_weights(q, k, visible, scaling, softcap).to(v.dtype)
    weights = nn.functional.dropout(weights, dropout)
    B, K = v.shape[:2]
    out = weights.view(B, K, -1, weights.shape[-1]) @ v  # (B, K, H / K * T, D)
    return out.view(*q.shape[:3], -1).transpose(1, 2).contiguous()
