"""Curves for a lesson: one or several lines over one axis. Reads as its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightlib.widgets.plots import Picture, plain_logarithm
from lightlib.widgets.style import PALETTE, WIDTH, new_figure, panels, styled

MARKS = "os^DvP"
MOST_SAID = 6  # points of a curve that are read out
MOST_INSIDE = 4  # lines whose names find room between the lines


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x: str,
    y: str,
    title: str = "",
    log: str = "",
    marks: bool = True,
) -> Picture:
    """`lines`: {name: [(x, y), ...]}; x, y: what the axes show, with units; log: "x", "y" or "xy".

    >>> curves({"3 bits": [(512, 30.1), (1024, 28.4)]}, x="tokens", y="perplexity")
    perplexity over tokens: 3 bits (512, 30.1) (1,024, 28.4)
    """
    if not any(len(points) for points in lines.values()):
        raise ValueError("curves: there is nothing to draw; give {name: [(x, y), ...]}")
    with styled():
        fig, beside = new_figure((WIDTH, 3.2)), len(lines) > MOST_INSIDE
        (ax,) = panels(fig, (1,), (0.85,), right=0.8 + 0.085 * max(map(len, lines)) if beside else 0.4)
        for i, (name, points) in enumerate(lines.items()):
            mark = MARKS[i % len(MARKS)] if marks else ""
            color = PALETTE[i % len(PALETTE)]
            ax.plot(*zip(*points, strict=True), marker=mark, ms=6, color=color, label=name)
        ax.set(xlabel=x, ylabel=y, title=title)
        for axis, scale in ((ax.xaxis, ax.set_xscale), (ax.yaxis, ax.set_yscale)):
            if axis.axis_name in log:
                scale("log")
                plain_logarithm(axis)
        ax.grid(True)
        if len(lines) > 1:
            ax.legend(**{"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if beside else {"loc": "best"})
    said = "; ".join(f"{name} {' '.join(read(points))}" for name, points in lines.items())
    return Picture(fig, f"{title or f'{y} over {x}'}: {said}")


def read(points: Sequence[tuple[float, float]]) -> list[str]:
    """Up to MOST_SAID points in words, from the first to the last."""
    places = range(len(points))
    if len(points) > MOST_SAID:
        places = [round(i * (len(points) - 1) / (MOST_SAID - 1)) for i in range(MOST_SAID)]
    return [f"({points[i][0]:,.4g}, {points[i][1]:,.4g})" for i in places]
