"""Tensor diagrams: a circle is a tensor, a line is a dimension; what is stored follows from them.

A line that two circles share is summed over, an open line is a dimension of the whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import ipywidgets as W
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightlib.lowrank.tensor_train import limits_of
from lightlib.report import tidy
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.logarithm import exponents, powers_of_ten
from lightlib.widgets.style import BLACK, BLUE, GREY, ORANGE, PALE, VERMILION, panels
from lightlib.widgets.weight_only_explorer import offer

CP, TUCKER, TRAIN, MATRIX = "CP", "Tucker", "tensor train", "TT-matrix"
KINDS = (TUCKER, CP, TRAIN, MATRIX)
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# (the modes of the rows, the modes of the columns); a tensor that is no matrix has only the first
SHAPES = {
    "12 x 12 x 12": ((12, 12, 12), ()),
    "8 x 9 x 8 x 24": ((8, 9, 8, 24), ()),
    "576 x 576 = (24 · 24) x (24 · 24)": ((24, 24), (24, 24)),
    "576 x 576 = (8 · 9 · 8) x (8 · 9 · 8)": ((8, 9, 8), (8, 9, 8)),
    "1536 x 576 = (12 · 8 · 16) x (8 · 9 · 8)": ((12, 8, 16), (8, 9, 8)),
    "49152 x 576 = (32 · 48 · 32) x (8 · 9 · 8)": ((32, 48, 32), (8, 9, 8)),
}
MATRICES = {name: shape for name, shape in SHAPES.items() if shape[1]}

Modes = tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """Tensors by name, each with the names of its lines; the size of every line. `dots` store nothing."""

    tensors: dict[str, tuple[str, ...]]
    sizes: dict[str, int]
    dots: tuple[str, ...] = ()

    def numbers(self, name: str) -> int:
        """How many numbers a tensor holds: the product of its lines."""
        return 0 if name in self.dots else math.prod(self.sizes[line] for line in self.tensors[name])

    @property
    def stored(self) -> int:
        return sum(map(self.numbers, self.tensors))


def network(kind: str, shape: tuple[Modes, Modes], rank: int) -> Network:
    """One of KINDS of a tensor with these modes, ranks no larger than they can be.

    Lines: o1, o2, ... of the rows, i1, i2, ... of the columns, r1, r2, ... or r between the tensors. Tucker's
    factors stay where a rank is full, and the weights of CP are in its factors, as `CPLinear` has them.
    """
    rows, columns = shape
    names = [*(f"o{k}" for k in range(1, len(rows) + 1)), *(f"i{k}" for k in range(1, len(columns) + 1))]
    sizes = dict(zip(names, rows + columns, strict=True))
    if kind == TUCKER:
        ranks = {f"r{k}": min(rank, sizes[line]) for k, line in enumerate(names, 1)}
        factors = {f"U{k}": (line, f"r{k}") for k, line in enumerate(names, 1)}
        return Network({"G": tuple(ranks), **factors}, sizes | ranks)
    if kind == CP:
        factors = {f"U{k}": (line, "r") for k, line in enumerate(names, 1)}
        return Network({"": ("r",) * len(names), **factors}, sizes | {"r": rank}, dots=("",))
    legs = [(line,) for line in names]
    if kind == MATRIX:
        legs = [(f"o{k}", f"i{k}") for k in range(1, len(rows) + 1)]
    between = limits_of([math.prod(sizes[line] for line in leg) for leg in legs], rank)
    ranks = {f"r{k}": size for k, size in enumerate(between, 1)}
    left, right = [(), *((r,) for r in ranks)], [*((r,) for r in ranks), ()]
    cores = {f"G{k}": left[k - 1] + leg + right[k - 1] for k, leg in enumerate(legs, 1)}
    return Network(cores, sizes | ranks)


def largest_rank(kind: str, shape: tuple[Modes, Modes]) -> int:
    """The largest of RANKS at which the network stores fewer numbers than the tensor; 0 if none does."""
    full = math.prod(shape[0] + shape[1])
    return max((rank for rank in RANKS if network(kind, shape, rank).stored < full), default=0)


# the picture
def spots(kind: str, net: Network) -> dict[str, tuple[float, float]]:
    """Where each tensor's circle lies, in a picture 1 wide and 1 high."""
    high = {TUCKER: 0.4, CP: 0.4, TRAIN: 0.58, MATRIX: 0.5}[kind]
    row = [name for name in net.tensors if name not in ("G", *net.dots)]
    wide = 0.5 if len(row) == 1 else min(0.86, 0.3 * (len(row) - 1))
    across = 0.5 + wide * np.linspace(-0.5, 0.5, len(row))
    found = {name: (float(x), high) for name, x in zip(row, across, strict=True)}
    return found | {name: (0.5, 0.82) for name in net.tensors if name not in row}


def draw(fig: Figure, result: dict) -> None:
    """The diagram; what is stored over the rank, and where the whole tensor takes as much."""
    left, right = panels(fig, (2.1, 1), (0.1, 0.95), right=0.25, top=0.42, bottom=0.6)
    diagram(left, result["kind"][0], result["network"])
    ranks, stored = result["curve"]
    full, here = result["numbers_of_the_tensor"], (result["rank"][0], result["numbers_stored"])
    right.axhline(exponents(full), color=GREY, ls=":", lw=1.5)
    right.plot(exponents(ranks), exponents(stored), "o-", color=BLUE, ms=3, lw=1.5)
    right.plot(*exponents(here), "D", color=VERMILION, ms=9, mec="white", clip_on=False)
    magnitudes(right, min(stored) / 2, 4 * max(full, *stored))
    powers_of_ten(right.xaxis, 0.85, 1.2 * RANKS[-1])
    right.set(xlabel="rank", ylabel="numbers stored")
    right.set_title("dotted: the whole tensor", fontsize=10)


def magnitudes(ax: Axes, low: float, high: float) -> None:
    """A vertical axis of exponents between two numbers; its ticks read 100, 1 k, 10 k, 1 M."""
    powers_of_ten(ax.yaxis, low, high)
    whole = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    ax.set_yticks(whole, [f"{10 ** (e % 3)} {' kMGTP'[e // 3]}".strip() for e in whole])


def diagram(ax: Axes, kind: str, net: Network) -> None:
    """Lines first, as wide as their dimension is large, then circles, then every line's size on it."""
    at = spots(kind, net)
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.axis("off")
    for one, other, line in links(kind, net):
        segment(ax, at[one], at[other], net.sizes[line])
    for name, (x, y) in at.items():
        legs = [line for line in net.tensors[name] if line[0] in "oi"]
        for line in legs:
            up = kind == MATRIX and line[0] == "o"
            segment(ax, (x, y), (x, y + (0.36 if up else -0.34)), net.sizes[line], 0.66)
    size = 27 if len(at) < 6 else 24
    for name, (x, y) in at.items():
        dot = name in net.dots
        color = BLACK if dot else ORANGE if name == "G" else PALE
        ax.plot(x, y, "o", ms=9 if dot else size, color=color, mec=BLACK, mew=1.2, zorder=3)
        ax.text(x, y, name, ha="center", va="center", fontsize=10, zorder=4)
    title = "width of a line: its dimension, in powers of 2"
    ax.set_title(f"{title}; dot: a diagonal of ones" if net.dots else title, fontsize=10, x=0.02)
    if kind == MATRIX:
        ax.text(0.0, 0.8, "rows", fontsize=10, color=GREY, va="center")
        ax.text(0.0, 0.22, "columns", fontsize=10, color=GREY, va="center")


def links(kind: str, net: Network) -> list[tuple[str, str, str]]:
    """(tensor, tensor, line) of every line that two of them share."""
    names = list(net.tensors)
    if kind in (TUCKER, CP):
        return [(names[0], name, net.tensors[name][1]) for name in names[1:]]
    return [(one, other, f"r{k}") for k, (one, other) in enumerate(pairwise(names), 1)]


def segment(ax: Axes, start: tuple, end: tuple, size: int, where: float = 0.5) -> None:
    """A line with its size written on it, `where` of the way."""
    (x, y), (a, b) = start, end
    ax.plot([x, a], [y, b], color=BLUE, lw=0.8 + 0.9 * math.log2(size), solid_capstyle="butt", zorder=1)
    place = x + where * (a - x), y + where * (b - y)
    ax.text(
        *place, f"{size:,}", ha="center", va="center", fontsize=10, zorder=5,
        bbox={"boxstyle": "square,pad=0.12", "fc": "white", "ec": "none"},
    )  # fmt: skip


def judge(kind: str, net: Network, full: int, least: int) -> str:
    """What every tensor holds, the sum against the whole, and up to which rank that saves."""
    parts = [net.numbers(name) for name in net.tensors if name not in net.dots]
    ratio = full / net.stored
    verdict = f"{tidy(ratio)} times fewer" if ratio > 1 else "which saves nothing"
    limit = f"of the ranks on offer it saves up to {least}" if least else "no rank on offer saves anything"
    return (
        f"{kind} stores {' + '.join(f'{n:,}' for n in parts)} = {net.stored:,} numbers instead of {full:,}, "
        f"{verdict}; {limit}."
    )


def tensor_diagram(**options) -> Explorer:
    """Draw Tucker, CP, tensor train and TT-matrix of tensors and matrices, over the rank.

    >>> tensor_diagram().set(kind="CP", shape="12 x 12 x 12", rank=4).result["numbers_stored"]
    144
    """

    def on_offer(controls) -> None:
        offer(controls["shape"], list(MATRICES if controls["kind"].value == MATRIX else SHAPES))

    def compute(kind, shape, rank):
        modes = SHAPES[shape]
        net, full = network(kind, modes, rank), math.prod(modes[0] + modes[1])
        largest = max((size for line, size in net.sizes.items() if line[0] == "r"), default=1)
        return {
            "numbers_stored": net.stored,
            "numbers_of_the_tensor": full,
            "times_fewer": full / net.stored,
            "largest_rank_in_use": largest,
            "says": judge(kind, net, full, largest_rank(kind, modes)),
            "network": net,
            "kind": [kind],
            "rank": [rank],
            "curve": (RANKS, [network(kind, modes, r).stored for r in RANKS]),
        }

    return Explorer(
        compute, draw, name="tensor_diagram", size=(8.6, 3.5), settle=on_offer, **options,
        kind=W.Dropdown(options=KINDS, description="decomposition"),
        shape=W.Dropdown(options=list(SHAPES), description="of"),
        rank=W.SelectionSlider(options=RANKS, value=4, description="rank, at most"),
    )  # fmt: skip
