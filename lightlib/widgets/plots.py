"""Pictures that lessons use: bars, a Pareto front, a roofline. Each reads as its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from lightlib.widgets.numbers import scaled
from lightlib.widgets.style import (
    BLACK,
    BLUE,
    GREY,
    PALE,
    PALETTE,
    VERMILION,
    WIDTH,
    new_figure,
    panels,
    png,
    small_png,
    styled,
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class Picture:
    """A figure for a notebook's last line: a notebook shows a bare Figure as text unless pyplot made it."""

    figure: Figure
    text: str

    def _repr_png_(self) -> bytes:
        return small_png(png(self.figure))

    def __repr__(self) -> str:
        return self.text


def bars(values: Mapping[str, float | Mapping[str, float]], *, unit: str = "", title: str = "") -> Picture:
    """Horizontal bars with their numbers: {label: number}, or {label: {series: number}} for groups."""
    if not values:
        raise ValueError("bars: there is nothing to draw; give {label: number}")
    groups = {name: v if isinstance(v, Mapping) else {"": v} for name, v in values.items()}
    series = list(dict.fromkeys(s for group in groups.values() for s in group))
    thick = 0.8 / len(series)
    with styled():
        above = 0.25 * (series != [""])  # room for the legend between title and bars
        fig = new_figure((WIDTH, 0.95 + above + 0.36 * max(1, 0.7 * len(series)) * len(groups)))
        (ax,) = panels(fig, (1,), (0.25 + 0.09 * max(map(len, groups)),), right=0.9, top=0.35 + above)
        for i, one in enumerate(series):
            places = [row for row, group in enumerate(groups.values()) if one in group]
            numbers = [group[one] for group in groups.values() if one in group]
            y = np.array(places) + (i - (len(series) - 1) / 2) * thick
            drawn = ax.barh(y, numbers, thick * 0.92, color=PALETTE[i % len(PALETTE)], label=one or None)
            ax.bar_label(drawn, [f"{n:,.4g}" for n in numbers], padding=4)
        ax.set_yticks(range(len(groups)), list(groups))
        ax.invert_yaxis()
        ax.set(xlabel=unit)
        ax.set_title(title, pad=6 + 72 * above)
        if series != [""]:
            ax.legend(loc="lower right", ncols=len(series), bbox_to_anchor=(1, 1), borderaxespad=0)
    lines = [
        f"{name} {', '.join(f'{s} {n:,.4g}'.strip() for s, n in group.items())}"
        for name, group in groups.items()
    ]
    return Picture(fig, f"{title or 'bars'}{f' [{unit}]' if unit else ''}: {'; '.join(lines)}")


def pareto(
    points: Iterable[tuple[str, float, float]], *, y: str = "perplexity", title: str = "", log: bool = False
) -> Picture:
    """Bytes against `y`, less being better in both: (label, bytes, y). A line joins those that none beats."""
    points = list(points)
    if not points:
        raise ValueError("pareto: there is nothing to draw; give (label, bytes, y) for each model")
    best = frontier(points)
    with styled():
        fig = new_figure((WIDTH, 3.8))
        (ax,) = panels(fig, (1,), (0.85,), right=0.5)
        step = np.array([(size, height) for _, size, height in best])
        ax.step(
            step[:, 0] / 1e6, step[:, 1], where="post", color=BLUE, lw=1.5, label="not beaten by any other"
        )
        for one in points:
            ax.plot(one[1] / 1e6, one[2], "o", ms=8, color=BLUE if one in best else GREY)
        ax.set(xlabel="size (MB)", ylabel=y, title=title, yscale="log" if log else "linear")
        ax.margins(0.12, 0.15)
        if log:
            plain_logarithm(ax.yaxis)
        ax.grid(True)
        ax.legend(loc="upper right")
        place_labels(ax, [(name, size / 1e6, height) for name, size, height in points])
    listed = [f"{p[0]} {scaled(p[1], 'B')} {p[2]:,.4g}{'' if p in best else ' (beaten)'}" for p in points]
    return Picture(fig, f"{title or 'size against ' + y}: {'; '.join(listed)}")


def frontier(points: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """The points that no other beats in both numbers, by size.

    >>> frontier([("a", 1, 5), ("b", 2, 6), ("c", 3, 4)])
    [('a', 1, 5), ('c', 3, 4)]
    """
    best: list[tuple[str, float, float]] = []
    for point in sorted(points, key=lambda p: (p[1], p[2])):
        if not best or point[2] < best[-1][2]:
            best.append(point)
    return best


def roofline(
    bandwidth: float, rate: float, points: Iterable[tuple[str, float, float | None]] = (), *, title: str = ""
) -> Picture:
    """What a device allows: `bandwidth` in bytes/s, `rate` in FLOP/s, both axes logarithmic.

    points: (label, FLOP a byte, FLOP/s reached); None in the last place puts the point on the roof.
    """
    if min(bandwidth, rate) <= 0:
        raise ValueError(f"roofline: bandwidth {bandwidth} and rate {rate} must be positive")
    points = [(name, x, min(rate, bandwidth * x) if y is None else y) for name, x, y in points]
    ridge = rate / bandwidth
    xs = [ridge, *(x for _, x, _ in points)]
    low, high = min(xs) / 8, max(xs) * 12
    with styled():
        fig = new_figure((WIDTH, 3.8))
        (ax,) = panels(fig, (1,), (0.95,), right=0.3)
        ax.plot([low, ridge, high], [bandwidth * low / 1e9, rate / 1e9, rate / 1e9], color=BLACK)
        ax.plot([ridge, ridge], [bandwidth * low / 1e9, rate / 1e9], ":", color=GREY, lw=1.5)
        ax.axvspan(low, ridge, color=PALE, alpha=0.35, lw=0)
        for name, x, y in points:
            ax.plot(x, y / 1e9, "o", ms=9, color=VERMILION if x < ridge else BLUE, label=name)
        ax.set(xscale="log", yscale="log", xlim=(low, high), title=title)
        ax.set(xlabel="arithmetic intensity (FLOP a byte)", ylabel="speed (GFLOP/s)")
        ax.set_ylim(bandwidth * low / 1e9, rate / 1e9 * 8)
        plain_logarithm(ax.xaxis)
        plain_logarithm(ax.yaxis)
        ax.text(low * 1.15, rate / 1e9 * 3.7, f"bound by memory\n{scaled(bandwidth, 'B/s')}", va="center")
        ax.text(
            high / 1.1,
            rate / 1e9 * 3.7,
            f"bound by compute\n{scaled(rate, 'FLOP/s')}",
            va="center",
            ha="right",
        )
        ax.grid(True)
        place_labels(ax, [(name, x, y / 1e9) for name, x, y in points])
    listed = [f"{name} {x:,.4g} FLOP/B {scaled(y, 'FLOP/s')}" for name, x, y in points]
    limits = f"{scaled(bandwidth, 'B/s')}, {scaled(rate, 'FLOP/s')}, ridge {ridge:,.4g} FLOP/B"
    return Picture(fig, "; ".join([f"{title or 'roofline'}: {limits}", *listed]))


def plain_logarithm(axis: Axis) -> None:
    """A logarithmic axis that reads 1, 2, 5, 10, 20 ..., or only the powers where there are many."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter(NullFormatter())


def place_labels(ax: Axes, points: list[tuple[str, float, float]]) -> None:
    """Write each name beside its point, above and right if it then covers no other name or point."""
    box = ax.get_window_extent()
    spots = [ax.transData.transform((x, y)) for _, x, y in points]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    for (name, x, y), (px, py) in zip(points, spots, strict=True):
        wide, high = 8.2 * len(name), 16

        def corner(side, px=px, py=py, wide=wide, high=high):
            right, up = side
            return px + 7 if right else px - 7 - wide, py + 5 if up else py - 5 - high

        def cost(side, wide=wide, high=high, corner=corner):
            left, low = corner(side)
            out = left < box.x0 or left + wide > box.x1 + 25 or low < box.y0 or low + high > box.y1
            hits = sum(left < r and l < left + wide and low < t and b < low + high for l, b, r, t in taken)
            return hits + 2 * out

        right, up = side = min(((1, 1), (0, 0), (1, 0), (0, 1)), key=cost)
        left, low = corner(side)
        taken.append((left, low, left + wide, low + high))
        ax.annotate(
            name, (x, y), (5 if right else -5, 4 if up else -4), textcoords="offset points", fontsize=10,
            ha="left" if right else "right", va="bottom" if up else "top",
        )  # fmt: skip
