"""Slice map: what slicing deletes from every matrix of a block, what its shortcuts cost, and when it pays."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import ipywidgets as W
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightlib.slicing.slicegpt import ROTATIONS, kept_width
from lightlib.slicing.stream import low_rank_pays
from lightlib.widgets.anatomy import FAMILIES, MODELS, Shape, parameters
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.numbers import scaled
from lightlib.widgets.style import BLACK, BLUE, GREEN, GREY, ORANGE, PALE, SKY, VERMILION, boxes, panels

# blocks of three MLP matrices and without biases in the stream, as in Llama
SHAPES = {name: shape for name, shape in MODELS.items() if not FAMILIES[shape.family].all_biases}
COLORS = {"embedding": SKY, "blocks": BLUE, "shortcuts": ORANGE, "head": GREEN, "other": GREY}
WIDE, HIGH, GAP = 0.68, 1.75, 0.03  # inches: a stream at most, the longest matrix at most, between two
MOST = 60  # percent of directions that the curve goes to


def dense_parts(shape: Shape, tied: bool) -> dict[str, int]:
    """Parameters by part before slicing; "other": norms and biases."""
    parts, weights = parameters(shape), sum(shape.block_weights.values())
    return {
        "embedding": parts["embedding"],
        "blocks": weights,
        "shortcuts": 0,
        "head": 0 if tied else shape.head_weights,
        "other": parts["attention"] + parts["mlp"] + parts["norms"] - weights,
    }


def sliced_parts(
    shape: Shape,
    kept: float,
    rotations: str = "sublayer",
    slice_head: bool = False,
    shortcuts: str = "low_rank",
) -> dict[str, float]:
    """Parameters by part as `slicegpt` leaves them with `kept` directions at every place; whole if kept is.

    The norms of the stream have no scale any more; the last block writes what the head reads, sliced or not.
    """
    last = kept if slice_head else shape.width
    places = shape.layers * (2 if rotations == "sublayer" else 1)  # each ends in a shortcut
    each = kept * (shape.width - kept if passes(shape, kept, shortcuts) == 2 else kept)
    # to all directions a shortcut of low rank needs no weights
    last_one = each if slice_head else 0 if shortcuts == "low_rank" else kept * last
    dense = dense_parts(shape, tied=True)
    return {
        "embedding": shape.vocabulary * kept,
        "blocks": dense["blocks"] // shape.width * kept + shape.d_ff * (last - kept),
        "shortcuts": (places - 1) * each + last_one,
        "head": shape.vocabulary * last,
        "other": dense["other"] - (2 * shape.layers + 1) * shape.width,
    }


def passes(shape: Shape, kept: float, shortcuts: str) -> int:
    """How often a token is multiplied by the weights of a shortcut: twice where it is of low rank."""
    return 2 if shortcuts == "low_rank" and low_rank_pays(shape.width, kept, kept) else 1


def linear_flop(parts: dict[str, float], passes: int = 1) -> float:
    """FLOPs a token of what is multiplied by, shortcuts `passes` times; an embedding is looked up."""
    return 2 * (parts["blocks"] + passes * parts["shortcuts"] + parts["head"])


def break_even(measure: Callable[[float], float], dense: float, width: int) -> float:
    """The share of directions that must go until `measure`, which grows with the width kept, is `dense`."""
    low, high = 0.0, float(width)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if measure(middle) <= dense else (low, middle)
    return 1 - low / width


class Column(NamedTuple):
    """Matrices that stand one below the other in the map, as wide as the stream."""

    title: str
    part: str
    lengths: tuple[int, ...]  # their other side
    kept: int  # columns that stay
    kept_length: int | None = None  # rows that stay, where not all do


def columns(shape: Shape, kept: int, rotations: str, slice_head: bool, shortcuts: str) -> list[Column]:
    """What stands in the map, from left to right; no lengths: there is no such matrix."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    rows = shape.width - kept if passes(shape, kept, shortcuts) == 2 else kept
    first = (shape.width,) if rotations == "sublayer" else ()
    return [
        Column("embedding", "embedding", (shape.vocabulary,), kept),
        Column("W_q W_k W_v", "blocks", (q, kv, kv), kept),
        Column("W_o", "blocks", (q,), kept),
        Column("shortcut 1", "shortcuts", first, kept, rows),
        Column("W_gate", "blocks", (shape.d_ff,), kept),
        Column("W_up", "blocks", (shape.d_ff,), kept),
        Column("W_down", "blocks", (shape.d_ff,), kept),
        Column("shortcut 2" if first else "shortcut", "shortcuts", (shape.width,), kept, rows),
        Column("head", "head", (shape.vocabulary,), kept if slice_head else shape.width),
    ]


def draw(fig: Figure, result: dict) -> None:
    """The matrices to scale; below, the parameters by part, and all of them over what is cut."""
    wide, high = fig.get_size_inches()
    matrices(fig.add_axes((0, 1 - 2.75 / high, 1, 2.75 / high)), result, wide)
    left, right = panels(fig, (1, 1), (1.12, 0.75), right=0.2, top=3.12, bottom=0.58)
    stacks(left, result["stacks"])
    totals(right, result)


def matrices(ax: Axes, result: dict, wide: float) -> None:
    """Every column of the map, in inches from the top left; what is cut is pale."""
    shape, shown = result["shape"], result["columns"]
    longest = max(sum(c.lengths) for c in shown if c.part not in ("embedding", "head"))
    unit, slot, pieces = min(WIDE / shape.width, HIGH / longest), wide / len(shown), []
    for i, column in enumerate(shown):
        middle, y = (i + 0.5) * slot, 0.5
        x = middle - shape.width * unit / 2
        ax.text(middle, 0.45, column.title, ha="center", va="bottom", fontsize=10)
        for length in column.lengths:
            tall = min(length, longest) * unit
            down = tall if column.kept_length is None else column.kept_length * unit
            pieces += [((x, x + shape.width * unit, y, y + tall), PALE)]
            pieces += [((x, x + column.kept * unit, y, y + down), COLORS[column.part])]
            if length > longest:
                tear(ax, x, y + 0.72 * tall, shape.width * unit)
            y += tall + GAP
        rows = column.kept_length or sum(column.lengths)
        size = f"{rows:,}\nx {column.kept:,}" if column.lengths else "none: one\nbasis"
        ax.text(middle, y + 0.02, size, ha="center", va="top", fontsize=10)
    boxes(ax, *zip(*pieces, strict=True))
    ax.set(xlim=(0, wide), ylim=(2.75, 0))
    ax.axis("off")
    whole = result["columns"][-1].kept > result["width_kept"]
    ends = f"; the last block writes to all {shape.width:,} directions" if whole else ""
    title = f"one of {shape.layers} blocks to scale, as wide as the stream; pale: deleted{ends}"
    ax.text(0.12, 0.08, title, va="top", fontsize=10)


def tear(ax: Axes, x: float, y: float, wide: float) -> None:
    """A white stripe: the matrix is longer than drawn."""
    ax.plot([x - 0.05, x + wide + 0.05], [y + 0.06, y - 0.06], color="white", lw=5, solid_capstyle="butt")


def stacks(ax: Axes, rows: dict[str, dict[str, float]]) -> None:
    """A bar for each model, its parts in the colours of the map."""
    reach, bars = 1.4 * max(sum(parts.values()) for parts in rows.values()), []
    for row, (name, parts) in enumerate(rows.items()):
        edges = np.cumsum([0, *parts.values()])
        ends = pairwise(edges)
        bars += [
            ((a, b, row - 0.36, row + 0.36), COLORS[part]) for (a, b), part in zip(ends, parts, strict=True)
        ]
        ax.text(-0.015 * reach, row, name, ha="right", va="center", fontsize=10)
        ax.text(edges[-1] + 0.015 * reach, row, count(edges[-1]), va="center", fontsize=10)
    boxes(ax, *zip(*bars, strict=True))
    ax.set(xlim=(0, reach), ylim=(len(rows) - 0.5, -0.5))
    ax.axis("off")
    ax.set_title("parameters, in the colours above", fontsize=10)


def totals(ax: Axes, result: dict) -> None:
    """Parameters over the directions cut; dots where they are those of a dense model."""
    unit, name = (1e9, "billions") if result["parameters_untied"] >= 1e9 else (1e6, "millions")
    cut, curve = result["curve"]
    ax.plot(100 * cut, curve / unit, color=BLUE)
    for label, (dense, even) in result["even"].items():
        ax.axhline(dense / unit, color=GREY, ls=":", lw=1.5)
        ax.text(MOST - 0.5, dense / unit, label, ha="right", va="bottom", color=GREY, fontsize=10)
        if 100 * even <= MOST:
            ax.plot(100 * even, dense / unit, "o", ms=8, color=BLACK, mec="white")
    here = 100 * (1 - result["width_kept"] / result["shape"].width)
    ax.plot(here, result["parameters_sliced"] / unit, "D", ms=9, color=VERMILION, mec="white")
    ax.set(xlim=(-1, MOST), xlabel="directions cut (%)", ylabel=f"parameters ({name})")
    low, high = curve[-1] / unit, curve[0] / unit
    ax.set_ylim(low - 0.08 * (high - low), high + 0.12 * (high - low))
    ax.locator_params(axis="y", nbins=4)
    ax.set_title("red: here; dots: as large as dense", fontsize=10)


def count(number: float) -> str:
    """A number of parameters in words: 134.5 M, 6.738 B."""
    return scaled(number, "").replace("G", "B")


def verdict(tied: float | None, untied: float, sliced: float, even: float) -> str:
    """Whether the sliced model, its head untied, is smaller than the dense one as it was."""
    times = sliced / (untied if tied is None else tied)
    change = f"{100 * abs(1 - times):.2g} % {'smaller' if times < 1 else 'larger'}"
    if tied is None:
        return f"The head was never tied; the sliced model is {change} than the dense one."
    if times < 1:
        return f"Even with a head of its own, the sliced model is {change} than the tied dense one."
    return (
        f"The head must be untied, so the sliced model is {change} than the tied dense one; "
        f"it is smaller once more than {100 * even:.3g} % of the directions go."
    )


def slice_map(**options) -> Explorer:
    """Explore what SliceGPT deletes and adds: the cut, the model, widths' multiples, rotations, shortcuts as
    in the paper or of low rank, and the head.

    >>> slice_map().set(cut=25).result["parameters_sliced"]
    140652288
    """

    def compute(model, cut, round_to, rotations, shortcuts, slice_head):
        shape = SHAPES[model]
        kept = kept_width(torch.ones(shape.width), cut / 100, round_to)

        def parts(width):
            return sliced_parts(shape, width, rotations, slice_head, shortcuts)

        def total(width):
            return sum(parts(width).values())

        def flop_at(width):
            return linear_flop(parts(width), passes(shape, width, shortcuts))

        untied = dense_parts(shape, tied=False)
        dense = {"dense, untied" if shape.tied else "dense": untied}
        if shape.tied:
            dense = {"dense, tied": dense_parts(shape, tied=True)} | dense
        even = {
            name: (size, break_even(total, size, shape.width))
            for name, size in ((name, sum(one.values())) for name, one in dense.items())
        }
        tied, (untied_size, untied_even) = even.get("dense, tied"), [*even.values()][-1]
        sliced, at = parts(kept), np.linspace(0, MOST / 100, 61)
        size, flop = sum(sliced.values()), linear_flop(untied)
        return {
            "width_kept": kept,
            **({"parameters_tied": tied[0]} if tied else {}),
            "parameters_untied": untied_size,
            "parameters_sliced": size,
            "parameters_in_shortcuts": sliced["shortcuts"],
            **({"sliced_over_tied": size / tied[0]} if tied else {}),
            "saved_of_untied_share": 1 - size / untied_size,
            "dense_per_token_flop": flop,
            "sliced_per_token_flop": flop_at(kept),
            **({"smaller_than_tied_from_share": tied[1]} if tied else {}),
            "smaller_than_untied_from_share": untied_even,
            "computes_less_from_share": break_even(flop_at, flop, shape.width),
            "says": verdict(tied and tied[0], untied_size, size, tied[1] if tied else untied_even),
            "shape": shape,
            "columns": columns(shape, kept, rotations, slice_head, shortcuts),
            "stacks": dense | {"sliced": sliced},
            "even": even,
            "curve": (at, np.array([total(shape.width * (1 - share)) for share in at])),
        }

    return Explorer(
        compute, draw, name="slice_map", size=(8.6, 4.95), **options,
        model=W.Dropdown(options=list(SHAPES)),
        cut=W.IntSlider(25, 0, 50, description="cut (%)"),
        round_to=W.SelectionSlider(options=[1, 8, 64, 128], value=8, description="multiples of"),
        rotations=W.Dropdown(options=[(f"one a {name}", name) for name in ROTATIONS]),
        shortcuts=W.Dropdown(options=[("full", "full"), ("of low rank", "low_rank")]),
        slice_head=W.Checkbox(False, description="slice the head", indent=True),
    )  # fmt: skip
