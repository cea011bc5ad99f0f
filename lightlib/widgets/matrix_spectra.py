"""Matrix spectra: how few directions hold a weight's energy, and its output's, and where two factors pay."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ipywidgets as W
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightlib.lowrank.ranks import rank_for_energy
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.spectrum_explorer import Spectrum
from lightlib.widgets.style import BLUE, GREY, PALE, VERMILION, panels
from lightlib.widgets.svd_picture import break_even
from lightlib.widgets.weight_only_explorer import offer

GOALS = (80, 90, 95, 98, 99, 99.9)  # percent of the energy to keep
ALONE = "none"  # the block of a matrix outside all blocks
LOOKS = {"W": (BLUE, "o"), "W X": (VERMILION, "s")}
POINTS = 200  # of a curve

Energy = Tensor | Sequence[float]


def place(name: str) -> tuple[str, int | str]:
    """(role, block) of a layer by its full name.

    >>> place("model.layers.3.self_attn.q_proj")
    ('self_attn.q_proj', 3)
    >>> place("model.embed_tokens")
    ('embed_tokens', 'none')
    """
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (found[2], int(found[1])) if found else (name.split(".")[-1], ALONE)


@dataclass(frozen=True)
class Matrix:
    """One weight (out, in): the shares of the energy along its directions, and along those of its output."""

    shape: tuple[int, int]
    spectra: dict[str, Spectrum]  # by the names in LOOKS

    @property
    def even(self) -> float:
        """The rank from which on two factors take as many numbers as the matrix."""
        return break_even(*self.shape)

    def held(self, kind: str, rank: float) -> float:
        """The share of the energy in the first `rank` directions, rounded down to a whole number of them."""
        return float(self.spectra[kind].held[math.floor(rank)])

    def needed(self, kind: str, goal: float) -> int:
        """The least rank that keeps `goal` percent of the energy."""
        return rank_for_energy(self.spectra[kind].shares.sqrt(), goal / 100)


def matrix(name: str, energies: tuple[Energy, Energy], shape: tuple[int, int]) -> Matrix:
    """Of the energy along each direction of W and of W X. Raises ValueError for what no such matrix has."""
    spectra = {}
    for kind, given in zip(LOOKS, energies, strict=True):
        given = torch.as_tensor(given).detach().double().cpu()
        if given.ndim != 1 or len(given) != min(shape) or not given.any():
            raise ValueError(
                f"{name}, {kind}: a matrix {shape[0]} x {shape[1]} has energy ({min(shape)},), not all of it "
                f"zero, not {tuple(given.shape)}; output_directions(weight, gram)[1] gives it"
            )
        spectra[kind] = Spectrum(f"{name}, {kind}", given / given.sum())
    return Matrix(tuple(shape), spectra)


def draw(fig: Figure, result: dict) -> None:
    """Energy over rank for W and W X; in every block, the rank that the goal takes."""
    left, right = panels(fig, (1.15, 1), (0.85, 0.9), right=0.25, top=0.62, bottom=0.6)
    here, goal, role, block = result["matrix"], result["goal"][0], *result["place"]
    full, even = min(here.shape), 100 * here.even / min(here.shape)
    ranks = np.unique(np.linspace(0, full, POINTS).round().astype(int))
    left.axvspan(even, 100, color=PALE, alpha=0.5, lw=0)
    left.axhline(goal, color=GREY, ls=":", lw=1.5)
    for kind, (color, mark) in LOOKS.items():
        left.plot(100 * ranks / full, 100 * here.spectra[kind].held[ranks], color=color)
        needed = here.needed(kind, goal)
        left.plot(100 * needed / full, 100 * here.held(kind, needed), mark, color=color, ms=8, mec="white")
    left.set(xlim=(0, 100), ylim=(0, 103), xlabel=f"rank (% of {full:,})", ylabel="energy kept (%)")
    where = "" if block == ALONE else f", block {block}"
    left.set_title(
        f"{role}{where}: {here.shape[0]:,} x {here.shape[1]:,}\ngrey: two factors take more", fontsize=10
    )
    blocks(right, result, even)


def blocks(ax: Axes, result: dict, even: float) -> None:
    """The rank that the goal takes, in percent of the full one, block by block; grey: nothing is saved."""
    mates, chosen, goal = result["mates"], result["place"][1], result["goal"][0]
    order = range(len(mates))
    ax.axhspan(even, 200, color=PALE, alpha=0.5, lw=0)
    for kind, (color, mark) in LOOKS.items():
        share = [100 * one.needed(kind, goal) / min(one.shape) for one in mates.values()]
        ax.plot(order, share, mark, ls="-", lw=1, ms=3, color=color, label=f"of {kind}")
        at = list(mates).index(chosen)
        ax.plot(at, share[at], mark, color=color, ms=9, mec="white", clip_on=False)
    ticks = sorted({0, len(mates) // 2, len(mates) - 1})
    ax.set_xticks(ticks, [str(list(mates)[i]) for i in ticks])
    ax.set(xlim=(-0.6, len(mates) - 0.4), ylim=(0, 103), xlabel="block", ylabel="rank needed (%)")
    ax.set_title(f"rank that keeps {goal:g} % of the energy", fontsize=10, pad=20)
    ax.legend(loc="lower right", ncols=2, bbox_to_anchor=(1, 0.99), borderaxespad=0)


def judge(here: Matrix, needed: Mapping[str, int], goal: float) -> str:
    """What a rank that saves keeps of both, and whether the goal is among such ranks."""
    pays = {kind: rank < here.even for kind, rank in needed.items()}
    verdict = (
        "both are below it"
        if all(pays.values())
        else "neither is below it"
        if not any(pays.values())
        else f"only that of {'W X' if pays['W X'] else 'W'} is below it"
    )
    return (
        f"Two factors take fewer numbers below rank {here.even:,.4g}; there W keeps at most "
        f"{100 * here.held('W', here.even):.3g} % of its energy and W X "
        f"{100 * here.held('W X', here.even):.3g} %. "
        f"{goal:g} % take rank {needed['W']:,} of W and {needed['W X']:,} of W X: {verdict}."
    )


def matrix_spectra(
    energies: Mapping[str, tuple[Energy, Energy]], shapes: Mapping[str, tuple[int, int]], **options
) -> Explorer:
    """Explore {layer's name: (energy of W, energy of W X)}, each (min(out, in),) and falling.

    `output_directions(weight)[1]` and `output_directions(weight, gram)[1]` give them. shapes: {layer's name:
    (out, in)}. Raises ValueError where energies and shapes do not belong together.
    """
    if not energies or set(energies) - set(shapes):
        raise ValueError(
            "matrix_spectra: give {name: (energy of W, energy of W X)} and a shape for each name"
        )
    found: dict[str, dict[int | str, Matrix]] = {}
    for name, pair in energies.items():
        role, block = place(name)
        found.setdefault(role, {})[block] = matrix(name, pair, shapes[name])

    def on_offer(controls) -> None:
        offer(controls["block"], list(found[controls["role"].value]))

    def compute(role, block, goal):
        here = found[role][block]
        needed = {kind: here.needed(kind, goal) for kind in LOOKS}
        return {
            "breaks_even_at_rank": here.even,
            "weight_keeps_there_percent": 100 * here.held("W", here.even),
            "output_keeps_there_percent": 100 * here.held("W X", here.even),
            "rank_for_the_weight": needed["W"],
            "rank_for_the_output": needed["W X"],
            "says": judge(here, needed, goal),
            "matrix": here,
            "mates": found[role],
            "place": (role, block),
            "goal": [goal],
        }

    first = next(iter(found))
    listed = list(found[first])
    return Explorer(
        compute, draw, name="matrix_spectra", size=(8.6, 3.6), settle=on_offer, **options,
        role=W.Dropdown(options=list(found), description="matrix"),
        block=W.Dropdown(options=listed, value=listed[len(listed) // 2]),
        goal=W.SelectionSlider(options=[(f"{g:g}", g) for g in GOALS], value=95, description="energy (%)"),
    )  # fmt: skip
