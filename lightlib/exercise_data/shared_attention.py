"""The exercises of lesson 14."""

from __future__ import annotations

import torch
from torch import Tensor

from lightlib.exercise_data.exercise import Exercise


def tokens_run(prompt: int, new: int) -> int:
    return sum(prompt + i for i in range(new))


def reads(head: int, heads: int, kv_heads: int) -> int:
    return head // (heads // kv_heads)


def pool(W: Tensor, heads: int, kv_heads: int) -> Tensor:
    return W.view(kv_heads, heads // kv_heads, -1, W.shape[1]).mean(1).flatten(0, 1)


def intensity(heads: int, kv_heads: int, bytes_each: float) -> float:
    return 2 * heads / (kv_heads * bytes_each)


def parameters_saved(layers: int, hidden: int, head_dim: int, before: int, after: int) -> int:
    return 2 * layers * (before - after) * head_dim * hidden


WEIGHT = torch.arange(48.0).view(8, 6) ** 1.5  # four heads of two rows

EXERCISES = {
    "14.tokens_run": Exercise(
        "Write tokens_run(prompt, new): without a cache each new token needs the whole text so far to be run "
        "again. How many tokens pass through the model in all, until `new` tokens are written?",
        tokens_run,
        cases=((3, 4), (256, 64)),
        slips=(
            (
                lambda prompt, new: prompt + new - 1,
                "that is with a cache: each token runs once. Without, all of the text runs again for each.",
            ),
            (
                lambda prompt, new: sum(prompt + i for i in range(1, new + 1)),
                "the first new token comes from the prompt alone; the last one written is never run.",
            ),
            (lambda prompt, new: prompt * new, "the text grows by one with each token that is written."),
        ),
        hints=(
            "the first pass runs `prompt` tokens, the next one more.",
            "sum(prompt + i for i in range(new))",
        ),
    ),
    "14.reads": Exercise(
        "Write reads(head, heads, kv_heads): which key-value head does query head number `head` of `heads` "
        "read, counting from 0? Heads that share lie side by side.",
        reads,
        cases=((6, 8, 2), (5, 8, 2), (7, 8, 8), (7, 8, 1), (4, 9, 3)),
        slips=(
            (
                lambda head, heads, kv_heads: head % kv_heads,
                "that deals the heads out one by one; those that share lie side by side.",
            ),
            (
                lambda head, heads, kv_heads: head // kv_heads,
                "divide by the size of a group, heads / kv_heads, not by the number of groups.",
            ),
        ),
        hints=("a group has heads // kv_heads query heads.", "head // (heads // kv_heads)"),
    ),
    "14.pool": Exercise(
        "Write pool(W, heads, kv_heads): W (heads * head_dim, hidden) makes the keys of all heads, head "
        "after head. Give the matrix (kv_heads * head_dim, hidden) in which those that share become a mean.",
        pool,
        cases=((WEIGHT, 4, 2), (WEIGHT, 4, 1), (WEIGHT, 4, 4)),
        slips=(
            (
                lambda W, heads, kv_heads: (
                    W.view(heads // kv_heads, kv_heads, -1, W.shape[1]).mean(0).flatten(0, 1)
                ),
                "that takes every kv_heads-th head into a group; those that share lie side by side.",
            ),
            (
                lambda W, heads, kv_heads: W.view(kv_heads, heads // kv_heads, -1, W.shape[1])[:, 0].flatten(
                    0, 1
                ),
                "that keeps the first head of each group; take the mean of the group.",
            ),
        ),
        hints=(
            "W.view(kv_heads, heads // kv_heads, head_dim, hidden) has the group as its second mode.",
            "W.view(kv_heads, heads // kv_heads, -1, W.shape[1]).mean(1).flatten(0, 1)",
        ),
    ),
    "14.intensity": Exercise(
        "Write intensity(heads, kv_heads, bytes_each): the FLOPs for each byte that attention reads of the "
        "cache in a decode step. A query meets each key in 2 x head_dim FLOPs and mixes each value in as "
        "many; key and value are head_dim numbers of bytes_each.",
        intensity,
        cases=((32, 32, 2), (32, 8, 2), (9, 3, 4), (64, 1, 1)),
        slips=(
            (
                lambda heads, kv_heads, bytes_each: 2 / bytes_each,
                "each key that is read meets the query of every head in its group.",
            ),
            (
                lambda heads, kv_heads, bytes_each: 4 * heads / (kv_heads * bytes_each),
                "the value is read as well: twice the FLOPs, and twice the bytes.",
            ),
            (
                lambda heads, kv_heads, bytes_each: 2 * kv_heads / (heads * bytes_each),
                "upside down: fewer key-value heads mean more FLOPs for each byte.",
            ),
        ),
        hints=(
            "FLOPs a token: 4 x heads x head_dim; bytes: 2 x kv_heads x head_dim x bytes_each.",
            "2 * heads / (kv_heads * bytes_each)",
        ),
    ),
    "14.parameters_saved": Exercise(
        "Write parameters_saved(layers, hidden, head_dim, before, after): the weights that go when `before` "
        "key-value heads become `after` (no biases).",
        parameters_saved,
        cases=((4, 128, 16, 8, 2), (32, 4096, 128, 32, 8)),
        slips=(
            (
                lambda layers, hidden, head_dim, before, after: layers * (before - after) * head_dim * hidden,
                "keys and values: both matrices shrink.",
            ),
            (
                lambda layers, hidden, head_dim, before, after: 2 * (before - after) * head_dim * hidden,
                "in every layer.",
            ),
        ),
        hints=(
            "one head's keys are made by head_dim rows of `hidden` weights.",
            "2 * layers * (before - after) * head_dim * hidden",
        ),
    ),
}
