"""Low-rank explorer: perplexity over bytes of all that was measured, and which method is best at a budget."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import ipywidgets as W
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightlib.widgets.curves import MARKS
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.plots import plain_logarithm
from lightlib.widgets.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALE,
    PURPLE,
    SKY,
    VERMILION,
    bar_rows,
    panels,
)

COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY)
MOST = 20  # times the dense perplexity; what lies above is drawn there
STEPS = 60  # of the budget
TWO_LINES = 5  # bars at most whose names have a second line, the setting

Row = Mapping  # method, setting, stored_bytes, perplexity


def best_within(rows: Sequence[Row], budget: float) -> dict[str, Row]:
    """{method: its row of least perplexity that takes at most `budget` bytes}, the best method first."""
    best: dict[str, Row] = {}
    for row in sorted(rows, key=lambda r: (r["perplexity"], r["stored_bytes"])):
        if row["stored_bytes"] <= budget:
            best.setdefault(row["method"], row)
    return best


def beaten_by(row: Row, dense: Row) -> bool:
    """Whether the dense model is no larger and no worse."""
    return dense["stored_bytes"] <= row["stored_bytes"] and dense["perplexity"] <= row["perplexity"]


def judge(rows: Sequence[Row], best: dict[str, Row], budget: float, dense: Row) -> str:
    """The best of what is shown within `budget` bytes, its price, and who follows."""
    if not rows:
        return "No method is shown; tick one."
    if not best:
        smallest = min(rows, key=lambda r: r["stored_bytes"])
        return (
            f"Nothing shown fits into {budget / 1e6:.4g} MB; the smallest is {smallest['method']} "
            f"({smallest['setting']}) with {smallest['stored_bytes'] / 1e6:.4g} MB."
        )
    (first, row), *rest = best.items()
    then = f"; then comes {rest[0][0]} with {rest[0][1]['perplexity']:,.4g}" if rest else ""
    return (
        f"Within {budget / 1e6:.4g} MB {first} ({row['setting']}) is best: perplexity "
        f"{row['perplexity']:,.4g}, {row['perplexity'] / dense['perplexity']:.3g} times the dense one, in "
        f"{row['stored_bytes'] / 1e6:.4g} MB of the dense {dense['stored_bytes'] / 1e6:.4g}{then}."
        + " But the dense model is no larger and no worse."
        * beaten_by(row, dense)
    )


def draw(fig: Figure, result: dict) -> None:
    """All that is shown over bytes, the budget across; the best of each method within it."""
    names = bar_names(result)
    longest = max((len(line) for name in names for line in name.split("\n")), default=0)
    room = min(0.45 + 0.08 * longest, 2.6)
    left, right = panels(fig, (1.8, 1), (0.85, room), right=0.15, top=0.62, bottom=0.6)
    scatter(left, result)
    bars(right, names, result)
    wide, high = fig.get_size_inches()
    title = "best of each within the budget:\nperplexity (dotted: dense)"
    fig.text(right.get_position().x0 - (room - 0.3) / wide, 1 - 0.55 / high, title, fontsize=10)


def bar_names(result: dict) -> list[str]:
    """A name for each bar; where there are few, with the setting on a second line."""
    ranking = result["ranking"]
    few = len(ranking) <= TWO_LINES
    return [f"{name}\n{row['setting']}" if few and row else str(name) for name, row in ranking.items()]


def bars(ax: Axes, names: list[str], result: dict) -> None:
    """A bar for each method, ending in the mark that it has among the points; where nothing fits, no bar."""
    ranking, dense = result["ranking"], result["dense"]["perplexity"]
    if not ranking:
        ax.axis("off")
        return
    values = [min(row["perplexity"], MOST * dense) / dense if row else 0 for row in ranking.values()]
    texts = [f"  {row['perplexity']:,.4g}" if row else "  none fits" for row in ranking.values()]
    looks = [result["looks"][name] for name in ranking]
    bar_rows(ax, names, values, texts, [c for c, _ in looks], bold=0 if result["best"] else None, room=1.75)
    for row, (value, (color, mark)) in enumerate(zip(values, looks, strict=True)):
        ax.plot(value, row, mark, color=color, ms=9, mec="white", clip_on=False)
    ax.axvline(1, color=GREY, ls=":", lw=1.5)


def scatter(ax: Axes, result: dict) -> None:
    dense, budget, looks = result["dense"], result["budget"][0], result["looks"]
    top = min(MOST * dense["perplexity"], 1.3 * max(result["worst"]))
    ax.axvspan(budget / 1e6, 1e9, color=PALE, alpha=0.5, lw=0)
    for method, (color, mark) in looks.items():
        mine = sorted((r["stored_bytes"], r["perplexity"]) for r in result["rows"] if r["method"] == method)
        if mine:
            x, y = np.array(mine).T
            ax.plot(x / 1e6, np.minimum(y, top), mark, ls="-", lw=1, ms=6, color=color, mec="white", mew=0.5)
    for row in list(result["best"].values())[:1]:
        ax.plot(
            row["stored_bytes"] / 1e6, min(row["perplexity"], top), "o", ms=17, mfc="none", mec=BLACK, mew=2
        )
    ax.axhline(dense["perplexity"], color=GREY, lw=1, ls=":")
    ax.plot(dense["stored_bytes"] / 1e6, dense["perplexity"], "*", ms=13, color=BLACK, mec="white")
    low, high = result["range"]
    ax.set(
        xlim=(low / 1e6, high / 1e6),
        ylim=(0.9 * min(dense["perplexity"], *result["worst"]), 1.12 * top),
        yscale="log",
    )
    ax.set(xlabel="stored (MB)", ylabel="perplexity")
    plain_logarithm(ax.yaxis)
    edge = f"\nat the top edge: {top:,.3g} or more" if max(result["worst"]) > top else ""
    ax.set_title(f"star: dense; grey: beyond the budget{edge}", fontsize=10)


def control(method: str) -> str:
    """The name of a method's checkbox.

    >>> control("SVD, whitened")
    'show_SVD_whitened'
    """
    return f"show_{re.sub(r'[^0-9A-Za-z]+', '_', method)}"


def slider(low: float, high: float) -> W.FloatSlider:
    """A budget in MB between two numbers of bytes, in STEPS or fewer of a round size."""
    step = 10.0 ** np.ceil(np.log10(max(high - low, 1e3) / 1e6 / STEPS))
    ends = step * np.floor(low / 1e6 / step), step * np.ceil(high / 1e6 / step)
    middle = ends[0] + step * round(0.6 * (ends[1] - ends[0]) / step)
    return W.FloatSlider(
        middle, min=ends[0], max=ends[1], step=step, readout_format=".4g", description="budget (MB)"
    )


def checked(rows: Sequence[Row], dense: Row) -> list[Row]:
    """The rows as a list. Raises ValueError where one lacks a number, or there is none."""
    rows = list(rows)
    if not rows:
        raise ValueError("low_rank_explorer: give rows of method, setting, stored_bytes and perplexity")
    for row in [*rows, {"method": "dense", "setting": "", **dense}]:
        missing = {"method", "setting", "stored_bytes", "perplexity"} - set(row)
        if missing:
            raise ValueError(
                f"low_rank_explorer: the row {dict(row)} has no {' and no '.join(sorted(missing))}"
            )
        if not min(row["stored_bytes"], row["perplexity"]) > 0:
            raise ValueError(f"low_rank_explorer: the row {dict(row)} needs bytes and perplexity above 0")
    return rows


def low_rank_explorer(rows: Sequence[Row], dense: Row, **options) -> Explorer:
    """Explore measured `rows` (method, setting, stored_bytes, perplexity) beside the dense point.

    dense: its stored_bytes and perplexity. A checkbox `show_...` for each method, a budget in MB.
    """
    rows = checked(rows, dense)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    looks = {m: (COLORS[i % len(COLORS)], MARKS[i % len(MARKS)]) for i, m in enumerate(methods)}
    sizes = [row["stored_bytes"] for row in [*rows, dense]]
    margin = 0.05 * (max(sizes) - min(sizes)) + 1e3
    boxes = {control(m): W.Checkbox(True, description=str(m), indent=True) for m in methods}

    def compute(budget, **ticked):
        shown = [row for row in rows if ticked[control(row["method"])]]
        best = best_within(shown, 1e6 * budget + 1)
        numbers = {}
        for method, row in list(best.items())[:1]:
            numbers = {
                "best_method": f"{method} ({row['setting']})",
                "perplexity": row["perplexity"],
                "times_dense": row["perplexity"] / dense["perplexity"],
                "stored_bytes": row["stored_bytes"],
                "of_dense_share": row["stored_bytes"] / dense["stored_bytes"],
            }
        return {
            "methods_shown": sum(ticked.values()),
            **numbers,
            "says": judge(shown, best, 1e6 * budget, dense),
            "rows": shown,
            "best": best,
            "ranking": best | dict.fromkeys(row["method"] for row in shown if row["method"] not in best),
            "dense": dense,
            "budget": [1e6 * budget],
            "looks": looks,
            "worst": [row["perplexity"] for row in rows],
            "range": (min(sizes) - margin, max(sizes) + margin),
        }

    return Explorer(
        compute, draw, name="low_rank_explorer", size=(8.6, 3.7), **options,
        budget=slider(min(sizes), max(sizes)), **boxes,
    )  # fmt: skip
