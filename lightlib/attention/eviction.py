"""A cache that evicts: each key-value head keeps the tokens that score best, and the tensors really shrink.

What is cached keeps the position it was written at, so rotary angles stay as they are. A query stands at the
number of tokens seen, however few of them are left.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from lightlib.attention.batch_rows import BatchRows
from lightlib.decoder import find_blocks

GONE = torch.iinfo(torch.long).max  # the position of a slot whose token is gone: no query comes after it


def best(scores: Tensor, n: int) -> Tensor:
    """The places (B, K, n) of each head's `n` highest scores (B, K, S), rising; all of them where n >= S."""
    return scores.topk(min(n, scores.shape[-1]), -1).indices.sort(-1).values


def take(held: Tensor, index: Tensor) -> Tensor:
    """held (B, K, S, ...) at the places index (B, K, n) -> (B, K, n, ...)."""
    return held.gather(2, along(held, index))


def along(held: Tensor, index: Tensor) -> Tensor:
    """index (B, K, n) as (B, K, n, ...), as wide as held (B, K, S, ...); as one head where they share it."""
    index, inside = index[:, : held.shape[1]], held.shape[3:]
    return index.view(*index.shape, *[1] * len(inside)).expand(*index.shape, *inside)


class EvictingLayer(BatchRows, CacheLayerMixin):
    """The keys and values (B, K, S, D) of a block's tokens that are left, and their `positions` (B, K, S).

    seen: how many tokens have come by. beside: what a policy notes for each token, (B, K or 1, S, ...).
    recent: what it notes of the latest queries, (B, ...). After single evictions the tokens lie in no order.
    """

    is_sliding = False

    def __init__(self):
        super().__init__()
        self.seen = 0
        self.positions: Tensor | None = None
        self.beside: dict[str, Tensor] = {}
        self.recent: dict[str, Tensor] = {}
        self.slots: dict[str, Tensor] = {}  # what is held, with one slot more at the end that is free

    def lazy_initialization(self, keys: Tensor, values: Tensor) -> None:
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys[:, :, :0], values[:, :, :0]
        self.positions = torch.zeros(*self.keys.shape[:3], dtype=torch.long, device=self.device)
        self.is_initialized = True

    @property
    def held(self) -> dict[str, Tensor]:
        """All that is held of each token, by name: (B, K or 1, S, ...)."""
        return {"keys": self.keys, "values": self.values, "positions": self.positions, **self.beside}

    @held.setter
    def held(self, tensors: dict[str, Tensor]) -> None:
        self.keys, self.values, self.positions, *rest = tensors.values()
        self.beside = dict(zip(self.beside, rest, strict=True))

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Add the keys and values (B, K, T, D) of the next T tokens; give those of all that are held."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        T = keys.shape[2]
        at = torch.arange(self.seen, self.seen + T, device=self.device).expand(*keys.shape[:2], T)
        new = {"keys": keys, "values": values, "positions": at}
        if T == 1 and self.slots.keys() == self.held.keys():
            for name, slots in self.slots.items():
                slots[:, :, -1:] = new.get(name, 0)
            self.held = self.slots
        else:
            for name, held in self.beside.items():
                new[name] = held.new_zeros(*held.shape[:2], T, *held.shape[3:])
            self.held = {name: torch.cat([held, new[name]], 2) for name, held in self.held.items()}
        self.slots = {}
        self.seen += T
        return self.keys, self.values

    def retain(self, scores: Tensor, n: int) -> None:
        """Evict all but the `n` tokens of each head with the highest scores (B, K, S)."""
        S = self.keys.shape[2]
        if n == S - 1:
            self._overwrite(scores.argmin(-1, keepdim=True))
        elif n < S:
            index = best(scores, n)
            self.held = {name: take(held, index) for name, held in self.held.items()}

    def _overwrite(self, place: Tensor) -> None:
        """Put the last token into the slot of the one at `place` (B, K, 1): nothing else is moved."""
        for held in self.held.values():
            held.scatter_(2, along(held, place), held[:, :, -1:].clone())
        self.slots = self.held
        self.held = {name: slots[:, :, :-1] for name, slots in self.slots.items()}

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

    def _for_each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.held = {name: change(held) for name, held in self.held.items()}
            self.recent = {name: change(held) for name, held in self.recent.items()}
            self.slots = {}


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
