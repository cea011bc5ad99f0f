"""Number line: a few weights, the points of an integer grid, and where rounding takes each weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import ipywidgets as W
import numpy as np
import torch
from matplotlib.figure import Figure

from lightlib.quantization.grid import Int
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.style import BLUE, GREY, PALE, VERMILION, panels

EXAMPLE = (-0.92, -0.61, -0.38, -0.3, -0.14, -0.05, 0.02, 0.11, 0.19, 0.33, 0.47, 0.58, 0.74, 1.27)


def round_on_line(weights: Sequence[float], low: float, high: float, bits: int, symmetric: bool) -> dict:
    """Weights rounded to 2^bits points between `low` and `high`; those outside are clipped to the last point.

    With the weights' own smallest and largest values this is `Int(bits).encode`. Its grid always holds zero:
    a `low` above zero or a `high` below it moves there. Symmetric: from -m to m, m the larger in size.
    """
    if not low < high:
        raise ValueError(f"range {low} to {high}: the grid needs a low end below its high end")
    grid, W_ = Int(bits, symmetric=symmetric), torch.tensor([list(weights)], dtype=torch.float32)  # (1, n)
    scale, zero = grid.fit(torch.tensor([[low, high]]))  # the grid of a row with just these ends
    read = grid.read(grid.round_to_codes(W_, scale, zero), scale, zero)[0].numpy()
    codes = torch.arange(1 if symmetric else 0, grid.top + 1)[None]
    points = grid.read(codes, scale, zero)[0].numpy()
    W_ = W_[0].numpy()
    error, step = read - W_, scale.item()
    clipped = (points[0] - W_ > step / 2) | (W_ - points[-1] > step / 2)
    return {
        "scale": step,
        "zero_point": 0 if symmetric else int(zero),
        "grid_points": len(points),
        "max_error": float(np.abs(error).max()),
        "rms_error": float(np.sqrt((error**2).mean())),
        "clipped_weights": int(clipped.sum()),
        "weights": W_,
        "rounded": read,
        "points": points,
        "clipped": clipped,
    }


def draw(fig: Figure, result: dict) -> None:
    """Weights above, grid points below, a line from each weight to its point; the errors under them."""
    W_, Q, points, out = (result[k] for k in ("weights", "rounded", "points", "clipped"))
    (ax,) = panels(fig, (1,), (0.85,), top=0.35, bottom=1.75)
    ax.plot(points, np.zeros_like(points), "|", ms=16, mew=1.4 if len(points) < 70 else 0.7, color=GREY)
    for mask, color in ((~out, BLUE), (out, VERMILION)):
        x = np.stack([W_[mask], Q[mask], np.full(mask.sum(), np.nan)], 1).ravel()  # nan lifts the pen
        y = np.tile([1.0, 0.0, np.nan], mask.sum())
        ax.plot(x, y, color=color, lw=1.3)
        ax.plot(W_[mask], np.ones(mask.sum()), "o", ms=7, color=color)
    ax.axhline(0, color=PALE, lw=1, zorder=0)
    edge = 0.04 * (max(W_.max(), points.max()) - min(W_.min(), points.min()))
    view = min(W_.min(), points.min()) - edge, max(W_.max(), points.max()) + edge
    ax.set(ylim=(-0.35, 1.3), xlim=view)
    ax.set_yticks([0, 1], ["grid", "weights"])
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_visible(False)
    ax.spines["bottom"].set_visible(False)
    outside = f"; orange: {out.sum()} outside the range, clipped" if out.any() else ""
    ax.set_title(f"{len(points)} grid points, {result['scale']:.4g} apart{outside}")

    (below,) = panels(fig, (1,), (0.85,), top=2.4, bottom=0.6)
    half = result["scale"] / 2
    below.axhspan(-half, half, color=PALE, alpha=0.5, lw=0)
    for mask, color in ((~out, BLUE), (out, VERMILION)):
        below.vlines(W_[mask], 0, (Q - W_)[mask], color=color, lw=3)
    reach = 1.15 * max(half, result["max_error"])
    below.set(xlim=view, ylim=(-reach, reach), ylabel="error", xlabel="weight (grey band: ± half a step)")
    below.axhline(0, color=GREY, lw=1)


def number_line(weights: Sequence[float] | torch.Tensor = EXAMPLE, **options) -> Explorer:
    """Explore `round_on_line` on a row of up to 200 `weights`; the range starts at their own ends."""
    row = torch.as_tensor(weights, dtype=torch.float32).flatten()
    if not 1 <= len(row) <= 200 or not torch.isfinite(row).all() or row.abs().max() == 0:
        raise ValueError(f"number_line: give 1 to 200 finite weights that are not all zero, not {len(row)}")
    # ends and limits on whole steps: the browser would move them there, and the picture with them
    digits = 2 - math.floor(math.log10(row.abs().max().item()))
    step = 10.0**-digits
    low = min(math.floor(round(row.min().item() / step, 3)), 0)
    high = max(math.ceil(round(row.max().item() / step, 3)), 0)
    reach = round(1.5 * max(-low, high) + 0.5) * step
    low, high, reach = (round(end, digits) for end in (low * step, high * step, reach))
    shown = f".{max(0, digits)}f"

    def compute(**controls):
        return round_on_line(row.tolist(), **controls)

    return Explorer(
        compute, draw, name="number_line", size=(8.6, 3.9), **options,
        bits=W.IntSlider(3, 2, 8),
        low=W.FloatSlider(low, min=-reach, max=0, step=step, readout_format=shown, description="low end"),
        high=W.FloatSlider(high, min=0, max=reach, step=step, readout_format=shown, description="high end"),
        symmetric=W.Checkbox(False),
    )  # fmt: skip
