"""Budget allocator: how many neurons each block keeps, by its importance, and what the model then costs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import ipywidgets as W
import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from lightlib.structured.budget import LatencyTable
from lightlib.structured.cfsp import block_shares, neuron_counts
from lightlib.widgets.anatomy import MODELS, Shape, flop_per_token, parameters
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.style import BLACK, BLUE, HEAT, PALE, VERMILION, boxes, panels
from lightlib.widgets.unit_map import unit_sizes

# `block_importance` of SmolLM2-135M on 16 windows of 512 tokens of "prose"
EXAMPLE = (
    0.4992, 0.1869, 0.0875, 0.0785, 0.0848, 0.0854, 0.0836, 0.0852, 0.0942, 0.0871,
    0.0911, 0.0880, 0.0768, 0.0720, 0.0696, 0.0768, 0.0797, 0.0706, 0.0879, 0.0950,
    0.1041, 0.0994, 0.0968, 0.1198, 0.1824, 0.0753, 0.0821, 0.1011, 0.1029, 0.2190,
)  # fmt: skip
SHARPNESS = (0.0, 0.5, 1.0, 1.6384, 3.0, 6.0, 12.0, 25.0, 50.0)
CONTEXT = 256  # tokens that attention looks back at, for the FLOPs


def allocate(
    importance: list[float],
    d_ff: int,
    fraction: float,
    sharpness: float,
    round_to: int = 1,
    protect: tuple[int, int] = (0, 0),
) -> list[int]:
    """Neurons that each block keeps, as `cfsp` shares them out; `protect`: so many at either end stay whole.

    fraction: of the neurons in the other blocks.
    """
    first, last = protect
    free = importance[first : len(importance) - last]
    sizes = [d_ff] * len(free)
    shares = block_shares(torch.tensor(free), fraction, sharpness, sizes)
    return [d_ff] * first + neuron_counts(sizes, shares.tolist(), round_to) + [d_ff] * last


def costs(shape: Shape, gone: int, bits: int) -> dict[str, float]:
    """What the model takes once `gone` neurons are out, as `size` and `flops` count what is really cut."""
    left = sum(parameters(shape).values()) - gone * unit_sizes(shape)["neurons"]
    weights = shape.block_weights["mlp"] // (shape.layers * shape.d_ff)  # of a neuron, without biases
    _, decode = flop_per_token(shape, CONTEXT)
    return {
        "parameters": left,
        "weights_bytes": left * bits // 8,
        "decode_per_token_flop": decode - 2 * weights * gone,
    }


def draw(fig: Figure, result: dict) -> None:
    """A bar of neurons for each block in the colour of its importance; beside it, what is left of all."""
    left, right = panels(fig, (2.6, 1), (0.85, 1.15), right=0.05, top=0.95, bottom=0.6)
    neurons(left, result)
    explained(fig, left, result)
    names = {"neurons": "neurons", "parameters": "parameters", "flop": "FLOPs a token", "ms": "time"}
    for row, (key, name) in enumerate(names.items()):
        share = 100 * result["left"].get(key, 0)
        boxes(right, [(0, 100, row - 0.36, row + 0.36), (0, share, row - 0.36, row + 0.36)], [PALE, BLUE])
        right.text(-4, row, name, ha="right", va="center", fontsize=10)
        right.text(104, row, f"{share:.0f} %" if share else "no table", va="center", fontsize=10)
    right.set(xlim=(0, 165), ylim=(3.6, -0.6))
    right.axis("off")
    right.set_title("left of the dense model", fontsize=11, x=-0.05)


def neurons(ax: Axes, result: dict) -> None:
    """What each block keeps, on what it had; the line is what equal shares would keep."""
    kept, d_ff, (first, last) = result["kept"], result["d_ff"][0], result["protected"]
    rows = [(i - 0.4, i + 0.4, 0, n) for i, n in enumerate(kept)]
    boxes(ax, [(l, r, 0, d_ff) for l, r, _, _ in rows], PALE)
    boxes(ax, rows, result["colors"])
    free = range(first, len(kept) - last)
    mean = sum(kept[i] for i in free) / len(free)
    ax.plot([first - 0.5, len(kept) - last - 0.5], [mean, mean], color=VERMILION, ls="--", lw=1.5)
    for i in set(range(len(kept))) - set(free):
        ax.plot(i, 1.04 * d_ff, "v", ms=6, color=BLACK)
    ax.set(xlim=(-0.7, len(kept) - 0.3), ylim=(0, 1.08 * d_ff), xlabel="block")
    ax.set_ylabel(f"neurons kept (of {d_ff:,})")
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.locator_params(axis="x", integer=True)


def explained(fig: Figure, ax: Axes, result: dict) -> None:
    """Above the bars: what the colours, the line and the marks mean."""
    (low, high), x = result["range"], ax.get_position().x0
    wide, tall = fig.get_size_inches()
    first, second = 1 - 0.28 / tall, 1 - 0.6 / tall
    strip = fig.add_axes((x + 1.5 / wide, first - 0.085 / tall, 1.3 / wide, 0.17 / tall))
    strip.imshow([range(256)], aspect="auto", cmap=HEAT)
    strip.axis("off")
    text = partial(fig.text, va="center", fontsize=10)
    text(x, first, f"importance {low:.3g}")
    text(x + 2.87 / wide, first, f"{high:.3g}")
    text(x + 3.5 / wide, first, "▼ protected" if any(result["protected"]) else "")
    text(x, second, "– –", color=VERMILION, weight="bold")
    text(x + 0.35 / wide, second, "mean of the pruned blocks; pale: what goes")


def in_words(kept: list[int], d_ff: int, left: Mapping[str, float], protected: tuple[int, int]) -> str:
    """Who keeps most and least, what goes of the parameters, and what that saves of the time."""
    first, last = protected
    free = dict(list(enumerate(kept))[first : len(kept) - last])
    most, fewest = max(free, key=free.get), min(free, key=free.get)
    spread = (
        f"every block keeps {' or '.join(f'{n:,}' for n in sorted({free[fewest], free[most]}))} of {d_ff:,}"
        if free[most] - free[fewest] <= 1  # equal but for the sum
        else f"block {most} keeps {free[most]:,} of {d_ff:,}, block {fewest} {free[fewest]:,}"
    )
    where = " between the protected" if any(protected) else ""
    gone = f"{100 * (1 - left['neurons']):.3g} % of the neurons go"
    gone += f", {100 * (1 - left['parameters']):.2g} % of the parameters"
    time = (
        f"the forward should take {100 * left['ms']:.0f} % of its time"
        if "ms" in left
        else "no time is shown, since no table of measured times was given"
    )
    return f"{gone}; {spread}{where}; {time}."


def budget_allocator(
    importance: Mapping[str, float] | None = None,
    table: LatencyTable | None = None,
    shape: Shape = MODELS["SmolLM2-135M"],
    bits: int = 32,
    **options,
) -> Explorer:
    """Share a cut of the neurons out among the blocks by their `importance` {block: number}, as `cfsp` does.

    importance: by default that of SmolLM2-135M. table: times measured on this device; without it none are
    shown. bits: that the model stores a weight in. Raises ValueError where these are of different models.

    >>> budget_allocator().set(fraction=0.3, sharpness=0).result["neurons_kept"]
    32256
    """
    if importance is None:
        importance = {f"model.layers.{i}": value for i, value in enumerate(EXAMPLE)}
    check(importance, table, shape)
    values, total = list(importance.values()), shape.layers * shape.d_ff
    norm = LogNorm(max(min(values), max(values) / 100, 1e-12), max(*values, 1e-12))
    colors = matplotlib.colormaps[HEAT](norm(values).clip(0, 1))
    dense, dense_ms = costs(shape, 0, bits), table and table.of_counts({})
    ends = min(4, (shape.layers - 1) // 2)

    def compute(fraction, sharpness, round_to, protect_first, protect_last):
        protected = protect_first, protect_last
        kept = allocate(values, shape.d_ff, fraction, sharpness, round_to, protected)
        now = costs(shape, total - sum(kept), bits)
        left = {
            "neurons": sum(kept) / total,
            "parameters": now["parameters"] / dense["parameters"],
            "flop": now["decode_per_token_flop"] / dense["decode_per_token_flop"],
        }
        times = {}
        if table:
            counts = {name: {"neurons": n} for name, n in zip(importance, kept, strict=True)}
            predicted = table.of_counts(counts)
            times = {"predicted_ms": predicted, "dense_ms": dense_ms, "times_as_fast": dense_ms / predicted}
            left["ms"] = predicted / dense_ms
        return {
            "neurons_kept": sum(kept),
            **now,
            **times,
            "says": in_words(kept, shape.d_ff, left, protected),
            "kept": kept,
            "left": left,
            "protected": protected,
            "d_ff": [shape.d_ff],
            "range": (norm.vmin, norm.vmax),
            "colors": colors,
        }

    return Explorer(
        compute, draw, name="budget_allocator", size=(8.6, 3.7), **options,
        fraction=W.FloatSlider(
            0.2, min=0, max=0.7, step=0.01, description="neurons gone", readout_format=".0%"
        ),
        sharpness=W.SelectionSlider(options=[(f"{s:.3g}", s) for s in SHARPNESS], value=1.6384),
        round_to=W.SelectionSlider(options=[1, 8, 64, 128], value=1, description="multiples of"),
        protect_first=W.IntSlider(0, 0, ends),
        protect_last=W.IntSlider(0, 0, ends),
    )  # fmt: skip


def check(importance: Mapping[str, float], table: LatencyTable | None, shape: Shape) -> None:
    """Raises ValueError where importance, table and shape are not of the same blocks and neurons."""
    if len(importance) != shape.layers:
        raise ValueError(f"{len(importance)} importances, but the shape has {shape.layers} blocks")
    if not table:
        return
    if list(table.blocks) != list(importance):
        raise ValueError("the table was measured on other blocks than the importances are of")
    sizes = {kinds["neurons"][0][-1] for kinds in table.blocks.values()}
    if sizes != {shape.d_ff}:
        raise ValueError(f"the table goes to {sorted(sizes)} neurons a block, the shape has {shape.d_ff}")
