"""The exercises of lesson 15."""

from __future__ import annotations

import torch
from torch import Tensor

from lightlib.exercise_data.exercise import Exercise


def evict(sums: dict[int, float], newest: int) -> int:
    return min((key for key in sums if key != newest), key=sums.get)


def budget_bytes(layers: int, kv_heads: int, head_dim: int, keep: int, bytes_each: float) -> float:
    return 2 * layers * kv_heads * head_dim * keep * bytes_each


def bits_a_number(bits: int, group_size: int) -> float:
    return bits + 2 * 16 / group_size


def round_keys(keys: Tensor, bits: int) -> Tensor:
    low, high = keys.amin(0), keys.amax(0)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    return ((keys - low) / step).round() * step + low


def round_tokens(keys: Tensor, bits: int) -> Tensor:
    return round_keys(keys.T, bits).T


def closed(gates: Tensor) -> Tensor:
    later = torch.ones(gates.shape, dtype=torch.bool).tril(-1)
    return gates.where(later, 1.0).cumprod(0)


KEYS = torch.tensor([[0.1, 8.0, -0.3], [0.4, 9.0, 0.2], [-0.2, 7.5, 0.05], [0.3, 8.2, -0.1]])
GATES = torch.tensor([[0.3, 1.0, 1.0], [1.0, 0.2, 0.4], [0.0, 1.0, 0.6]])

EXERCISES = {
    "15.evict": Exercise(
        "Write evict(sums, newest): the token that H2O drops, from {token: all the weight it was given}; the "
        "newest token stays whatever it has.",
        evict,
        cases=(({0: 0.9, 1: 2.8, 2: 0.4, 3: 0.1}, 3), ({0: 0.2, 5: 1.5, 6: 0.1, 9: 0.3}, 9)),
        slips=(
            (
                lambda sums, newest: min(sums, key=sums.get),
                "the newest token has had no time to be looked at; it stays.",
            ),
            (lambda sums, newest: min(sums), "that is the oldest; out goes the one with the smallest sum."),
            (
                lambda sums, newest: max((k for k in sums if k != newest), key=sums.get),
                "that is the heaviest hitter, which is to be kept.",
            ),
        ),
        hints=(
            "look at all keys of `sums` but `newest`.",
            "min((key for key in sums if key != newest), key=sums.get)",
        ),
    ),
    "15.budget_bytes": Exercise(
        "Write budget_bytes(layers, kv_heads, head_dim, keep, bytes_each): the bytes of a cache in which "
        "each key-value head keeps `keep` tokens.",
        budget_bytes,
        cases=((30, 3, 64, 128, 4), (32, 32, 128, 512, 2)),
        slips=(
            (
                lambda layers, kv_heads, head_dim, keep, bytes_each: (
                    layers * kv_heads * head_dim * keep * bytes_each
                ),
                "a token has a key and a value.",
            ),
            (
                lambda layers, kv_heads, head_dim, keep, bytes_each: (
                    2 * layers * head_dim * keep * bytes_each
                ),
                "each key-value head keeps tokens of its own.",
            ),
        ),
        hints=("2 for key and value.", "2 * layers * kv_heads * head_dim * keep * bytes_each"),
    ),
    "15.bits_a_number": Exercise(
        "Write bits_a_number(bits, group_size): the bits that a rounded number of the cache takes, where "
        "each group has a scale and a minimum of 16 bits.",
        bits_a_number,
        cases=((4, 32), (2, 32), (2, 128)),
        slips=(
            (lambda bits, group_size: bits + 16 / group_size, "a group has a scale and a minimum."),
            (lambda bits, group_size: bits, "scales and minima are stored too."),
            (lambda bits, group_size: bits + 32, "a group shares them: divide by its size."),
        ),
        hints=("32 bits are shared by group_size numbers.", "bits + 32 / group_size"),
    ),
    "15.round_keys": Exercise(
        "Write round_keys(keys, bits): keys (tokens, channels) rounded to the nearest of 2**bits levels, "
        "which lie evenly between each channel's least and largest value.",
        round_keys,
        cases=((KEYS, 2), (KEYS, 4)),
        slips=(
            (
                round_tokens,
                "that gives each token its own levels; a channel that is large in all tokens then takes the "
                "room of the others. Levels for each channel.",
            ),
            (
                lambda keys, bits: round_keys(keys.reshape(-1, 1), bits).view_as(keys),
                "that gives all numbers the same levels; each channel has its own.",
            ),
        ),
        hints=(
            "keys.amin(0), keys.amax(0) are the channels' ends; 2**bits levels have 2**bits - 1 steps.",
            "step = (high - low) / (2**bits - 1); ((keys - low) / step).round() * step + low",
        ),
    ),
    "15.closed": Exercise(
        "Write closed(gates): gates (T, T) say how far query k (row) leaves key j (column) open, for those "
        "after it. Give (T, T): what is left of key j once queries j + 1 to k have had their say. Nothing "
        "before the key, nor the key itself, has one, so what lies on the diagonal or above it is 1.",
        closed,
        cases=((GATES,), (torch.full((4, 4), 0.5),)),
        slips=(
            (
                lambda gates: gates.tril(-1) + torch.ones_like(gates).triu(),
                "what one query has closed stays closed for all after it: multiply down the rows.",
            ),
            (
                lambda gates: gates.cumprod(0),
                "a key's own gate, and those of queries before it, do not count.",
            ),
            (
                lambda gates: gates.where(torch.ones_like(gates).tril(-1) > 0, 1.0).cumprod(1),
                "the product runs over queries, down a column, not over keys.",
            ),
        ),
        hints=(
            "put 1 on the diagonal and above it first.",
            "gates.where(torch.ones_like(gates).tril(-1) > 0, 1.0).cumprod(0)",
        ),
    ),
}
