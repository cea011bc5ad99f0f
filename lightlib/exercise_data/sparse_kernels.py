"""The exercises of lesson 06."""

from __future__ import annotations

import torch
from torch import Tensor, tensor

from lightlib.exercise_data.exercise import Exercise


def unpack(words: Tensor, n_out: int, n_in: int) -> Tensor:
    tile = torch.zeros(n_out * n_in, dtype=torch.int16)
    tile[words >> 16] = (words & 0xFFFF).to(torch.int16)
    return tile.view(n_out, n_in)


def turns(slots: Tensor) -> int:
    return int((slots // 2 % 32).bincount().max())


def place(mask: int, i: int) -> int:
    return (mask & (1 << i) - 1).bit_count()


def ones_above(mask: int, i: int) -> int:
    return (mask >> i + 1).bit_count()


def step_us(load: float, extract: float, multiply: float, buffers: int) -> float:
    return load + extract + multiply if buffers == 1 else max(load, extract + multiply)


WORDS = tensor([5 | 2 << 16, 7 | 0 << 16, 1 | 11 << 16, 9 | 6 << 16])
FEW = tensor([1000 | 1 << 16, 3 | 3 << 16])
SPREAD, ONE_BANK = torch.arange(0, 64, 2), torch.arange(32) * 64
MIXED = torch.cat([torch.arange(0, 56, 2), tensor([64, 128, 66, 70])])
BYTES = 25 / 8

EXERCISES = {
    "06.unpack": Exercise(
        "Write unpack(words, n_out, n_in): the tile (n_out, n_in) of 16-bit whole numbers that Tiled-CSL "
        "words stand for: the value in the low 16 bits of a word, its slot, row x n_in + column, in the "
        "high ones. What no word names is 0.",
        unpack,
        cases=((WORDS, 3, 4), (FEW, 2, 2)),
        slips=(
            (
                lambda words, m, k: unpack((words & 0xFFFF) << 16 | words >> 16, m, k),
                "value and slot are the other way round: the slot is in the high bits.",
            ),
            (
                lambda words, m, k: unpack(words, k, m).T,
                "a slot counts along a row first: row x n_in + column.",
            ),
        ),
        hints=(
            "words >> 16 are the slots, words & 0xFFFF the values.",
            "tile = torch.zeros(n_out * n_in); tile[words >> 16] = ...; tile.view(n_out, n_in)",
        ),
    ),
    "06.turns": Exercise(
        "Write turns(slots): how many turns one store of a warp takes. slots: 32 places in units of 16 "
        "bits, no two in one cell of 32 bits; cell c lies in bank c mod 32, and a bank serves one a turn.",
        turns,
        cases=((SPREAD,), (ONE_BANK,), (MIXED,)),
        slips=(
            (
                lambda slots: int((slots % 32).bincount().max()),
                "banks are 32 bits wide: two slots share a cell, so halve the slot first.",
            ),
            (
                lambda slots: int((slots // 2 % 32).unique().numel()),
                "that counts the banks in use; the fullest one decides.",
            ),
        ),
        hints=("the bank of a slot is slot // 2 % 32.", "(slots // 2 % 32).bincount().max()"),
    ),
    "06.place": Exercise(
        "Write place(mask, i): where the value of weight i stands among the stored values, if bit i of the "
        "whole number mask says whether weight i is stored.",
        place,
        cases=((0b10110, 4), (0b10110, 1), (0xFFFF0000, 20)),
        slips=(
            (
                lambda mask, i: (mask & (2 << i) - 1).bit_count(),
                "that counts the bit itself too: the first value stands at place 0.",
            ),
            (ones_above, "those are the values behind it; count the ones below bit i."),
            (lambda mask, i: i, "that is its place among all weights, not among those that are stored."),
        ),
        hints=(
            "keep only the bits below i: mask & ((1 << i) - 1).",
            "(mask & ((1 << i) - 1)).bit_count()",
        ),
    ),
    "06.step_us": Exercise(
        "Write step_us(load, extract, multiply, buffers): the microseconds from one tile to the next when "
        "thousands follow one another. With one buffer all three wait for each other; with two the next load "
        "runs while this tile is extracted and multiplied.",
        step_us,
        cases=((3.0, 1.0, 0.5, 1), (3.0, 1.0, 0.5, 2), (2.0, 2.5, 0.5, 2)),
        slips=(
            (
                lambda load, extract, multiply, buffers: load + extract + multiply,
                "that is one buffer; with two, the load hides behind the work, or the work behind the load.",
            ),
            (
                lambda load, extract, multiply, buffers: (
                    max(load, extract, multiply) if buffers == 2 else load + extract + multiply
                ),
                "extracting and multiplying one tile still come one after the other.",
            ),
            (
                lambda load, extract, multiply, buffers: (load + extract + multiply) / buffers,
                "two buffers do not halve it: the longer of the two sides stays.",
            ),
        ),
        hints=("two sides work at once: the load, and extract + multiply.", "max(load, extract + multiply)"),
    ),
    "06.pays_from": Exercise(
        "The compact form takes 25 bytes for eight weights that stay. From which share of zeros on does it "
        "have fewer bytes than dense weights of 16 bits?",
        1 - 2 / BYTES,
        slips=(
            (2 / BYTES, "that is the share that may stay; zeros are the rest."),
            (0.5, "that is Flash-LLM's form, with 4 bytes for each."),
            (100 * (1 - 2 / BYTES), "give a share between 0 and 1."),
        ),
        hints=("it takes 25 / 8 bytes for each: density x 25 / 8 = 2.", "1 - 2 * 8 / 25"),
        rtol=1e-3,
    ),
}
