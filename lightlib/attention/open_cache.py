"""A cache, whole or compressed: `with open_cache(model) as cache: model(ids, past_key_values=cache)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn
from transformers.cache_utils import Cache, DynamicCache

OpenCache = Callable[[nn.Module], AbstractContextManager[Cache]]  # such as partial(quantized, bits=4)


@contextmanager
def full(model: nn.Module) -> Iterator[Cache]:
    """transformers' own cache, which loses nothing: what the compressed ones are measured against."""
    yield DynamicCache(config=model.config)
