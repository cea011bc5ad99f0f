"""Group explorer: a real weight matrix on integer grids of any bits, group size and zero point."""

from __future__ import annotations

import functools

import ipywidgets as W
import numpy as np
import torch
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from torch import Tensor

from lightlib.machine import one_thread
from lightlib.quantization.grid import Int
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.style import BLUE, HEAT, PALE, VERMILION, bar_rows, panels
from lightlib.widgets.weights import cut, downsampled, groups_of, part_to_show

BINS = 120
ZEROS = ("none (symmetric)", "integer", "float (minimum)")


def make_grid(bits: int, group_size: int | str, zero: str) -> Int:
    """The grid for the controls' values; group_size: "matrix", "row" or a number of inputs."""
    size = group_size if isinstance(group_size, int) else None
    return Int(
        bits, size, symmetric=zero == ZEROS[0], per_tensor=group_size == "matrix", float_zero=zero == ZEROS[2]
    )


def bits_per_weight(grid: Int, shape: tuple[int, int]) -> float:
    """Codes, 16-bit scales, zero points (`bits` bits, a float 16) over the weights of `shape` (out, in)."""
    groups = 1 if grid.per_tensor else shape[0] * grid.groups(shape[1])
    zero = 0 if grid.symmetric else 16 if grid.float_zero else grid.bits
    return grid.bits + groups * (16 + zero) / (shape[0] * shape[1])


def round_matrix(weight: Tensor, grid: Int) -> dict:
    """`weight` (out, in) on the grid: its error ||W - W'|| / ||W||, its bits, histograms before and after."""
    reach = 4.5 * weight.std(correction=0).item()
    with one_thread():
        rounded = grid.encode(weight).dense()
        error = rounded - weight
        return {
            "relative_error": (error.norm() / weight.norm()).item(),
            "max_error": error.abs().max().item(),
            "bits_per_weight": bits_per_weight(grid, tuple(weight.shape)),
            "smaller_than_16_bits": 16 / bits_per_weight(grid, tuple(weight.shape)),
            "reach": [-reach, reach],
            "before": torch.histc(weight, BINS, -reach, reach).numpy(),
            "after": torch.histc(rounded, BINS, -reach, reach).numpy(),
            "error": downsampled(error),
        }


def draw(fig: Figure, result: dict) -> None:
    """Histogram before and after; where the error lies; error and bits for every group size."""
    left, middle, right = panels(fig, (1.1, 1, 1.15), (0.4, 0.75, 0.75), bottom=0.6)
    before, after, reach = result["before"], result["after"], result["reach"][1]
    edges = np.linspace(-reach, reach, BINS + 1)
    steps = np.repeat(edges, 2)[1:-1]  # both ends of every bin
    filled = [*zip(steps, np.repeat(after, 2), strict=True), (reach, 0), (-reach, 0)]
    left.add_collection(PolyCollection([filled], facecolors=BLUE, lw=0), autolim=False)  # `stairs` is slow
    left.plot(edges[:-1] + reach / BINS, before, color=VERMILION)
    left.set(xlim=(-reach, reach), ylim=(0, 1.05 * max(before.max(), min(after.max(), 3 * before.max()))))
    left.set(xlabel="weight", xticks=[-reach, 0, reach], xticklabels=[f"{-reach:.2g}", "0", f"{reach:.2g}"])
    left.set(ylabel="share", yticks=[])
    left.set_title("before", color=VERMILION)
    left.set_title("after rounding", color=BLUE, loc="right")

    middle.imshow(result["error"], cmap=HEAT, vmin=0, aspect="auto", extent=result["extent"])
    middle.set(title=f"error (bright: {result['error'].max():.2g})", xlabel="input", ylabel="output")
    middle.set(xticks=result["extent"][:2], yticks=result["extent"][2:])

    names, bits, errors = zip(*result["curve"], strict=True)
    here = names.index(*result["size"])
    texts = [f"{100 * e:.3g} %, {b:.2f} bits" for e, b in zip(errors, bits, strict=True)]
    colors = [BLUE if i == here else PALE for i in range(len(names))]
    bar_rows(right, names, errors, texts, colors, bold=here, room=2.2)
    right.set(title="by group size", xlabel="relative error, bits per weight")


def group_explorer(weight: Tensor, **options) -> Explorer:
    """Explore `round_matrix` on `weight` (out, in); of a larger matrix, its first rows."""
    part = part_to_show(weight)
    n_out, n_in = part.shape
    sizes = ["matrix", "row", *groups_of(n_in)]

    @functools.lru_cache(maxsize=512)
    def point(bits, group_size, zero):
        result = round_matrix(part, make_grid(bits, group_size, zero))
        return str(group_size), result["bits_per_weight"], result["relative_error"]

    def compute(bits, group_size, zero):
        curve = [point(bits, size, zero) for size in sizes]
        result = round_matrix(part, make_grid(bits, group_size, zero))
        return {
            **result,
            **cut(part, weight),
            "size": [str(group_size)],
            "curve": curve,
            "extent": (0, n_in, n_out, 0),
        }

    return Explorer(
        compute, draw, name="group_explorer", size=(8.6, 3.1), **options,
        bits=W.IntSlider(4, 2, 8), zero=W.Dropdown(options=ZEROS, value="integer", description="zero point"),
        group_size=W.SelectionSlider(options=sizes, value=64 if 64 in sizes else sizes[-1]),
    )  # fmt: skip
