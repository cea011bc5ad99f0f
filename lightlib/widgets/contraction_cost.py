"""Contraction cost: y = W x with W in factors, and how much the order of the products decides."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import ipywidgets as W
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightlib.widgets.explorer import Explorer
from lightlib.widgets.logarithm import exponents, powers_of_ten
from lightlib.widgets.numbers import scaled
from lightlib.widgets.style import BLUE, GREEN, GREY, ORANGE, VERMILION, bar_rows, panels
from lightlib.widgets.tensor_diagram import (
    MATRICES,
    MATRIX,
    RANKS,
    TUCKER,
    Modes,
    Network,
    magnitudes,
    network,
)

LOW_RANK = "low rank"
STORAGES = (MATRIX, TUCKER, LOW_RANK)
LEFT, RIGHT, DENSE, WHOLE = "left to right", "right to left", "dense first", "W at hand"
COLORS = {LEFT: BLUE, RIGHT: GREEN, DENSE: ORANGE, WHOLE: GREY}
TOKENS = [2**k for k in range(10)]
X = "x"


class Cost(NamedTuple):
    """Multiplications and additions of all products; numbers in the largest result on the way to y."""

    flop: int
    largest: int


def factors(kind: str, shape: tuple[Modes, Modes], rank: int) -> Network:
    """W in factors; "low rank" is y = E (R x), its modes taken together."""
    if kind != LOW_RANK:
        return network(kind, shape, rank)
    n_out, n_in = map(math.prod, shape)
    sizes = {"o1": n_out, "i1": n_in, "r": min(rank, n_out, n_in)}
    return Network({"E": ("o1", "r"), "R": ("r", "i1")}, sizes)


def orders(kind: str, names: list[str], n_rows: int) -> dict[str, list[str]]:
    """{order: the tensors as they are multiplied, one after the other}; n_rows: modes of the rows."""
    if kind == LOW_RANK:  # from the left, the two factors meet before x does
        return {LEFT: [*names, X], RIGHT: [X, *names[::-1]], DENSE: [*names, X]}
    if kind == TUCKER:  # x must pass the factors of the columns, the core, the factors of the rows
        core, rows, columns = names[0], names[1 : n_rows + 1], names[n_rows + 1 :]
        return {
            LEFT: [X, *columns, core, *rows],
            RIGHT: [X, *columns[::-1], core, *rows[::-1]],
            DENSE: [*names, X],
        }
    return {LEFT: [X, *names], RIGHT: [X, *names[::-1]], DENSE: [*names, X]}


def contract(order: list[str], lines: dict[str, tuple[str, ...]], sizes: dict[str, int]) -> Cost:
    """The cost of multiplying tensors one after the other; a line that two share is summed over.

    A product takes 2 FLOPs for every combination of all its lines.
    """
    here, flop, results = set(lines[order[0]]), 0, []
    for name in order[1:]:
        other = set(lines[name])
        flop += 2 * math.prod(sizes[line] for line in here | other)
        here = here ^ other
        results.append(math.prod(sizes[line] for line in here))
    return Cost(flop, max(results[:-1], default=0))


def costs(kind: str, shape: tuple[Modes, Modes], rank: int, tokens: int) -> dict[str, Cost]:
    """{order: cost} of y = W x for so many tokens; "W at hand": nothing is in factors."""
    net, (rows, columns) = factors(kind, shape, rank), shape
    inputs = ("i1",) if kind == LOW_RANK else tuple(f"i{k}" for k in range(1, len(columns) + 1))
    lines, sizes = {**net.tensors, X: ("t", *inputs)}, {**net.sizes, "t": tokens}
    found = {
        name: contract(order, lines, sizes)
        for name, order in orders(kind, list(net.tensors), len(rows)).items()
    }
    return found | {WHOLE: Cost(2 * tokens * math.prod(rows + columns), 0)}


@functools.cache
def turning_points(kind: str, shape: tuple[Modes, Modes], tokens: int) -> tuple[int | None, int | None]:
    """The least ranks at which "dense first", and a product with W at hand, beat x meeting the factors."""
    found: list[int | None] = [None, None]
    for rank in range(1, min(map(math.prod, shape)) + 1):
        now = costs(kind, shape, rank, tokens)
        apart = min(now[order].flop for order in apart_orders(kind))
        for i, whole in enumerate((DENSE, WHOLE)):
            if found[i] is None and now[whole].flop <= apart:
                found[i] = rank
        if None not in found:
            break
    return found[0], found[1]


def apart_orders(kind: str) -> tuple[str, ...]:
    """The orders that never multiply W out."""
    return (RIGHT,) if kind == LOW_RANK else (LEFT, RIGHT)


def draw(fig: Figure, result: dict) -> None:
    """FLOPs and the largest result on the way, a bar an order; FLOPs over the rank."""
    left, right = panels(fig, (1.25, 1), (1.1, 1.0), right=0.2, top=0.42, bottom=0.6)
    x, y, across, up = left.get_position().bounds
    below = fig.add_axes((x, y - 0.13, across, 0.46 * up))
    left.set_position((x, y + 0.52 * up, across, 0.48 * up))
    now, cheapest = result["now"], result["cheapest"]
    for ax, part, unit, title in (
        (left, "flop", "FLOP", "FLOPs"),
        (below, "largest", "", "largest result on the way, numbers"),
    ):
        values = [getattr(cost, part) for cost in now.values()]
        texts = [scaled(value, unit).strip() if value else "none" for value in values]
        bar_rows(
            ax, list(now), values, texts, list(COLORS.values()), bold=list(now).index(cheapest), room=1.35
        )
        ax.set_title(title, fontsize=10)
    over_rank(right, result)


def over_rank(ax: Axes, result: dict) -> None:
    ranks, curves = result["curves"]
    for name, style in ((DENSE, "-"), (LEFT, "-"), (RIGHT, "--"), (WHOLE, ":")):
        ax.plot(exponents(ranks), exponents(curves[name]), style, color=COLORS[name], lw=1.8)
    rank, cheapest = result["rank"][0], result["cheapest"]
    ax.plot(exponents(rank), exponents(result["now"][cheapest].flop), "D", ms=9, color=VERMILION, mec="white")
    every = [flop for curve in curves.values() for flop in curve]
    magnitudes(ax, min(every) / 2, 2 * max(every))
    powers_of_ten(ax.xaxis, 0.9, 1.1 * ranks[-1])
    ax.set(xlabel="rank", ylabel="FLOPs")
    ax.set_title("colours as on the left; red: cheapest", fontsize=10)


def judge(now: dict[str, Cost], cheapest: str, kind: str, tokens: int, turns: tuple) -> str:
    """Which order is cheapest, its share of a dense product, and the ranks from which on dense wins."""
    many = "1 token" if tokens == 1 else f"{tokens} tokens"
    share = now[cheapest].flop / now[WHOLE].flop
    first, whole = (
        f"from rank {rank} on" if rank and rank > 1 else "at every rank" if rank else "at no rank"
        for rank in turns
    )
    same = " From the left, the factors meet first: that is dense first." * (kind == LOW_RANK)
    tied = cheapest != DENSE and now[LEFT].flop == now[RIGHT].flop
    what = f"{LEFT}, or {RIGHT}," if tied else cheapest
    return (
        f"For {many} {what} is the cheapest order, {share:.3g} times the "
        f"product with W at hand.{same} Multiplying W out first is cheapest {first}; a W at hand would be "
        f"cheaper {whole}."
    )


def contraction_cost(**options) -> Explorer:
    """Explore y = W x by storage of W, shape, rank, tokens: FLOPs and the largest result of three orders.

    >>> contraction_cost().set(kind="low rank", tokens=1, rank=64).result["cheapest"]
    'right to left'
    """

    def compute(kind, shape, rank, tokens):
        modes = MATRICES[shape]
        now = costs(kind, modes, rank, tokens)
        cheapest = min((LEFT, RIGHT, DENSE), key=lambda order: (now[order].flop, now[order].largest))
        turns = turning_points(kind, modes, tokens)
        at = [costs(kind, modes, r, tokens) for r in RANKS]
        return {
            "cheapest": cheapest,
            **{f"{order}_flop".replace(" ", "_"): cost.flop for order, cost in now.items()},
            "largest_on_the_way": now[cheapest].largest,
            "numbers_stored": factors(kind, modes, rank).stored,
            "says": judge(now, cheapest, kind, tokens, turns),
            "now": now,
            "rank": [rank],
            "turns": turns,
            "curves": (RANKS, {order: [cost[order].flop for cost in at] for order in now}),
        }

    return Explorer(
        compute, draw, name="contraction_cost", size=(8.6, 3.8), **options,
        kind=W.Dropdown(options=STORAGES, description="W stored as"),
        shape=W.Dropdown(options=list(MATRICES), value=list(MATRICES)[2], description="W"),
        rank=W.SelectionSlider(options=RANKS, value=8, description="rank, at most"),
        tokens=W.SelectionSlider(options=TOKENS, value=64),
    )  # fmt: skip
