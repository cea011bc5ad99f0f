"""AWQ search: stretch a real layer's input channels by magnitude^exponent, and see what rounding costs."""

from __future__ import annotations

import functools

import ipywidgets as W
from matplotlib.figure import Figure
from torch import Tensor

from lightlib.machine import one_thread
from lightlib.quantization.awq import awq_scale, balanced
from lightlib.quantization.grid import Int
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.style import BLUE, GREY, ORANGE, PALE, SKY, VERMILION, bar_rows, panels
from lightlib.widgets.weights import cut, groups_of

STEPS = 20
SALIENT = 0.01  # the share of channels that AWQ's paper calls salient
MOST = 96 * 576  # weights of which twenty roundings fit into a slider's 200 ms


def channel_losses(weight: Tensor, gram: Tensor, grid: Int, scale: Tensor) -> Tensor:
    """||(W - W')X||^2 as a sum over input channels (in,), with W' = round(W s) / s."""
    gone = weight - grid.rounded(weight * scale) / scale
    return (gone @ gram * gone).sum(0)


def search(weight: Tensor, gram: Tensor, grid: Int) -> dict:
    """The relative error of the output at each exponent, and the best of them, as `awq_scale` finds it."""
    magnitude = gram.diagonal().sqrt()
    _, losses = awq_scale([weight], gram, magnitude, [grid], STEPS)
    whole = (weight @ gram * weight).sum().item()
    errors = [(max(loss, 0) / whole) ** 0.5 for loss in losses]
    return {"errors": errors, "best_exponent": errors.index(min(errors)) / STEPS, "whole": whole}


def at_exponent(weight: Tensor, gram: Tensor, grid: Int, exponent: float, whole: float) -> dict:
    """What the scales are, and what the salient and the other channels lose, at one exponent."""
    magnitude = gram.diagonal().sqrt()
    scale = balanced(magnitude, exponent)
    salient = magnitude.topk(max(1, round(SALIENT * len(magnitude)))).indices
    loss = channel_losses(weight, gram, grid, scale) / whole
    return {
        "scale": scale,
        "salient": salient,
        "lost_salient": loss[salient].sum().item(),
        "lost_others": (loss.sum() - loss[salient].sum()).item(),
        "salient_scale": scale[salient].mean().item(),
        "other_scale": ((scale.sum() - scale[salient].sum()) / (len(scale) - len(salient))).item(),
    }


def draw(fig: Figure, result: dict) -> None:
    """The search curve; the scale of each channel; what salient and other channels lose, before and now."""
    left, middle, right = panels(fig, (1.15, 1, 1), (0.7, 0.75, 0.95), right=0.2, top=0.4, bottom=0.6)
    exponents = [step / STEPS for step in range(STEPS)]
    curve = [100 * e for e in result["errors"]]
    left.plot(exponents, curve, color=BLUE, marker="o", ms=3.5)
    best, here = round(result["best_exponent"] * STEPS), result["here"][0]
    left.plot(exponents[best], curve[best], "o", ms=9, mfc="none", mec=BLUE, mew=2)
    left.plot(exponents[here], curve[here], "o", ms=9, color=VERMILION)
    left.axhline(curve[0], color=GREY, lw=1, ls=":")
    left.set(
        xlabel="exponent", ylabel="error of the output (%)", ylim=(0, 1.08 * min(max(curve), 2.5 * curve[0]))
    )
    left.set_title("here", color=VERMILION)
    left.set_title("best: ring", color=BLUE, loc="right")

    x, s, salient = result["magnitude"], result["scale"], result["salient"]
    middle.plot(x, s, ".", ms=3, color=SKY)
    middle.plot(x[salient], s[salient], "o", ms=5, color=ORANGE)
    middle.axhline(1, color=GREY, lw=1, ls=":")
    middle.set(xscale="log", yscale="log", ylim=(0.04, 40), xlabel="typical |x| of the channel")
    middle.set_title("scale of each channel")
    middle.minorticks_off()

    names = [f"{len(salient)} salient", "", "the others", ""]
    values = [max(v, 0) for v in result["losses_before_and_now"]]
    texts = [f"{100 * v:.2g} %" for v in result["losses_before_and_now"]]
    bar_rows(right, names, values, texts, [PALE, ORANGE, PALE, SKY], rows=(0, 0.8, 2, 2.8), room=1.7)
    right.set_title("lost: before (grey), now")
    right.set_xlabel("share of the output's power")


def awq_search(weight: Tensor, gram: Tensor, **options) -> Explorer:
    """Explore AWQ's exponent on the first rows of `weight` (out, in); `gram`: its inputs', mean over tokens.

    >>> awq_search(weight, gram).set(exponent=0.0).result["times_better"]
    1.0
    """
    n_in = weight.shape[1]
    if gram.shape != (n_in, n_in):
        raise ValueError(f"the gram of {n_in} inputs is square, not {tuple(gram.shape)}")
    part = weight[: max(8, MOST // n_in)].detach().float().cpu()
    gram = gram.float().cpu()
    sizes = ["row", *groups_of(n_in)]

    @functools.lru_cache(maxsize=64)
    def curve(bits, group_size):
        with one_thread():
            return search(part, gram, grid_for(bits, group_size))

    def grid_for(bits, group_size):
        return Int(bits, None if group_size == "row" else group_size)

    def compute(exponent, bits, group_size):
        found = curve(bits, group_size)
        with one_thread():
            grid = grid_for(bits, group_size)
            before, now = (at_exponent(part, gram, grid, e, found["whole"]) for e in (0.0, exponent))
        error = found["errors"][round(exponent * STEPS)]
        pairs = [side[key] for key in ("lost_salient", "lost_others") for side in (before, now)]
        return {
            "output_error": error,
            "rtn_error": found["errors"][0],
            "times_better": found["errors"][0] / max(error, 1e-12),
            "best_exponent": found["best_exponent"],
            "salient_scale": now["salient_scale"],
            "other_scale": now["other_scale"],
            **cut(part, weight),
            "errors": found["errors"],
            "here": [round(exponent * STEPS)],
            "magnitude": gram.diagonal().sqrt().numpy(),
            "scale": now["scale"].numpy(),
            "salient": now["salient"].numpy(),
            "losses_before_and_now": pairs,
        }

    return Explorer(
        compute, draw, name="awq_search", size=(8.6, 3.0), **options,
        exponent=W.FloatSlider(0.5, min=0.0, max=(STEPS - 1) / STEPS, step=1 / STEPS),
        bits=W.IntSlider(4, 2, 8),
        group_size=W.SelectionSlider(options=sizes, value=64 if 64 in sizes else sizes[-1]),
    )  # fmt: skip
