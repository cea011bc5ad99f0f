"""What a cache costs: bytes by formula and as allocated, and time per token over the context."""

from __future__ import annotations

import statistics
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from lightlib.attention.open_cache import OpenCache
from lightlib.cost import clock, spread
from lightlib.decoder import attention_width, find_blocks, head_dim, linear_shapes, roles
from lightlib.quality import device_of
from lightlib.report import table, tidy


# bytes
def kv_head_counts(model: nn.Module) -> list[int]:
    """How many key-value heads each block has, as its layers make them."""
    names, width = roles(model), head_dim(model)
    found = []
    for block in find_blocks(model).values():
        shapes = linear_shapes(block)
        parts = [(name, block.get_submodule(name)) for name in names.attention_in]
        rows = sum(shapes[name][0] if name in shapes else part.out_features for name, part in parts)
        found.append((rows - attention_width(block, names)) // (2 * width))  # rows: queries, keys, values
    return found


def held_tokens(model: nn.Module, tokens: int) -> list[int]:
    """How many of so many tokens each block's cache holds: with a sliding window, no more than that."""
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config).layers]
    return [tokens if window is None else min(tokens, window) for window in windows]


def kv_bytes(
    model: nn.Module, tokens: int, batch: int = 1, bits: float | None = None, kv_heads: int | None = None
) -> int:
    """Bytes of the keys and values of `batch` sequences: the sum of 2 x kv heads x head_dim x tokens.

    bits: of each number, those of the model's dtype unless given. kv_heads: as if each block had so many; by
    default they are the blocks' own, so a model whose blocks were cut to different numbers is counted right.
    """
    if tokens < 0 or batch < 1 or (kv_heads is not None and kv_heads < 1):
        raise ValueError(
            f"tokens={tokens}, batch={batch}, kv_heads={kv_heads}: there are no fewer than 0, 1 and 1 of them"
        )
    held = held_tokens(model, tokens)
    heads = kv_head_counts(model) if kv_heads is None else [kv_heads] * len(held)
    numbers = 2 * batch * head_dim(model) * sum(h * n for h, n in zip(heads, held, strict=True))
    return round(numbers * (8 * model.dtype.itemsize if bits is None else bits) / 8)


def allocated_bytes(cache: Cache) -> int:
    """Bytes of all storages behind the tensors that a cache holds, each once, whatever class it is of.

    A slice counts as the whole tensor that it was cut from, since that stays in memory: a cache that drops
    tokens by slicing saves nothing, and this shows it.
    """
    storages = (tensor.untyped_storage() for tensor in tensors_in(cache, set()))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def tensors_in(held: object, seen: set[int]) -> Iterator[Tensor]:
    """The tensors in an object's attributes, in lists, tuples, sets and dicts; modules are the model's."""
    if id(held) in seen:
        return
    seen.add(id(held))
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, Mapping):
        for value in held.values():
            yield from tensors_in(value, seen)
    elif isinstance(held, (list, tuple, set, frozenset)):
        for value in held:
            yield from tensors_in(value, seen)
    elif hasattr(held, "__dict__") and not isinstance(held, (type, nn.Module, types.FunctionType)):
        yield from tensors_in(vars(held), seen)


# time
@dataclass(frozen=True)
class DecodeTime:
    """A step of one token at this context: median and range between the quartiles; bytes after the steps."""

    cache: str
    context: int
    tpot_ms: float
    spread_ms: float
    cache_bytes: int


@dataclass(frozen=True)
class DecodeTimes:
    """One row for each context and cache, shown as a table in a notebook."""

    rows: tuple[DecodeTime, ...]

    def __iter__(self):
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def _repr_html_(self) -> str:
        head = ("cache", "context", "ms a token", "spread ms", "cache bytes")
        return table(head, [tuple(map(tidy, vars(row).values())) for row in self.rows])


def decode_times(
    model: nn.Module,
    caches: Mapping[str, OpenCache],
    contexts: list[int],
    new: int = 8,
    repeats: int = 3,
    batch: int = 1,
    chunk: int = 512,
) -> DecodeTimes:
    """Time per output token and bytes of each cache after each context, with the model's own forward.

    A context is `batch` rows of fixed, arbitrary ids, prefilled `chunk` tokens at a time; then `new` steps of
    one token are timed. The caches take turns at each repeat, so that a noisy machine harms all alike; the
    first step of each turn is not counted. Raises ValueError where context + new exceeds the model's.
    """
    check(model, caches, contexts, new, repeats, batch, chunk)
    rows, model = [], model.eval()
    for context in contexts:
        times: dict[str, list[float]] = {name: [] for name in caches}
        held = {}
        for _ in range(repeats):
            for name, open_cache in caches.items():
                with open_cache(model) as cache:
                    times[name] += clock(steps(model, cache, context, batch, chunk), new + 1)[1:]
                    held[name] = allocated_bytes(cache)
        for name, each in times.items():
            facts = statistics.median(each) * 1e3, spread(each) * 1e3, held[name]
            rows.append(DecodeTime(name, context, *facts))
    return DecodeTimes(tuple(rows))


@torch.no_grad()
def steps(model: nn.Module, cache: Cache, context: int, batch: int, chunk: int) -> Iterator[Tensor]:
    """Greedy tokens (batch, 1) without end: the first takes the prefill of the context and a step."""
    ids = torch.arange(batch * context, device=device_of(model)).view(batch, context)
    for part in (ids % min(model.config.vocab_size, 1000)).split(chunk, 1):
        logits = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    while True:
        token = logits[:, -1:].argmax(-1)
        logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        yield token


def check(model, caches, contexts, new, repeats, batch, chunk) -> None:
    """Raises ValueError for what cannot be timed."""
    if not caches or not contexts:
        raise ValueError("no caches or no contexts: give {name: open_cache} and a list of lengths")
    if min(*contexts, new, repeats, batch, chunk) < 1:
        raise ValueError(
            f"contexts={contexts}, new={new}, repeats={repeats}, batch={batch}, chunk={chunk}: "
            "all must be at least 1"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and max(contexts) + new + 1 > limit:
        raise ValueError(
            f"context {max(contexts)} and {new + 1} new tokens exceed the model's context of {limit}"
        )
