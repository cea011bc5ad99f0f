"""Needle map: where in a text a fact may lie, and how small the cache may be, so that it is still found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import ipywidgets as W
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightlib.report import tidy
from lightlib.widgets.curves import MARKS
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.style import BLUE, GREEN, HEAT, ORANGE, PALE, PURPLE, SKY, VERMILION, panels
from lightlib.widgets.text_screen import HIGH, letters_of

HIT, NLL = "hit rate", "nll"
LINES = (VERMILION, BLUE, GREEN, ORANGE, PURPLE, SKY)
UNIT = {HIT: "%", NLL: "nats"}
FOUND, NEAR = 90, 0.5  # every depth has this hit rate in %; or an nll at most this far from the best
MOST = 144  # cells

Maps = Mapping[tuple[str, str], Tensor]


def summary(map_: Tensor, metric: str) -> dict[str, float | int]:
    """The mean of a map (budgets, depths), its worst value, and in which row and column that is."""
    worst = int(map_.argmin() if metric == HIT else map_.argmax())
    row, column = divmod(worst, map_.shape[1])
    return {"mean": map_.mean().item(), "worst": map_.flatten()[worst].item(), "row": row, "column": column}


def amount(budget: float) -> str:
    """A budget of tokens, or of a share of them where it is a float up to 1.

    >>> amount(1024), amount(0.25)
    ('1,024 tokens', '25 %')
    """
    return f"{100 * budget:.3g} %" if isinstance(budget, float) and budget <= 1 else f"{budget:,.0f} tokens"


def enough(map_: Tensor, budgets: Sequence[float], metric: str, best: float) -> float | None:
    """The smallest budget from which on every depth is FOUND, or NEAR the `best` nll; None: there is none."""
    worst = map_.amin(1) >= FOUND if metric == HIT else map_.amax(1) <= best + NEAR
    rows = sorted(range(len(budgets)), key=lambda i: budgets[i])
    good = [budgets[i] for k, i in enumerate(rows) if all(worst[j] for j in rows[k:])]
    return min(good, default=None)


def draw(fig: Figure, result: dict) -> None:
    """The map with a number in each cell; beside each row its mean over depths, for every policy."""
    left, right = panels(fig, (1.9, 1), (0.85, 0.3), right=0.25, top=0.66, bottom=0.6)
    metric, (low, high), (budgets, depths) = result["metric"][0], result["ends"], result["axes"]
    cells(left, result["map"].numpy(), result["worst_at"], low, high, metric)
    left.set_xticks(range(len(depths)), [f"{100 * d:.3g}" for d in depths])
    left.set_yticks(range(len(budgets)), [amount(b).removesuffix(" tokens") for b in budgets])
    left.set(
        xlabel="depth of the needle (% of the context)",
        ylabel="budget (tokens kept)" if "tokens" in amount(max(budgets)) else "budget (kept)",
    )
    left.set_title(
        f"{result['title'][0]}: {metric} ({UNIT[metric]})\nbright: good; framed: the worst", fontsize=10
    )
    profiles(right, result["profiles"], result["policy"][0], low, high)
    right.set_xlabel(f"mean of the row ({UNIT[metric]})")


def cells(ax: Axes, map_: np.ndarray, worst: tuple[int, int], low: float, high: float, metric: str) -> None:
    """Bright is good: many hits, or a small nll; black on bright cells, white on dark ones."""
    good = (map_ - low) / (high - low)
    good = good if metric == HIT else 1 - good
    ax.imshow(good, cmap=HEAT, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    texts = [[f"{v:.0f}" if metric == HIT else f"{v:.2g}" for v in row] for row in map_]
    write(ax, texts, good > 0.55)
    row, column = worst
    x, y = column + 0.45 * np.array([-1, 1, 1, -1, -1]), row + 0.45 * np.array([-1, -1, 1, 1, -1])
    if map_.min() < map_.max():
        ax.plot(x, y, color=VERMILION, lw=2.5)


def write(ax: Axes, texts: list[list[str]], black: np.ndarray) -> None:
    """A text in the middle of each cell, as one picture: texts of their own would take half of a redraw."""
    alphabet = "".join(sorted({*"".join(text for row in texts for text in row)}))
    letters = dict(zip(alphabet, letters_of(alphabet), strict=True))
    left, low, width, height = ax.bbox.bounds
    ink = np.zeros((round(height), round(width), 4))
    for (row, column), dark in np.ndenumerate(black):
        drawn = np.hstack([letters[letter] for letter in texts[row][column]])
        x = round((column + 0.5) / black.shape[1] * width - drawn.shape[1] / 2)
        y = round((row + 0.5) / black.shape[0] * height - HIGH / 2)
        ink[y : y + HIGH, x : x + drawn.shape[1]] = np.dstack([np.full((*drawn.shape, 3), 1.0 - dark), drawn])
    ax.figure.figimage(ink, round(left), round(low), origin="upper", zorder=3)


def profiles(ax: Axes, means: Mapping[str, Tensor], policy: str, low: float, high: float) -> None:
    """A line for each policy down the rows of the map; the chosen one thick."""
    for i, (name, mean) in enumerate(means.items()):
        chosen = name == policy
        ax.plot(
            mean, range(len(mean)), MARKS[i % len(MARKS)], ls="-", color=LINES[i % len(LINES)], label=name,
            lw=3 if chosen else 1.2, ms=7 if chosen else 4, zorder=3 if chosen else 2, clip_on=False,
        )  # fmt: skip
    rows, ticks = len(mean), np.linspace(low, high, 5)
    ax.vlines(ticks, -0.5, rows - 0.5, color=PALE, lw=1, zorder=0)
    margin = 0.04 * (high - low)
    ax.set(xlim=(low - margin, high + margin), ylim=(rows - 0.5, -0.5))
    ax.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    ax.yaxis.set_visible(False)
    ax.figure.legend(
        *ax.get_legend_handles_labels(), loc="upper right", ncols=2, fontsize=9, bbox_to_anchor=(1, 1),
        handlelength=1.4, columnspacing=1, borderaxespad=0.2, labelspacing=0.2,
    )  # fmt: skip


def judge(
    title: str, metric: str, one: dict, budgets: Sequence[float], depths: Sequence[float], least
) -> str:
    """The mean, the worst place, and the budget that is enough wherever the needle lies."""
    unit = UNIT[metric]
    goal = f"{FOUND} %" if metric == HIT else f"an nll at most {NEAR} above the best of all"
    every = "does every depth reach" if least is None else "every depth reaches"
    reached = f"From {amount(least)} on" if least else "At no budget here"
    where = f"{100 * depths[one['column']]:.3g} % with {amount(budgets[one['row']])} kept"
    return (
        f"{title}: mean {metric} {tidy(one['mean'])} {unit}, worst {tidy(one['worst'])} {unit} at a depth of "
        f"{where}. {reached} {every} {goal}."
    )


def checked(maps: Maps, budgets: Sequence[float], depths: Sequence[float], name: str) -> dict:
    """The maps in float32. Raises ValueError where one is missing, has another shape or is no number."""
    shape = (len(budgets), len(depths))
    if not maps or len({*budgets}) < shape[0] or 0 in shape:
        raise ValueError("needle_map: give {(policy, mode): map}, and budgets and depths that differ")
    if shape[0] * shape[1] > MOST:
        raise ValueError(f"needle_map: {shape[0]} x {shape[1]} cells; {MOST} can be read, give fewer depths")
    for policy in {policy for policy, _ in maps}:
        for mode in {mode for _, mode in maps}:
            if (policy, mode) not in maps:
                raise ValueError(f"needle_map: {name} has no map of {policy!r} with the question {mode!r}")
    for key, map_ in maps.items():
        if tuple(map_.shape) != shape or not map_.isfinite().all():
            raise ValueError(
                f"needle_map: the {name} of {key} is {tuple(map_.shape)} or not finite; "
                f"it must be {shape}, budgets by depths"
            )
    return {key: map_.detach().float().cpu() for key, map_ in maps.items()}


def needle_map(
    hits: Maps, budgets: Sequence[float], depths: Sequence[float], *, nll: Maps | None = None, **options
) -> Explorer:
    """Explore `hits` {(policy, mode): hit rate (budgets, depths), 0 to 1}, and `nll` of the answer if given.

    budgets: tokens kept, or shares of them as floats up to 1. depths: shares of the context.
    The colours of a metric mean the same for all policies and modes.
    """
    maps = {HIT: {key: 100 * map_ for key, map_ in checked(hits, budgets, depths, HIT).items()}}
    if max(m.max() for m in maps[HIT].values()) > 100 or min(m.min() for m in maps[HIT].values()) < 0:
        raise ValueError("needle_map: hit rates go from 0 to 1")
    if nll is not None:
        maps[NLL] = checked(nll, budgets, depths, NLL)
        if maps[NLL].keys() != maps[HIT].keys():
            raise ValueError("needle_map: nll and hits need the same policies and modes")
    policies, modes = (list(dict.fromkeys(key[i] for key in hits)) for i in (0, 1))
    lowest = {metric: min(m.min().item() for m in own.values()) for metric, own in maps.items()}
    largest = {metric: max(m.max().item() for m in own.values()) for metric, own in maps.items()}

    def compute(policy, question, metric=HIT):
        own, title = maps[metric], f"{policy}, question {question}"
        one = summary(own[policy, question], metric)
        least = enough(own[policy, question], budgets, metric, lowest[metric])
        if metric == HIT:
            numbers = {"mean_hit_share": one["mean"] / 100, "worst_hit_share": one["worst"] / 100}
        else:
            numbers = {"mean_nll": one["mean"], "worst_nll": one["worst"]}
        return {
            **numbers,
            "worst_depth_share": depths[one["column"]],
            "worst_budget": amount(budgets[one["row"]]),
            "enough_everywhere": amount(least) if least else "no budget",
            "says": judge(title, metric, one, budgets, depths, least),
            "map": own[policy, question],
            "worst_at": (one["row"], one["column"]),
            "profiles": {name: own[name, question].mean(1) for name in policies},
            "ends": (0, 100) if metric == HIT else (0, 2 * math.ceil(largest[NLL] / 2)),
            "axes": (budgets, depths),
            "metric": [metric],
            "policy": [policy],
            "title": [title],
        }

    controls = {
        "policy": W.Dropdown(options=policies, value=policies[0]),
        "question": W.Dropdown(options=modes, value=modes[0]),
    }
    if nll is not None:
        controls["metric"] = W.Dropdown(options=[HIT, NLL], value=HIT)
    high = 1.6 + 0.36 * max(5, len(budgets))
    return Explorer(compute, draw, name="needle_map", size=(8.6, high), **options, **controls)
