"""Outlier map: the largest input of each channel in every block, and how many channels reach a threshold."""

from __future__ import annotations

from collections.abc import Mapping

import ipywidgets as W
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightlib.widgets.explorer import Explorer
from lightlib.widgets.logarithm import LEAST, exponents, powers_of_ten
from lightlib.widgets.style import BLUE, HEAT, VERMILION, panels

THRESHOLDS = (1, 2, 3, 6, 10, 20, 50, 100)
WIDE = 96  # tiles of the map: four pixels each, so that a single channel is seen


def outliers(maxima: Tensor, block: int, threshold: float) -> dict:
    """Of `maxima` (blocks, in), the largest |x| of each channel: what stands out in one block and in all."""
    profile = maxima[block]
    channel = int(profile.argmax())
    per_block = (maxima >= threshold).sum(1)
    return {
        "largest": profile[channel].item(),
        "its_channel": channel,
        "largest_in": f"{int((maxima.argmax(1) == channel).sum())} of {len(maxima)} blocks",
        "median_channel": profile.median().item(),
        "reach_the_threshold": f"{int(per_block[block])} of {len(profile)}",
        "in_all_blocks": f"{int(per_block.sum())} of {maxima.numel():,}",
    }


def tiles(maxima: Tensor, wide: int = WIDE) -> Tensor:
    """The largest value in each of at most `wide` tiles of channels (blocks, tiles)."""
    return torch.nn.functional.adaptive_max_pool1d(maxima[None], min(wide, maxima.shape[1]))[0]


def ends(maxima: Tensor) -> tuple[float, float]:
    """Where the colour scale begins and ends: at a third of the median channel, and at the largest."""
    return max(maxima.median().item() / 3, LEAST), max(maxima.max().item(), 10 * LEAST)


def draw(fig: Figure, result: dict) -> None:
    """All blocks and channels on one logarithmic colour scale; the profile of the chosen block beside it."""
    left, right = panels(fig, (1.25, 1), (0.6, 0.95), bottom=0.6, right=0.2)
    heat, profile, (block, threshold) = (result[k] for k in ("heat", "profile", "where"))
    (dark, bright), n, channel = result["ends"], len(profile), result["its_channel"]
    dark_end, bright_end = exponents([dark, bright])
    extent = (0, n, len(heat) - 0.5, -0.5)
    left.imshow(heat, cmap=HEAT, aspect="auto", vmin=dark_end, vmax=bright_end, extent=extent)
    left.hlines((block - 0.5, block + 0.5), 0, n, color="white", lw=1)
    left.set(xlabel="input channel", ylabel="block", xticks=[0, n // 2, n])
    left.set_title(f"largest |x| (dark {dark:.2g}, bright {bright:,.4g})")

    right.plot(profile, color=BLUE, lw=1)
    right.axhline(exponents(threshold), color=VERMILION, lw=1.5, zorder=3)
    powers_of_ten(right.yaxis, dark / 3, 4 * max(bright, threshold))
    right.set(xlim=(0, n), xlabel="input channel", ylabel="largest |x|", xticks=[0, n // 2, n])
    late = channel > 0.6 * n
    right.annotate(
        f"{result['largest']:,.4g} (channel {channel})", (channel, profile[channel]), (-5 if late else 5, 2),
        textcoords="offset points", ha="right" if late else "left", fontsize=10,
    )  # fmt: skip
    right.set_title(f"block {block}", color=BLUE)
    right.set_title(f"threshold {threshold}", color=VERMILION, loc="right")


def outlier_map(maxima: Mapping[str, Tensor], **options) -> Explorer:
    """Explore `outliers`. maxima: {what reads the inputs: the largest |x| of each channel (blocks, in)}."""
    kept = {kind: values.detach().float().cpu() for kind, values in maxima.items()}
    if not kept or any(values.ndim != 2 or not values.numel() for values in kept.values()):
        raise ValueError("outlier_map: give {what reads the inputs: largest |x| (blocks, channels)}")
    blocks = sorted({len(values) for values in kept.values()})
    if len(blocks) > 1:
        raise ValueError(f"outlier_map: every kind of layer needs as many blocks; there are {blocks}")
    heats = {kind: exponents(tiles(values)) for kind, values in kept.items()}
    profiles = {kind: exponents(values) for kind, values in kept.items()}

    def compute(layer, block, threshold):
        return {
            **outliers(kept[layer], block, threshold),
            "heat": heats[layer],
            "profile": profiles[layer][block],
            "ends": ends(kept[layer]),
            "where": (block, threshold),
        }

    return Explorer(
        compute, draw, name="outlier_map", size=(8.6, 3.3), **options,
        layer=W.Dropdown(options=list(kept), description="inputs of"),
        block=W.IntSlider(blocks[0] // 2, 0, blocks[0] - 1),
        threshold=W.SelectionSlider(options=THRESHOLDS, value=6),
    )  # fmt: skip
