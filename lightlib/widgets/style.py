"""How every figure of the lessons looks: colours that the colour-blind tell apart, sizes, margins."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito 2008, https://jfly.uni-koeln.de/color
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, YELLOW, BLACK = "#56B4E9", "#CC79A7", "#F0E442", "#000000"
GREY, PALE = (
    "#6B6B6B",
    "#D9D9D9",
)  # text and bars that stand back; grey text keeps a contrast of 5 to 1 on white
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW, BLACK)
HEAT = "cividis"  # for maps: the same to the colour-blind, and monotone when printed in grey

DPI = 100
WIDTH = 8.6  # inches: 860 pixels, what a notebook shows beside its file list on a laptop
RC = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so pictures are the same everywhere
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "axes.titlelocation": "left",
    "axes.titley": 1.0,  # otherwise matplotlib measures every label first, an eighth of the time
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "lines.linewidth": 2,
}


def new_figure(size: tuple[float, float] = (WIDTH, 3.0)) -> Figure:
    """A figure of `size` inches that pyplot knows nothing about, so there is nothing to close."""
    return Figure(figsize=size, dpi=DPI)


def panels(
    fig: Figure, widths: Sequence[float], lefts: Sequence[float], *, right=0.15, top=0.35, bottom=0.6
) -> list[Axes]:
    """Axes side by side. `widths`: their shares; `lefts`: inches kept free left of each for its labels."""
    wide, high = fig.get_size_inches()
    unit = (wide - right - sum(lefts)) / sum(widths)  # inches a share
    axes, x = [], 0.0
    for share, left in zip(widths, lefts, strict=True):
        x += left
        axes.append(
            fig.add_axes((x / wide, bottom / high, share * unit / wide, (high - top - bottom) / high))
        )
        x += share * unit
    return axes


def png(fig: Figure) -> bytes:
    """The figure as PNG, quickly: what a moving slider shows. The same bytes on every run."""
    with styled():
        canvas = FigureCanvasAgg(fig)
        canvas.draw()
    picture = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    return encoded(picture.convert("RGB"), compress_level=3)


def small_png(picture: bytes) -> bytes:
    """A PNG with a palette of 256 colours, a third of the bytes: what a saved notebook keeps."""
    full = Image.open(io.BytesIO(picture)).convert("RGB")
    return encoded(full.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE), optimize=True)


def encoded(picture: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


def styled():
    """A context in which new axes have the house style; what is outside keeps its own."""
    return matplotlib.rc_context(RC)


def bar_rows(
    ax: Axes,
    names: Sequence[str],
    values: Sequence[float],
    texts: Sequence[str],
    colors: Sequence[str],
    *,
    bold: int | None = None,
    rows: Sequence[float] | None = None,
    thick: float = 0.76,
    room: float = 1.4,
) -> None:
    """Horizontal bars from the top, a name left and a text right of each; room: axis / longest bar.

    One collection and no ticks: a redraw takes a third of the time that `barh` needs.
    """
    rows = range(len(values)) if rows is None else rows
    reach = room * max(max(values), 1e-12)
    boxes(
        ax, [(0, value, y - thick / 2, y + thick / 2) for y, value in zip(rows, values, strict=True)], colors
    )
    ax.set(xlim=(0, reach), ylim=(max(rows) + 0.6, min(rows) - 0.6))
    ax.xaxis.set_ticks([])
    ax.yaxis.set_visible(False)
    ax.spines["bottom"].set_visible(False)
    gap = 0.05 / ax.get_position().width / ax.figure.get_figwidth() * reach  # 0.05 inches
    for i, (y, value) in enumerate(zip(rows, values, strict=True)):
        weight = "bold" if i == bold else "normal"
        ax.text(-gap, y, names[i], ha="right", va="center", weight=weight, fontsize=10)
        ax.text(value + gap, y, texts[i], va="center", fontsize=10)


def boxes(ax: Axes, corners: Sequence[tuple[float, float, float, float]], colors) -> None:
    """Filled boxes (left, right, low, high) as one collection; the axes' limits are not touched."""
    shapes = [[(l, b), (r, b), (r, t), (l, t)] for l, r, b, t in corners]
    ax.add_collection(PolyCollection(shapes, facecolors=colors, lw=0), autolim=False)
