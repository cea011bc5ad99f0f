"""What one call of a block's attention sees: queries, the keys that are held, the weights between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightlib.attention.eviction import EvictingLayer


def attention_weights(
    queries: Tensor, keys: Tensor, visible: Tensor, scaling: float, softcap: float | None = None
) -> Tensor:
    """softmax(q k^T scaling) in float32: queries (B, H, T, D), keys (B, K, S, D) -> (B, H, T, S).

    visible: boolean, broadcast to (B, H, T, S); a query that sees no key has weights of zero.
    softcap: logits become softcap * tanh(logits / softcap), as in Gemma 2.
    """
    B, H, T, D = queries.shape
    K = keys.shape[1]
    logits = (queries.reshape(B, K, -1, D) @ keys.mT).view(B, H, T, -1).float() * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)


def sees(at: Tensor, positions: Tensor, window: int | None = None) -> Tensor:
    """Whether a query at `at` (T,) sees a key at `positions` (..., S): (..., T, S). Not what comes after it,
    nor what came `window` tokens before it or more."""
    gap = at[:, None] - positions[..., None, :]
    return gap >= 0 if window is None else (gap >= 0) & (gap < window)


def per_query_head(held: Tensor, heads: int) -> Tensor:
    """(B, K, ...) as (B, heads, ...), where heads side by side share one of K; (B, 1, ...) stays as it is."""
    return held if held.shape[1] == 1 else held.repeat_interleave(heads // held.shape[1], 1)


@dataclass(frozen=True)
class Seen:
    """One call of one block's attention: T queries, the last T of all tokens so far, and S keys.

    queries (B, H, T, D) at `at` (T,); keys, values (B, K, S, D) at `positions` (B, K, S) or (1, 1, S).
    layer: the block's part of the evicting cache, and `keep` how many of its tokens will stay; or None.
    """

    block: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    at: Tensor
    positions: Tensor
    scaling: float
    softcap: float | None
    window: int | None
    mask: Tensor | None = None  # what is visible, where the model itself said it: (B, 1, T, S)
    layer: EvictingLayer | None = None
    keep: int | None = None

    def weights(self, begin: int = 0, end: int | None = None) -> Tensor:
        """The attention weights (B, H, t, S), float32, of this call's queries from `begin` to `end`."""
        if self.mask is None:
            return self.weights_of(self.queries[:, :, begin:end], self.at[begin:end])
        queries, visible = self.queries[:, :, begin:end], self.mask[:, :, begin:end]
        return attention_weights(queries, self.keys, visible, self.scaling, self.softcap)

    def weights_of(self, queries: Tensor, at: Tensor) -> Tensor:
        """The weights (B, H, t, S) that queries (B, H, t, D) at `at` (t,) would give the keys held now."""
        visible = per_query_head(sees(at, self.positions, self.window), queries.shape[1])
        return attention_weights(queries, self.keys, visible, self.scaling, self.softcap)
