"""Attention map: where the weights of a head lie, and how few keys hold most of them.

Sinks: Xiao et al. 2023, arXiv:2309.17453. Heavy hitters, by column sums: Zhang et al. 2023, arXiv:2306.14048
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ipywidgets as W
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightlib.widgets.explorer import Explorer
from lightlib.widgets.logarithm import exponents, powers_of_ten
from lightlib.widgets.style import BLACK, BLUE, HEAT, SKY, VERMILION, boxes, panels

WINDOWS = (4, 8, 16, 32, 64)
HEAVY = 0.1  # share of the keys that are called heavy
LISTED = 5  # heavy keys that are named
MEAN = "mean"
LEAST = 1e-3  # the dark end of the colours, and the foot of the bars
FEWEST, MOST = 10, 512  # tokens


@dataclass(frozen=True)
class Weights:
    """Shares of all the attention that the queries of a head pay; sink, recent and rest sum to 1."""

    sink: float  # to the first token
    recent: float  # to the newest keys, the query's own among them, without the first token
    heavy: float  # to the tenth of the keys that gets most
    entropy: float  # bits, a mean over queries
    mass: Tensor  # (keys,) each key's share
    heaviest: list[int]  # the heavy keys, most first


def weigh(A: Tensor, window: int) -> Weights:
    """Of causal weights A (queries, keys), each row summing to 1: what first, newest and heavy keys get.

    Were every weight equal, entropy would be the mean of log2(1), log2(2), ... log2(T).
    """
    A = A.float()
    T = len(A)
    mass = A.sum(0) / T  # (keys,)
    heaviest = mass.topk(max(1, round(HEAVY * T))).indices
    return Weights(
        sink=mass[0].item(),
        recent=A.triu(1 - window)[:, 1:].sum().item() / T,
        heavy=mass[heaviest].sum().item(),
        entropy=-torch.xlogy(A, A).sum().item() / T / np.log(2),
        mass=mass,
        heaviest=heaviest.tolist(),
    )


def draw(fig: Figure, result: dict) -> None:
    """The weights on a logarithmic colour scale; what each key gets of all attention."""
    left, right = panels(fig, (2.85, 3.9), (0.75, 0.95), right=0.15, top=0.45, bottom=0.6)
    weights, one, window = result["weights"]
    heat_map(left, weights, one, window)
    masses(right, one)


def heat_map(ax: Axes, weights: np.ndarray, one: Weights, window: int) -> None:
    """Queries from the top, keys from the left; marks above the heaviest keys, dashes where `window` ends."""
    T = len(weights)
    colors = colormaps[HEAT].with_extremes(bad="white")
    shown = np.ma.masked_array(weights, np.triu(np.ones((T, T), bool), 1))
    ax.imshow(
        shown, cmap=colors, aspect="auto", vmin=np.log10(LEAST), vmax=0, interpolation="nearest",
        extent=(-0.5, T - 0.5, T - 0.5, -0.5),
    )  # fmt: skip
    edge = np.array([window - 0.5, T - 0.5])  # queries; before them every key is among the newest
    ax.plot(edge - window, edge, color="white", lw=1, ls="--")
    top = -0.025 * T
    listed = one.heaviest[:LISTED]
    above = [top] * len(listed)
    ax.plot(listed, above, "v", color=VERMILION, ms=5, mec=BLACK, mew=0.5, clip_on=False)
    ax.set(xlim=(-0.5 - 0.02 * T, T - 0.5), ylim=(T - 0.5, -0.5), xlabel="key", ylabel="query")
    ticks = [0, T // 4, T // 2, 3 * T // 4, T - 1]  # to find round ones would take matplotlib longer
    ax.set(xticks=ticks, yticks=ticks)
    ax.set_title(f"weight: dark {LEAST:g} or less, bright 1", fontsize=10, pad=10)


def masses(ax: Axes, one: Weights) -> None:
    """A bar for each key, the heavy ones in blue and the first token in vermilion."""
    percent = exponents(100 * one.mass)
    foot = exponents(100 * LEAST) - 1
    colors = [SKY] * len(percent)
    for key in one.heaviest:
        colors[key] = BLUE
    colors[0] = VERMILION
    boxes(ax, [(k - 0.4, k + 0.4, foot, max(p, foot)) for k, p in enumerate(percent)], colors)
    ax.axhline(exponents(100 / len(percent)), color=BLACK, ls=":", lw=1)
    powers_of_ten(ax.yaxis, 10**foot, 130)
    ax.set(xlim=(-1, len(percent)), xticks=[0, len(percent) // 2, len(percent) - 1])
    ax.set(xlabel="key", ylabel="share of all attention (%)")
    ax.text(0.71, 1.05, "dotted: all equal", va="center", transform=ax.transAxes, fontsize=10)
    for x, name, color in ((0.02, "first", VERMILION), (0.18, "heaviest tenth", BLUE), (0.51, "others", SKY)):
        ax.plot(x, 1.05, "s", color=color, ms=8, transform=ax.transAxes, clip_on=False)
        ax.text(x + 0.03, 1.05, name, va="center", transform=ax.transAxes, fontsize=10)


def judge(one: Weights, tokens: Sequence[str], where: str, window: int) -> str:
    """What the first, the newest and the heaviest keys get, and whether few keys would do."""
    listed = ", ".join(f"{tokens[k]!r} (key {k}) {100 * one.mass[k]:.3g} %" for k in one.heaviest[:LISTED])
    flat = np.log2(np.arange(1, len(tokens) + 1)).mean()
    kind = (
        "a sink: most of the weight is parked on the first token" if one.sink > 0.5
        else "local: the newest keys get most" if one.recent > 0.5
        else "heavy hitters: a few keys get most" if one.heavy > 0.5
        else "spread: no few keys would do"
    )  # fmt: skip
    return (
        f"{where}, {kind}. The first token gets {100 * one.sink:.3g} %, the newest {window} keys "
        f"{100 * one.recent:.3g} %, the heaviest tenth of the keys {100 * one.heavy:.3g} %; entropy "
        f"{one.entropy:.3g} bits of {flat:.3g}. Heaviest: {listed}."
    )


def checked(weights: Tensor, tokens: Sequence[str]) -> None:
    """Raises ValueError for what are not the causal weights of these tokens."""
    T = len(tokens)
    if weights.ndim != 4 or weights.shape[2:] != (T, T) or not weights.numel():
        raise ValueError(
            f"attention_map: weights {tuple(weights.shape)} do not fit {T} tokens; "
            f"give (layers, heads, {T}, {T}), one sequence"
        )
    if not FEWEST <= T <= MOST:
        raise ValueError(f"attention_map: {T} tokens; give {FEWEST} to {MOST} so that each can be seen")
    off = (weights.float().sum(-1) - 1).abs().max().item()
    if not off < 0.02:
        raise ValueError(
            f"attention_map: a row of the weights misses a sum of 1 by {off:.3g}; softmax them first"
        )
    if weights.triu(1).any():
        raise ValueError("attention_map: a query attends to later keys; the weights must be causal")


def attention_map(weights: Tensor, tokens: Sequence[str], **options) -> Explorer:
    """Explore attention weights (layers, heads, queries, keys) of one sequence; tokens: their texts.

    float16 will do: `torch.stack([a[0] for a in model(ids, output_attentions=True).attentions]).half()`.
    """
    weights = weights.detach().cpu()
    checked(weights, tokens)
    layers, heads = weights.shape[:2]

    def compute(layer, head, window):
        A = weights[layer].float().mean(0) if head == MEAN else weights[layer, head].float()
        one = weigh(A, window)
        where = f"Layer {layer}, {'the mean of its heads' if head == MEAN else f'head {head}'}"
        return {
            "first_token_share": one.sink,
            "recent_share": one.recent,
            "rest_share": 1 - one.sink - one.recent,
            "heaviest_tenth_share": one.heavy,
            "entropy_bits": one.entropy,
            "says": judge(one, tokens, where, window),
            "weights": (exponents(A), one, window),
        }

    return Explorer(
        compute, draw, name="attention_map", size=(8.6, 3.9), **options,
        layer=W.IntSlider(layers // 2, 0, layers - 1),
        head=W.SelectionSlider(options=[MEAN, *range(heads)], value=0),
        window=W.SelectionSlider(options=WINDOWS, value=16, description="newest keys"),
    )  # fmt: skip
