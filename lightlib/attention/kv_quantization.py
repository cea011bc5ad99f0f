"""A cache in few bits: packed groups of the older tokens, and the newest left as they are.

Liu et al. 2024 (KIVI), arXiv:2402.02750.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lightlib.attention.batch_rows import BatchRows
from lightlib.attention.kv_codes import ALONG, Packed, Rounding


class PackedLayer(BatchRows, DynamicLayer):
    """A block's cache: packed groups of the oldest tokens, and `keys`, `values` (B, K, S, D) of the recent.

    Once `residual` + group_size tokens are recent, the oldest group_size of them are packed; after a long
    prompt, all whole groups beyond the residual at once. The call that brings tokens sees them, and all that
    were recent, as they are: rounding begins with the next one.
    """

    is_croppable = False  # a token that was packed does not come back as it was

    def __init__(self, keys: Rounding, values: Rounding, residual: int):
        super().__init__()
        self.rounding, self.residual = (keys, values), residual
        self.packed: tuple[Packed, Packed] | None = None

    @property
    def packed_tokens(self) -> int:
        return 0 if self.packed is None else self.packed[0].codes.shape[2] * self.rounding[0].group_size

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Add the keys and values (B, K, T, D) of T tokens; give those of all tokens."""
        recent = super().update(key_states, value_states)
        whole = recent
        if self.packed is not None:
            older = (r.decode(p, self.dtype) for r, p in zip(self.rounding, self.packed, strict=True))
            whole = tuple(torch.cat(pair, 2) for pair in zip(older, recent, strict=True))
        self._pack(recent)
        return whole

    def _pack(self, recent: tuple[Tensor, Tensor]) -> None:
        """Pack all whole groups of the recent tokens beyond the residual."""
        group_size = self.rounding[0].group_size
        n = (recent[0].shape[2] - self.residual) // group_size * group_size
        if n <= 0:
            return
        new = tuple(r.encode(x[:, :, :n]) for r, x in zip(self.rounding, recent, strict=True))
        if not all(p.scale.isfinite().all() and p.minimum.isfinite().all() for p in new):
            raise ValueError(
                "keys or values are not finite, or beyond 65504, the most that their float16 scales hold; "
                "use a plain cache for this model"
            )
        old = self.packed
        self.packed = new if old is None else tuple(a.then(b) for a, b in zip(old, new, strict=True))
        self.keys, self.values = (x[:, :, n:].clone() for x in recent)  # a slice would keep all in memory

    def get_seq_length(self) -> int:
        return self.packed_tokens + super().get_seq_length()

    def reset(self) -> None:
        super().reset()
        self.packed = None

    def crop(self, tokens_to_remove: int) -> None:
        recent = super().get_seq_length()
        if -tokens_to_remove > recent:
            raise ValueError(
                f"{-tokens_to_remove} tokens cannot be taken back: only the last {recent} are not packed; "
                "take a larger residual"
            )
        super().crop(tokens_to_remove)

    def _for_each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
        if self.packed is not None:
            self.packed = tuple(packed.each(change) for packed in self.packed)


def layer_bytes(layer: PackedLayer, tokens: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """The bytes of one sequence of `tokens` that came in one call; a recent number takes `itemsize`."""
    group_size = layer.rounding[0].group_size
    groups = max(0, tokens - layer.residual) // group_size
    recent = 2 * (tokens - groups * group_size) * head_dim * itemsize
    return kv_heads * (groups * sum(r.group_bytes(head_dim) for r in layer.rounding) + recent)


@contextmanager
def quantized(
    model: nn.Module,
    *,
    bits: int = 4,
    key_bits: int | None = None,
    value_bits: int | None = None,
    group_size: int = 32,
    residual: int = 128,
    keys: str = "channel",
) -> Iterator[Cache]:
    """A cache in few bits for this model: `model.generate(ids, past_key_values=cache)`.

    key_bits, value_bits: 1 to 8, `bits` unless given. group_size: tokens packed at once, and numbers that
    share a scale. residual: how many of the newest stay as they are, at least; with as many as all tokens the
    logits are those of a plain cache. keys="token" rounds them as values are, to be compared with.

    The memory is really smaller; speed is simulated: each step decodes all that is packed. Blocks with a
    sliding window keep transformers' own layer, unrounded, since the window bounds it. Padding on the left is
    rounded with the tokens. Raises ValueError for settings that do not fit.
    """
    of_keys = Rounding(bits if key_bits is None else key_bits, group_size, keys)
    of_values = Rounding(bits if value_bits is None else value_bits, group_size, "token")
    check(of_keys, of_values, residual)
    layers = DynamicCache(config=model.config).layers
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            layers[i] = PackedLayer(of_keys, of_values, residual)
    yield Cache(layers=layers)


def check(keys: Rounding, values: Rounding, residual: int) -> None:
    """Raises ValueError for settings that no cache can have."""
    for name, rounding in (("key", keys), ("value", values)):
        if rounding.bits not in range(1, 9):
            raise ValueError(f"{name} bits {rounding.bits}: codes are packed in 1 to 8 bits")
    if keys.group_size < 8 or keys.group_size % 8:
        raise ValueError(f"group_size={keys.group_size}: take a multiple of 8, which fills whole bytes")
    if residual < 0:
        raise ValueError(f"residual={residual}: give how many of the newest tokens stay as they are")
    if keys.per not in ALONG:
        raise ValueError(f"keys={keys.per!r}: choose one of {', '.join(ALONG)}")
