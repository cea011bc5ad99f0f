"""Which tokens a cache keeps: each policy is a score, `attend(model, score=H2O(), keep=512)`.

A policy sees one call of one block's attention and gives (batch, kv heads, keys): the more, the longer kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightlib.attention.seen import Seen

QUERIES_AT_ONCE = 256  # bounds the memory that weights take in a long prompt


@dataclass(frozen=True)
class StreamingLLM:
    """The first tokens, where attention sinks, and the newest.  Xiao et al. 2023, arXiv:2309.17453"""

    sinks: int = 4

    def __call__(self, seen: Seen) -> Tensor:
        if seen.keep <= self.sinks:
            raise ValueError(f"keep={seen.keep} leaves no room beside {self.sinks} sinks; keep more tokens")
        return protect(seen.positions.float(), seen.positions < self.sinks)


@dataclass(frozen=True)
class KeyNorm:
    """Keys of small norm, which attract attention.  Devoto et al. 2024, arXiv:2406.11430"""

    def __call__(self, seen: Seen) -> Tensor:
        return -seen.keys.float().norm(dim=-1)


@dataclass(frozen=True)
class H2O:
    """Heavy hitters and the newest: `recent` is the latter's share.  Zhang et al. 2023, arXiv:2306.14048

    A key's score is the sum of the weights it has had from every query since it was cached, over the query
    heads that share it: never from a query that is still to come.
    """

    recent: float = 0.5

    def __call__(self, seen: Seen) -> Tensor:
        mass = seen.layer.beside.get("mass")
        mass = received(seen) if mass is None else mass + received(seen)
        seen.layer.beside["mass"] = mass
        newest = round(self.recent * seen.keep)
        return protect(mass, seen.positions >= seen.layer.seen - newest)


@dataclass(frozen=True)
class SnapKV:
    """What the last `window` queries look at, and its neighbours.  Li et al. 2024, arXiv:2404.14469

    kernel: how many keys side by side share their weights, so that what surrounds a hit stays with it. The
    cache holds those queries too, which is as much as window x heads / (2 x kv heads) tokens.
    """

    window: int = 64
    kernel: int = 5

    def __call__(self, seen: Seen) -> Tensor:
        queries = latest(seen, self.window)
        newest = seen.layer.seen - queries.shape[2]
        at = torch.arange(newest, seen.layer.seen, device=queries.device)
        weights = shared(seen.weights_of(queries, at).mean(2), seen.keys.shape[1])  # (B, K, S)
        order = seen.positions.argsort(-1)  # neighbours in the text, not in memory
        pooled = F.avg_pool1d(weights.gather(-1, order), self.kernel, stride=1, padding=self.kernel // 2)
        return protect(torch.empty_like(pooled).scatter_(-1, order, pooled), seen.positions >= newest)


@dataclass(frozen=True)
class TOVA:
    """What the last query looks at.  Oren et al. 2024, arXiv:2401.06104"""

    def __call__(self, seen: Seen) -> Tensor:
        weights = seen.weights(begin=seen.queries.shape[2] - 1)[:, :, -1]  # (B, H, S)
        return protect(shared(weights, seen.keys.shape[1]), seen.positions == seen.layer.seen - 1)


@dataclass(frozen=True)
class Random:
    """Tokens by lot, and always the newest: what a score must beat."""

    seed: int = 0

    def __call__(self, seen: Seen) -> Tensor:
        lots = seen.layer.beside.get("lot")
        lots = torch.zeros_like(seen.positions, dtype=torch.float32) if lots is None else lots
        generator = torch.Generator().manual_seed(hash((self.seed, seen.block, seen.layer.seen)) % 2**31)
        drawn = torch.rand(lots.shape, generator=generator).to(lots)
        seen.layer.beside["lot"] = lots = drawn.where(lots == 0, lots)
        return protect(lots, seen.positions == seen.layer.seen - 1)


def protect(scores: Tensor, kept: Tensor) -> Tensor:
    """The scores, with those of `kept` above all others."""
    return scores.masked_fill(kept, torch.inf)


def received(seen: Seen) -> Tensor:
    """The weight (B, K, S) that each key gets from this call's queries, summed over those and their heads."""
    total = 0
    for begin in range(0, seen.queries.shape[2], QUERIES_AT_ONCE):
        weights = seen.weights(begin, begin + QUERIES_AT_ONCE).sum(2)  # (B, H, S)
        total = total + shared(weights, seen.keys.shape[1], "sum")
    return total


def shared(weights: Tensor, kv_heads: int, how: str = "mean") -> Tensor:
    """(B, H, S) -> (B, K, S): the mean or sum over the query heads that share a key-value head."""
    grouped = weights.unflatten(1, (kv_heads, -1))
    return grouped.mean(2) if how == "mean" else grouped.sum(2)


def latest(seen: Seen, n: int) -> Tensor:
    """The last `n` queries (B, H, n, D), or all there were; the cache notes them for the next call."""
    before = seen.layer.recent.get("queries")
    queries = seen.queries if before is None else torch.cat([before, seen.queries], 2)
    seen.layer.recent["queries"] = queries = queries[:, :, -n:].clone()
    return queries
