"""Outlier injector: one weight grows, and all that share its scale pay for it."""

from __future__ import annotations

import functools

import ipywidgets as W
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from lightlib.machine import one_thread
from lightlib.quantization.grid import Int
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.style import BLUE, GREY, HEAT, PALE, bar_rows, panels
from lightlib.widgets.weights import cut, downsampled, groups_of, part_to_show

KINDS = ("per_tensor", "per_channel", "per_group")


def inject(weight: Tensor, outlier: float, row: int, column: int) -> Tensor:
    """`weight` (out, in) with `outlier` standard deviations added to one entry; 0 changes nothing."""
    spoilt = weight.clone()
    spoilt[row, column] += outlier * weight.std()
    return spoilt


def grids(bits: int, group_size: int, symmetric: bool) -> dict[str, Int]:
    """One scale for the whole tensor, one a row, one a group of inputs."""
    kinds = (
        Int(bits, symmetric=symmetric, per_tensor=True),
        Int(bits, symmetric=symmetric),
        Int(bits, group_size, symmetric),
    )
    return dict(zip(KINDS, kinds, strict=True))


def rounding_error(weight: Tensor, grid: Int) -> Tensor:
    """W' - W (out, in)."""
    with one_thread():
        return grid.encode(weight).dense() - weight


def spoilt_errors(
    weight: Tensor, outlier: float, row: int, column: int, kinds: dict[str, Int], without: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The errors with an outlier: where rows have their own scales, only its row differs from `without`."""
    spoilt, errors = inject(weight, outlier, row, column), {}
    for kind, grid in kinds.items():
        if grid.per_tensor:
            errors[kind] = rounding_error(spoilt, grid)
        else:
            errors[kind] = without[kind].clone()
            errors[kind][row] = rounding_error(spoilt[row : row + 1], grid)[0]
    return errors


def error_of_others(
    weight: Tensor, row: int, column: int, with_it: dict[str, Tensor], without: dict[str, Tensor]
) -> dict:
    """||W' - W|| / ||W|| over all weights but the outlier, with it and without it."""

    def length(matrix: Tensor) -> float:
        return (matrix.square().sum() - matrix[row, column] ** 2).clamp_min(0).sqrt().item()

    with one_thread():
        whole, spread = length(weight), weight.std().item()
        error, before = (
            {kind: length(e) / whole for kind, e in errors.items()} for errors in (with_it, without)
        )
        maps = {kind: downsampled(e, 48) / spread for kind, e in with_it.items()}
    times = [f"{error[k] / max(before[k], 1e-12):.2f} {k.replace('_', ' ')}" for k in KINDS]
    return {
        **{f"{kind}_error": e for kind, e in error.items()},
        "says": f"Error of the other weights, with over without the outlier: {', '.join(times)}.",
        "before": before,
        "maps": maps,
    }


def draw(fig: Figure, result: dict) -> None:
    """Bars of the error with and without the outlier; where it lies on each grid, on one colour scale."""
    left, right = panels(fig, (2.1, 3.2), (1.05, 0.45), right=0.2, top=0.35, bottom=0.6)
    names = [kind.replace("_", " ") for kind in KINDS]
    values = [e for kind in KINDS for e in (result[f"{kind}_error"], result["before"][kind])]
    bar_rows(
        left,
        [text for name in names for text in (name, "")],
        values,
        [f"{100 * e:.3g} %" for e in values],
        [BLUE, PALE] * 3,
        rows=(0, 0.8, 2, 2.8, 4, 4.8),
    )
    left.set_xlabel("relative error of the other weights")
    left.set_title("with the outlier", color=BLUE)
    left.set_title("without", color=GREY, loc="right")
    maps = list(result["maps"].values())
    high, wide = maps[0].shape
    gap = np.full((high, max(1, wide // 8)), np.nan)  # nan stays white
    strip = np.concatenate([maps[0], gap, maps[1], gap, maps[2]], 1)
    # three maps as one picture: a third of the axes, and of the time
    right.imshow(strip, cmap=HEAT, vmin=0, vmax=np.nanmax(strip), aspect="auto")
    for i, name in enumerate(names):
        right.text(i * (wide + gap.shape[1]) - 0.5, -0.5, name, va="bottom")
    right.set(
        ylabel="output",
        xlabel=f"input (error: dark 0, bright {np.nanmax(strip):.2g} σ)",
    )
    right.set(xticks=[], yticks=[])
    right.spines[:].set_visible(False)


def outlier_injector(weight: Tensor, **options) -> Explorer:
    """Explore `error_of_others` on `weight` (out, in) or a row of it; of a large matrix, its first rows."""
    weight = weight[None] if weight.ndim == 1 else weight
    part = part_to_show(weight)
    n_out, n_in = part.shape
    sizes = groups_of(n_in) or [n_in]

    @functools.lru_cache(maxsize=4)
    def plain(**grid):
        return {kind: rounding_error(part, one) for kind, one in grids(**grid).items()}

    def compute(outlier, row, column, **grid):
        without = plain(**grid)
        with_it = spoilt_errors(part, outlier, row, column, grids(**grid), without)
        return {**error_of_others(part, row, column, with_it, without), **cut(part, weight)}

    return Explorer(
        compute, draw, name="outlier_injector", size=(8.6, 2.6), **options,
        outlier=W.IntSlider(50, 0, 400, 5, description="outlier (σ)"), bits=W.IntSlider(8, 2, 8),
        row=W.IntSlider(n_out // 3, 0, n_out - 1), column=W.IntSlider(n_in // 2, 0, n_in - 1),
        group_size=W.SelectionSlider(options=sizes, value=64 if 64 in sizes else sizes[-1]),
        symmetric=W.Checkbox(True),
    )  # fmt: skip
