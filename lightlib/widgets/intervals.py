"""Means with their intervals, over the few values that each is of. Reads as its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightlib.scores import mean, t_interval
from lightlib.widgets.plots import Picture
from lightlib.widgets.style import BLUE, ORANGE, WIDTH, new_figure, panels, styled


def intervals(values: Mapping[str, Sequence[float]], *, x: str, title: str = "") -> Picture:
    """A row for each name: its values, as of seeds, their mean and its 95 % interval by Student's t.

    x: what the axis shows, with its unit.

    >>> intervals({"soft": [1.1, 1.2, 1.3]}, x="nll (nats a token)")
    nll (nats a token): soft 1.2 (0.9516 to 1.448)
    """
    if not values:
        raise ValueError("intervals: there is nothing to draw; give {name: [values]}")
    found = {name: (mean(each), *t_interval(each)) for name, each in values.items()}
    with styled():
        fig = new_figure((WIDTH, 0.95 + 0.36 * len(found)))
        (ax,) = panels(fig, (1,), (0.25 + 0.09 * max(map(len, found)),), right=0.9, top=0.35)
        for row, (name, (middle, low, high)) in enumerate(found.items()):
            ax.plot([low, high], [row, row], color=BLUE, lw=5, alpha=0.35, solid_capstyle="butt")
            ax.plot(values[name], [row] * len(values[name]), "D", color=ORANGE, ms=5)
            ax.plot(middle, row, "o", color=BLUE, ms=8)
            ax.annotate(f"{middle:.4g}", (1.02, row), xycoords=("axes fraction", "data"), va="center")
        ax.set_yticks(range(len(found)), list(found))
        ax.invert_yaxis()
        ax.margins(y=0.1)
        ax.set(xlabel=x, title=title)
        ax.grid(True, axis="x")
    said = "; ".join(f"{name} {m:.4g} ({low:.4g} to {high:.4g})" for name, (m, low, high) in found.items())
    return Picture(fig, f"{title or x}: {said}")
