"""Layout calculator: what a pruned weight takes in each layout, and from which sparsity on it is smaller."""

from __future__ import annotations

import ipywidgets as W
import numpy as np
from matplotlib.figure import Figure

from lightlib.sparsity.layouts import layout_bits
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.style import BLUE, GREEN, GREY, ORANGE, PALE, VERMILION, bar_rows, panels

NAMES = {"bitmap": "bitmap", "csl": "CSL (tiles)", "csr": "CSR"}
COLORS = {"bitmap": BLUE, "csl": GREEN, "csr": VERMILION, "2:4": ORANGE}
SHAPES = {"576 x 576": (576, 576), "1536 x 576": (1536, 576), "4096 x 4096": (4096, 4096)}
SPARSITIES = np.linspace(0, 0.99, 100)


def bits_a_weight(layout: str, shape: tuple[int, int], sparsity: float, value_bits: int) -> float:
    """Bits that a weight of `shape` (out, in) takes on average, zeros among them."""
    count = shape[0] * shape[1]
    return layout_bits(layout, shape, round(count * (1 - sparsity)), value_bits) / count


def break_even(layout: str, shape: tuple[int, int], value_bits: int) -> float:
    """The least sparsity at which the layout takes no more than the dense weight; 1 if there is none."""
    low, high = 0.0, 1.0
    if bits_a_weight(layout, shape, high, value_bits) > value_bits:
        return 1.0
    for _ in range(30):
        middle = (low + high) / 2
        smaller = bits_a_weight(layout, shape, middle, value_bits) <= value_bits
        low, high = (low, middle) if smaller else (middle, high)
    return high


def draw(fig: Figure, result: dict) -> None:
    """Bits a weight over sparsity with each break-even; all layouts at the chosen sparsity."""
    left, right = panels(fig, (1.5, 1), (0.7, 1.15), right=0.2, top=0.4, bottom=0.6)
    dense, here = result["dense_bits"], 100 * result["share"][0]
    left.axhline(dense, color=GREY, ls=":", lw=1.5)
    left.text(99, dense, "dense", ha="right", va="bottom", color=GREY, fontsize=10)
    for layout, curve in result["curves"].items():
        left.plot(100 * SPARSITIES, curve, color=COLORS[layout], label=NAMES[layout])
        if result["even"][layout] < 1:
            left.plot(100 * result["even"][layout], dense, "o", ms=8, color=COLORS[layout], mec="white")
    left.plot(50, result["regular"][0], "D", ms=8, color=COLORS["2:4"], mec="white", label="2:4")
    left.axvline(here, color=PALE, lw=6, zorder=0)
    left.set(xlim=(0, 100), ylim=(0, 2.1 * dense), xlabel="zeros (%)", ylabel="bits a weight")
    left.set_title("dots: from here on smaller than dense")
    left.legend(loc="upper right", ncols=2)

    rows = result["rows"]
    names, values = ["dense", *(NAMES.get(n, n) for n in rows)], [dense, *rows.values()]
    texts = [f"{v:.2f} bits" for v in values]
    colors = [PALE, *(COLORS[n] for n in rows)]
    bar_rows(right, names, values, texts, colors, bold=values.index(min(values)), room=1.6)
    right.set_title(f"at {here:.0f} % zeros")


def layout_calculator(**options) -> Explorer:
    """Explore `layout_bits`: sparsity, the bits of a value, and the shape (out x in) of the weight."""

    def compute(sparsity, value_bits, shape):
        size, share = SHAPES[shape], sparsity / 100
        curves = {n: [bits_a_weight(n, size, s, value_bits) for s in SPARSITIES] for n in NAMES}
        even = {n: break_even(n, size, value_bits) for n in NAMES}
        rows = {n: bits_a_weight(n, size, share, value_bits) for n in NAMES}
        regular = bits_a_weight("2:4", size, 0.5, value_bits)
        if sparsity == 50:
            rows["2:4"] = regular
        best = min(rows, key=rows.get)
        says = "No layout is smaller than dense: telling the places costs more than the zeros save."
        if rows[best] < value_bits:
            says = (
                f"Smallest: {NAMES.get(best, best)}, {value_bits / rows[best]:.2f} times smaller than dense."
            )
        return {
            "dense_bits": value_bits,
            "bitmap_bits": rows["bitmap"],
            "csl_bits": rows["csl"],
            "csr_bits": rows["csr"],
            "bitmap_pays_from_share": even["bitmap"],
            "csl_pays_from_share": even["csl"],
            "csr_pays_from_share": even["csr"],
            "says": says,
            "curves": curves,
            "even": even,
            "rows": rows,
            "regular": [regular],
            "share": [share],
        }

    return Explorer(
        compute, draw, name="layout_calculator", size=(8.6, 3.3), **options,
        sparsity=W.IntSlider(50, 0, 99, description="zeros (%)"),
        value_bits=W.SelectionSlider(options=[4, 8, 16, 32], value=16, description="bits a value"),
        shape=W.Dropdown(options=list(SHAPES), value="1536 x 576", description="weight"),
    )  # fmt: skip
