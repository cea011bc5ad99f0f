"""SVD picture: a grey picture from its first r singular vectors, what that stores and what it loses."""

from __future__ import annotations

import ipywidgets as W
import numpy as np
from matplotlib import cbook
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from lightlib.lowrank.ranks import stored
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.logarithm import exponents, powers_of_ten
from lightlib.widgets.style import BLUE, GREY, HEAT, PALE, VERMILION, panels

TOP, LEFT, SIDE = 30, 60, 384  # of the sample picture: the square that is shown, in pixels


def portrait() -> np.ndarray:
    """Grace Hopper (192, 192), grey from 0 to 1: a square of matplotlib's sample picture at half its size."""
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as sample:
        grey = np.asarray(sample.convert("L"), dtype=float) / 255
    square = grey[TOP : TOP + SIDE, LEFT : LEFT + SIDE]
    return square.reshape(SIDE // 2, 2, SIDE // 2, 2).mean((1, 3))


def break_even(m: int, n: int) -> float:
    """The rank at which two factors (m, r) and (r, n) take as many numbers as the matrix (m, n).

    >>> break_even(192, 192)
    96.0
    """
    return m * n / (m + n)


def rebuilt(factors: tuple[np.ndarray, np.ndarray, np.ndarray], rank: int) -> np.ndarray:
    """The best matrix of `rank`, from `factors` as `numpy.linalg.svd` gives them."""
    U, S, V = factors
    return (U[:, :rank] * S[:rank]) @ V[:rank]


def draw(fig: Figure, result: dict) -> None:
    """The picture, the picture of rank r, their difference; the singular values and where they are cut."""
    axes = panels(fig, (1.92, 1.92, 1.92, 1.54), (0.08, 0.12, 0.12, 0.78), right=0.2, top=0.4, bottom=0.6)
    picture, made, rank = result["picture"], result["rebuilt"], result["rank"][0]
    gap = abs(picture - made)
    bright = np.quantile(gap, 0.995)
    shades = {"vmin": picture.min(), "vmax": picture.max(), "cmap": "gray"}
    whole, kept = (f"{result[name]:,} numbers" for name in ("numbers_of_the_picture", "numbers_stored"))
    for ax, shown, title, below, look in (
        (axes[0], picture, "the picture", whole, shades),
        (axes[1], made, f"rank {rank}", kept, shades),
        (
            axes[2],
            gap,
            "|difference|",
            f"bright: {bright:.2g} or more",
            {"vmin": 0, "vmax": bright, "cmap": HEAT},
        ),
    ):
        ax.imshow(shown, interpolation="nearest", **look)
        ax.axis("off")
        ax.set_title(title, fontsize=10)
        ax.text(0, -0.04, below, transform=ax.transAxes, va="top", fontsize=10)
    spectrum(axes[3], result)


def spectrum(ax: Axes, result: dict) -> None:
    """Singular values on a logarithmic axis: kept left of the line; dotted: where two factors break even."""
    values, rank, even = result["values"], result["rank"][0], result["breaks_even_at_rank"]
    order = np.arange(1, len(values) + 1)
    powers_of_ten(ax.yaxis, max(values[-1], values[0] * 1e-4) / 2, 2 * values[0])
    ax.axvspan(rank, len(values), color=PALE, alpha=0.5, lw=0)
    ax.plot(order, exponents(values), color=BLUE)
    ax.axvline(rank, color=VERMILION, lw=1.5)
    ax.axvline(even, color=GREY, ls=":", lw=1.5)
    ax.set(xlim=(0, len(values)), xlabel="rank (grey: cut)", ylabel="singular value")
    ax.set_xticks([0, len(values) // 2, len(values)])
    ax.set_title("dotted: break-even", fontsize=10)


def svd_picture(picture: np.ndarray | None = None, **options) -> Explorer:
    """Explore a grey `picture` (m, n), by default a portrait, rebuilt at rank r: numbers stored, error.

    >>> svd_picture().set(rank=96).result["numbers_stored"]
    36864
    """
    A = portrait() if picture is None else np.asarray(picture, dtype=float)
    if A.ndim != 2 or min(A.shape) < 2 or not np.isfinite(A).all() or not A.any():
        raise ValueError(f"svd_picture: give a matrix (m, n) of finite numbers, not all zero, not {A.shape}")
    m, n = A.shape
    factors = np.linalg.svd(A, full_matrices=False)
    values, even = factors[1], break_even(m, n)
    energy = values**2 / (values**2).sum()

    def compute(rank):
        made, numbers = rebuilt(factors, rank), stored((m, n), rank, pivot=False)
        error = float(np.linalg.norm(A - made) / np.linalg.norm(A))
        left_out = float(energy[rank:].sum())
        saves = f"{m * n / numbers:.3g} times fewer" if numbers < m * n else "which saves nothing"
        return {
            "numbers_stored": numbers,
            "with_pivots": stored((m, n), rank, pivot=True),
            "numbers_of_the_picture": m * n,
            "stored_share": numbers / (m * n),
            "breaks_even_at_rank": even,
            "relative_error": round(error, 12),  # beyond lies the rounding of float64
            "tail_of_the_energy": round(left_out, 12),
            "says": f"Rank {rank} stores {rank} x ({m} + {n}) = {numbers:,} numbers instead of {m} x {n} = "
            f"{m * n:,}, {saves}; it pays below rank {even:.4g}. The error, {100 * error:.3g} % of the "
            f"picture's length, is the root of what the singular values left out hold: "
            f"{100 * left_out:.3g} % of the energy.",
            "picture": A,
            "rebuilt": made,
            "values": values,
            "rank": [rank],
        }

    return Explorer(
        compute, draw, name="svd_picture", size=(8.6, 2.92), **options,
        rank=W.IntSlider(min(20, len(values)), 1, len(values)),
    )  # fmt: skip
