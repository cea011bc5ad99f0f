"""Spectrum explorer: how much of the stream lies along its principal directions, place by place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import ipywidgets as W
import numpy as np
import torch
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from lightlib.slicing.slicegpt import kept_width
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.style import BLACK, BLUE, GREY, PALE, VERMILION, panels

VIEWS = {"held": "held", "not held, logarithmic": "lost"}
GOALS = {0.99: "o", 0.999: "s"}  # shares whose directions are counted, and their marks
LEAST = 1e-8  # what float32 leaves of a stream is rounding from here on
DRAWN = 200  # points of a pale curve


class Spectrum:
    """The falling shares (d,) of |X|^2 along the principal directions of one place."""

    def __init__(self, name: str, shares: Tensor | Sequence[float]):
        self.shares = torch.as_tensor(shares).detach().double().cpu()
        given = self.shares
        if given.ndim != 1 or not len(given) or not torch.isfinite(given).all() or given.min() < 0:
            raise ValueError(f"{name}: give the shares of its directions (d,), none of them negative")
        if abs(given.sum().item() - 1) > 1e-3 or (given.diff() > 1e-9).any():
            raise ValueError(
                f"{name}: shares must fall and sum to 1; principal_directions(gram)[1] gives them"
            )
        self.shares = given = given / given.sum()
        tails = given.flip(0).cumsum(0).flip(0)
        # (d + 1), by the number of directions kept
        self.lost = np.append(np.where(tails.numpy() < LEAST, 0.0, tails.numpy()), 0.0)
        self.held = 1 - self.lost
        self.needed = [kept_width(given, 0.0, 1, goal) for goal in GOALS]

    def curve(self, quantity: str, low: float, most: int | None = None) -> np.ndarray:
        """(points, 2): directions kept, and where what they hold, or lose, is drawn."""
        d = len(self.shares)
        counts = (
            np.arange(1, d + 1) if most is None else np.unique(np.linspace(1, d, most).round().astype(int))
        )
        return np.stack([counts, height(getattr(self, quantity)[counts], quantity, low)], 1)


def height(share, quantity: str, low: float):
    """Where a share is drawn: in percent; of what is lost the exponent, no less than `low`'s."""
    return 100 * share if quantity == "held" else np.log10(100 * np.maximum(share, low))


def exponent_ticks(axis: Axis, low: float, high: float) -> None:
    """An axis of exponents of percents between the shares `low` and `high`, a tick at each power of ten."""
    a, b = np.log10([100 * low, 100 * high])
    axis.axes.set_ylim(a, b)
    whole = range(math.ceil(a - 1e-9), math.floor(b + 1e-9) + 1)
    axis.set_ticks(list(whole), [f"{10.0**e:g}" if e > -4 else f"1e{e}" for e in whole])


def shortened(name: str, most: int = 32) -> str:
    """A name that fits above a picture: of a long one the end.

    >>> shortened("model.layers.11.mlp", 12)
    '...yers.11.mlp'
    """
    return name if len(name) <= most else f"...{name[-most:].lstrip('. ')}"


def draw(fig: Figure, result: dict) -> None:
    """The chosen place among all others, over the directions kept; what every place loses at this cut."""
    left, right = panels(fig, (1.35, 1), (0.85, 0.95), right=0.2, top=0.62, bottom=0.6)
    chosen, losses, drawn = result["spectrum"], result["losses"], result["drawn"]
    quantity, low, widest, kept = drawn["quantity"], drawn["low"], drawn["widest"], result["directions_kept"]
    d = len(chosen.shares)
    left.add_collection(LineCollection(drawn["others"], colors=PALE, lw=1), autolim=False)
    left.axvspan(kept, widest, color=PALE, alpha=0.35, lw=0, zorder=0)
    left.axvline(kept, color=VERMILION, lw=1.5)
    left.plot(*chosen.curve(quantity, low).T, color=BLUE)
    for count, mark in zip(chosen.needed, GOALS.values(), strict=True):
        at = height(getattr(chosen, quantity)[count], quantity, low)
        left.plot(count, at, mark, color=BLACK, ms=7, mec="white", zorder=4, clip_on=False)
    left.set(xlim=(0, widest), xlabel="directions kept (right of the line: cut)")
    if quantity == "held":
        bottom = 100 * drawn["first"]
        left.set(
            ylim=(bottom - 0.02 * (100 - bottom), 100 + 0.04 * (100 - bottom)), ylabel="held of |X|^2 (%)"
        )
    else:
        left.set(ylabel="not held of |X|^2 (%)")
        exponent_ticks(left.yaxis, low, 1)
    goals = ", ".join(
        f"{'circle' if mark == 'o' else 'square'}: {100 * goal:g} % in {count:,}"
        for (goal, mark), count in zip(GOALS.items(), chosen.needed, strict=True)
    )
    left.set_title(f"{shortened(drawn['place'], 44)}\n{goals} of {d:,}", fontsize=10)

    index, worst = drawn["index"], drawn["worst"]
    heights = height(np.array(losses), "lost", low)
    order = np.arange(1, len(losses) + 1)
    right.plot(order, heights, color=GREY, lw=1, marker="o", ms=3)
    if losses[worst]:
        right.plot(order[worst], heights[worst], "D", color=VERMILION, ms=8, mec="white", clip_on=False)
    right.plot(order[index], heights[index], "o", color=BLUE, ms=8, mec="white", clip_on=False)
    exponent_ticks(right.yaxis, low, 1)
    right.set(
        xlim=(0.4, len(losses) + 0.6), xlabel="place, from first to last", ylabel="not held at this cut (%)"
    )
    right.set_xticks(sorted({1, (len(losses) + 1) // 2, len(losses)}))
    right.set_title(
        "blue: here, red: where most is lost,\n" + shortened(result["loses_most"], 34), fontsize=10
    )


def spectrum_explorer(shares: Mapping[str, Tensor | Sequence[float]], **options) -> Explorer:
    """Explore {place: shares of |X|^2 (d,) along its principal directions, falling}, places first to last.

    `principal_directions(gram)[1]` gives the shares of a place. Raises ValueError for what are none.
    """
    if not shares:
        raise ValueError("spectrum_explorer: give {place: falling shares (d,)}")
    found = {name: Spectrum(name, values) for name, values in shares.items()}
    names = list(found)
    widest = max(len(one.shares) for one in found.values())
    first = min(0.99, *(one.held[1] for one in found.values()))
    nearly_all = [one.lost[int(0.99 * len(one.shares))] for one in found.values()]
    low = min(max(min(filter(None, nearly_all), default=0) / 3, LEAST), 1e-2)
    pale = {q: {name: one.curve(q, low, DRAWN) for name, one in found.items()} for q in VIEWS.values()}

    def compute(place, view, cut):
        kept = {name: kept_width(one.shares, cut / 100, 1) for name, one in found.items()}
        losses = [float(one.lost[kept[name]]) for name, one in found.items()]
        here, worst = found[place], max(range(len(losses)), key=losses.__getitem__)
        index = names.index(place)
        d, lost = len(here.shares), losses[index]
        says = "Nothing is cut, so nothing is lost: Q only turns the stream."
        if cut:
            says = "No place of the stream takes the directions that are cut, so nothing is lost."
        if losses[worst]:
            says = (
                f"{place}: {kept[place]:,} of {d:,} directions stay; that loses {100 * lost:.3g} % of |X|^2; "
                f"{names[worst]} loses most, {100 * losses[worst]:.3g} %."
            )
        return {
            "directions_kept": kept[place],
            "held_percent": 100 * (1 - lost),
            "lost_percent": 100 * lost,
            "directions_for_99_percent": here.needed[0],
            "directions_for_99.9_percent": here.needed[1],
            "loses_most": names[worst] if losses[worst] else "none",
            "says": says,
            "spectrum": here,
            "losses": losses,
            "drawn": {
                "place": place, "quantity": VIEWS[view], "index": index, "worst": worst,
                "others": [curve for name, curve in pale[VIEWS[view]].items() if name != place],
                "low": low, "first": first, "widest": widest,
            },
        }  # fmt: skip

    return Explorer(
        compute, draw, name="spectrum_explorer", size=(8.6, 3.6), **options,
        place=W.Dropdown(options=names, value=names[len(names) // 2]),
        view=W.Dropdown(options=list(VIEWS)),
        cut=W.IntSlider(25, 0, 90, description="cut (%)"),
    )  # fmt: skip
