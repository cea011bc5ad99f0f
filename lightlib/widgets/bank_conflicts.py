"""Bank conflicts: one store of a warp, 32 words on their way to 32 banks, and how many turns it takes."""

from __future__ import annotations

import functools

import ipywidgets as W
import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from lightlib.kernels.sparse_matmul import csl
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.style import BLACK, BLUE, GREEN, GREY, ORANGE, PALE, VERMILION, bar_rows, boxes, panels

ORDERS = {"row by row": False, "by banks": True}
COLORS = {"row by row": VERMILION, "by banks": GREEN}
TURNS = (BLUE, ORANGE, VERMILION)  # of a bank's first word, its second, and all that come later
HIGH = 7.0  # where the lanes stand: above the highest stack of words


@functools.lru_cache(maxsize=256)
def packed(sparsity: int, reorder: bool) -> csl.CSL:
    """A random tile of 128 x 64 with `sparsity` percent zeros, the same on every run."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(csl.ROWS, csl.COLUMNS, generator=generator).bfloat16()
    kept = torch.rand(csl.ROWS, csl.COLUMNS, generator=generator) >= sparsity / 100
    return csl.encode(weight, kept, reorder=reorder)


def stores(tile: csl.CSL) -> list[np.ndarray]:
    """The 32-bit cells of shared memory that each store of a warp writes to, one a lane."""
    cells = (tile.words.long() >> 17) // 2  # (words)
    blocks = (block.view(-1, csl.VECTOR).T for block in cells.split(csl.BLOCK))
    return [word.numpy() for block in blocks for word in block]


def words_by_bank(cells: np.ndarray) -> np.ndarray:
    """The different cells in each of 32 banks (32): the store takes as many turns as the fullest has."""
    return np.bincount(np.unique(cells) % csl.BANKS, minlength=csl.BANKS)


@functools.lru_cache(maxsize=256)
def average(sparsity: int, reorder: bool) -> float:
    """The turns that a store takes on average over the tile."""
    return csl.conflicts(packed(sparsity, reorder))


def turns_of(cells: np.ndarray) -> np.ndarray:
    """In which turn each lane's word is written, from 0 on; two halves of one cell go together."""
    different, which = np.unique(cells, return_inverse=True)
    bank = different % csl.BANKS
    earlier = [int((bank[:i] == one).sum()) for i, one in enumerate(bank)]
    return np.array(earlier)[which]


def draw(fig: Figure, result: dict) -> None:
    """Lanes above, banks below with the words that each one must take; the average of both orders."""
    left, right = panels(fig, (2.6, 1), (0.65, 1.0), right=0.15, top=0.62, bottom=0.58)
    cells, turn = result["cells"], result["turn"]
    lane, bank = np.arange(len(cells)), cells % csl.BANKS
    colors = [TURNS[min(t, 2)] for t in turn]
    lines = [[(i, HIGH - 0.35), (b, t + 0.9)] for i, b, t in zip(lane, bank, turn, strict=True)]
    left.add_collection(LineCollection(lines, colors=colors, lw=1.2))
    boxes(left, [(i - 0.42, i + 0.42, HIGH - 0.35, HIGH + 0.35) for i in lane], colors)
    idle = [(i - 0.42, i + 0.42, HIGH - 0.35, HIGH + 0.35) for i in range(len(cells), csl.LANES)]
    empty = [(b - 0.42, b + 0.42, 0, 0.9) for b in np.flatnonzero(result["banks"] == 0)]
    boxes(left, idle + empty, PALE)
    boxes(left, [(b - 0.42, b + 0.42, t, t + 0.9) for b, t in zip(bank, turn, strict=True)], colors)
    left.axhline(result["turns"] - 0.02, color=BLACK, ls=":", lw=1.5)
    left.set(xlim=(-0.6, 31.6), ylim=(0, HIGH + 0.4), xlabel="bank of shared memory (above: lane)")
    left.set(xticks=range(0, 32, 4), yticks=range(0, 7), ylabel="words that a bank takes")
    took = "1 turn" if result["turns"] == 1 else f"{result['turns']} turns"
    left.set_title(
        f"store {result['store'][0]} of {result['stores']}: {took}\n"
        "blue: first turn, orange: second, red: later; grey: nothing to do",
        fontsize=10,
    )

    rows = {"this store": result["turns"], **result["averages"], "at best": 1}
    chosen = list(rows).index(result["order"][0])
    texts = [f"{value:.3g}" for value in rows.values()]
    bar_rows(right, list(rows), list(rows.values()), texts, [BLACK, *COLORS.values(), GREY], bold=chosen)
    right.set_title("turns of a store;\norders: mean of the tile", fontsize=10)


def keep_within(controls) -> None:
    """Offer the stores that the tile has at this sparsity."""
    tile = packed(controls["sparsity"].value, True)
    controls["store"].max = len(stores(tile))


def bank_conflicts(**options) -> Explorer:
    """Explore how a warp's stores meet the banks: zeros, the order of the words, and which store to look at.

    A lane loads four words at once, and all lanes store their first, then their second ... A bank takes one
    cell of 32 bits a turn.
    """

    def compute(sparsity, order, store):
        tile = packed(sparsity, ORDERS[order])
        groups = stores(tile)
        cells = groups[store - 1]
        banks = words_by_bank(cells)
        averages = {name: average(sparsity, reorder) for name, reorder in ORDERS.items()}
        fullest, turns = int(banks.argmax()), int(banks.max())
        says = f"Bank {fullest} holds {turns} of these words, so the store takes {turns} turns, not 1."
        if turns == 1:
            says = "No two words share a bank, so all are stored in one turn."
        return {
            "turns": turns,
            "words": len(cells),
            "banks_hit": int((banks > 0).sum()),
            "row_by_row_turns": averages["row by row"],
            "by_banks_turns": averages["by banks"],
            "stores": len(groups),
            "says": says,
            "averages": averages,
            "cells": cells,
            "banks": banks,
            "turn": turns_of(cells),
            "store": [store],
            "order": [order],
        }

    return Explorer(
        compute, draw, name="bank_conflicts", size=(8.6, 3.5), settle=keep_within, **options,
        sparsity=W.IntSlider(80, 30, 95, 5, description="zeros (%)"),
        order=W.Dropdown(options=list(ORDERS), value="row by row"),
        store=W.IntSlider(1, 1, len(stores(packed(80, True)))),
    )  # fmt: skip
