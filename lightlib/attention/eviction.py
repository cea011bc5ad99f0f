"""A cache that evicts: each key-value head keeps the tokens that score best, and the tensors really shrink.

What is cached keeps the position it was written at, so rotary angles stay as they are. A query stands at the
number of tokens seen, however few of them are left.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from lightlib.decoder import find_blocks

GONE = torch.iinfo(torch.long).max  # the position of a slot whose token is gone: no query comes after it


def best(scores: Tensor, n: int) -> Tensor:
    """The places (B, K, n) of each head's `n` highest scores (B, K, S), rising; all of them where n >= S."""
    return scores.topk(min(n, scores.shape[-1]), -1).indices.sort(-1).values


def take(held: Tensor, index: Tensor) -> Tensor:
    """held (B, K, S, ...) at the places index (B, K, n) -> (B, K, n, ...)."""
    index = index[:, : held.shape[1]]  # what all heads share is held once
    return held.gather(
        2, index.view(*index.shape, *[1] * (held.dim() - 3)).expand(*index.shape, *held.shape[3:])
    )


class EvictingLayer(CacheLayerMixin):
    """The keys and values (B, K, S, D) of a block's tokens that are left, and their `positions` (B, K, S).

    seen: how many tokens have come by. beside: what a policy notes for each token, (B, K or 1, S, ...).
    recent: what it notes of the latest queries, (B, ...).
    """

    is_sliding = False

    def __init__(self):
        super().__init__()
        self.seen = 0
        self.positions: Tensor | None = None
        self.beside: dict[str, Tensor] = {}
        self.recent: dict[str, Tensor] = {}

    def lazy_initialization(self, keys: Tensor, values: Tensor) -> None:
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys[:, :, :0], values[:, :, :0]
        self.positions = torch.zeros(*self.keys.shape[:3], dtype=torch.long, device=self.device)
        self.is_initialized = True

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Add the keys and values (B, K, T, D) of the next T tokens; give those of all that are held."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        T = keys.shape[2]
        at = torch.arange(self.seen, self.seen + T, device=self.device).expand(*keys.shape[:2], T)
        self.keys = torch.cat([self.keys, keys], 2)
        self.values = torch.cat([self.values, values], 2)
        self.positions = torch.cat([self.positions, at], 2)
        self.beside = {
            name: torch.cat([held, held.new_zeros(*held.shape[:2], T, *held.shape[3:])], 2)
            for name, held in self.beside.items()
        }
        self.seen += T
        return self.keys, self.values

    def retain(self, index: Tensor) -> None:
        """Evict all but the tokens at the places index (B, K, n) of each head."""
        if index.shape[2] == self.keys.shape[2]:
            return
        self.keys, self.values = take(self.keys, index), take(self.values, index)
        self.positions = take(self.positions, index)
        self.beside = {name: take(held, index) for name, held in self.beside.items()}

    def get_seq_length(self) -> int:
        """The tokens seen, which is where the next one stands."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All that is held comes before the queries: (keys in the mask, the position of its first)."""
        held = self.keys.shape[2] if self.is_initialized else 0
        return held + query_length, self.seen - held

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.__init__()

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            f"{-tokens_to_remove} tokens cannot be taken back: what was evicted for them is gone; "
            "generate without assistance, or with a plain cache"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._for_each(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._for_each(lambda held: held.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._for_each(lambda held: held[indices])

    def _for_each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor along the batch."""
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
            self.positions = change(self.positions)
            self.beside = {name: change(held) for name, held in self.beside.items()}
            self.recent = {name: change(held) for name, held in self.recent.items()}


def evicting_cache(model: nn.Module) -> Cache:
    """An empty cache of evicting layers, one a block."""
    return Cache(layers=[EvictingLayer() for _ in find_blocks(model)])


def budget(keep: int | float, seen: int) -> int:
    """How many tokens stay of `seen`: an integer is their number, a float their share, one at least.

    >>> budget(512, 1024), budget(0.25, 1024)
    (512, 256)
    """
    return keep if isinstance(keep, int) else max(1, round(keep * seen))


def check_budget(keep: int | float) -> None:
    """Raises ValueError for a budget that is no number of tokens, and no share of them."""
    if isinstance(keep, bool) or not (keep >= 1 if isinstance(keep, int) else 0 < keep <= 1):
        raise ValueError(f"keep={keep!r}: give a number of tokens, 1 at least, or a share of them in (0, 1]")
