"""Weight-only explorer: bits, group and method against perplexity and bytes, all measured beforehand.

The points come from data/weight_only.json, which data/scan_weight_only.py made on the real model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import ipywidgets as W
from matplotlib.figure import Figure

from lightlib.fetch import data_file
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.plots import plain_logarithm
from lightlib.widgets.style import BLUE, GREEN, GREY, PALE, SKY, VERMILION, bar_rows, panels

METHODS = {"rtn": "RTN", "gptq": "GPTQ", "ordered": "GPTQ act order", "awq": "AWQ"}
COLORS = {"rtn": VERMILION, "gptq": SKY, "ordered": BLUE, "awq": GREEN}
MARKS = {"rtn": "o", "gptq": "s", "ordered": "D", "awq": "^"}
MOST = 150.0  # perplexity; what lies above is drawn at the upper edge


def scan() -> dict:
    """data/weight_only.json: settings, the dense model, and a list of points."""
    return json.loads(data_file("weight_only.json").read_text())


def how(point: Mapping) -> str:
    """The key in METHODS, or "" for a point with other knobs: GPTQ's act order is one with static groups."""
    if point["method"] == "gptq" and point["knobs"] == {"act_order": True, "static_groups": True}:
        return "ordered"
    return "" if point["knobs"] else point["method"]


def kind(point: Mapping) -> str:
    """The kind of grid, in words: "4 bits", or "NF4"."""
    return f"{point['bits']} bits" if point["grid"] == "Int" else point["grid"]


def group(point: Mapping) -> int | str:
    return point["group_size"] or "row"


def title(point: Mapping) -> str:
    """In words: GPTQ, 4 bits, group 64."""
    size = "row" if group(point) == "row" else f"group {group(point)}"
    knobs = METHODS.get(how(point)) or f"{METHODS[point['method']]} {' '.join(point['knobs'])}"
    return f"{knobs}, {kind(point)}, {size}"


def short(point: Mapping) -> str:
    """For a picture: GPTQ 4/64 is the method, the bits or kind of grid, the group; + with knobs."""
    bits = point["bits"] if point["grid"] == "Int" else point["grid"]
    return f"{METHODS[point['method']]}{'+' if point['knobs'] else ''} {bits}/{group(point)}"


def best_of_size(points: list[dict], bits_per_weight: float) -> dict:
    """The point of least perplexity among those that take at most `bits_per_weight`."""
    return min(
        (p for p in points if p["bits_per_weight"] <= bits_per_weight + 1e-6), key=lambda p: p["perplexity"]
    )


def judge(points: list[dict], chosen: dict) -> str:
    """Whether anything measured beats the chosen point at its size."""
    best = best_of_size(points, chosen["bits_per_weight"])
    if best is chosen:
        return "Nothing measured is better at this size or below."
    return (
        f"At this size or below, {title(best)} is better: {best['perplexity']:.2f} "
        f"with {best['bits_per_weight']:.2f} bits a weight."
    )


def draw(fig: Figure, result: dict) -> None:
    """All points, the chosen one marked; the methods on the chosen grid."""
    left, right = panels(fig, (1.9, 1), (0.75, 1.2), right=0.2, top=0.4, bottom=0.6)
    chosen, dense = result["chosen"], result["dense"][0]
    for key, name in METHODS.items():
        mine = [p for p in result["points"] if how(p) == key]
        x, y = [p["bits_per_weight"] for p in mine], [min(p["perplexity"], MOST) for p in mine]
        left.plot(x, y, MARKS[key], ms=6, mec="white", mew=0.5, color=COLORS[key], label=name)
    at = chosen["bits_per_weight"], min(chosen["perplexity"], MOST)
    left.plot(*at, "o", ms=17, mfc="none", mec="black", mew=2)
    left.axhline(dense, color=GREY, lw=1, ls=":")
    left.text(9.4, dense, "dense", ha="right", va="bottom", color=GREY, fontsize=10)
    left.set(yscale="log", ylim=(0.9 * dense, 1.15 * MOST), xlim=(1.8, 9.5))
    left.set(xlabel="bits a weight, scales included", ylabel=f"perplexity (at the edge: over {MOST:.0f})")
    plain_logarithm(left.yaxis)
    left.legend(loc="upper right")

    mates = result["mates"]
    names = [METHODS[how(p)] for p in mates]
    values = [min(p["perplexity"], MOST) - dense for p in mates]
    texts = [f"{p['perplexity']:,.4g}" for p in mates]
    colors = [COLORS[how(p)] if p is chosen else PALE for p in mates]
    bar_rows(right, names, [max(v, 0) for v in values], texts, colors, bold=mates.index(chosen), room=1.9)
    right.set_title(f"{kind(chosen)}, {'row' if group(chosen) == 'row' else f'group {group(chosen)}'}")
    right.set_xlabel(f"above the dense {dense:.2f}")


def weight_only_explorer(found: dict | None = None, **options) -> Explorer:
    """Explore the points of `found`, by default those of data/weight_only.json."""
    found = found or scan()
    points, dense = [p for p in found["points"] if how(p)], found["dense"]["perplexity"]
    kinds = sorted({kind(p) for p in points}, key=lambda k: (not k[0].isdigit(), k))

    def on_offer(controls) -> None:
        """Offer what was measured on the chosen grid; keep what was chosen where it is there."""
        here = [p for p in points if kind(p) == controls["grid"].value]
        offer(controls["group_size"], sorted({group(p) for p in here}, key=lambda g: (g == "row", g)))
        here = [p for p in here if group(p) == controls["group_size"].value]
        offer(controls["method"], [name for m, name in METHODS.items() if any(how(p) == m for p in here)])

    def compute(grid, group_size, method):
        here = [p for p in points if kind(p) == grid and group(p) == group_size]
        mates = sorted(here, key=lambda p: list(METHODS).index(how(p)))
        chosen = next(p for p in mates if METHODS[how(p)] == method)
        return {
            "perplexity": chosen["perplexity"],
            "times_dense": chosen["perplexity"] / dense,
            "bits_per_weight": chosen["bits_per_weight"],
            "linear_layers_bytes": chosen["linear_bytes"],
            "whole_file_bytes": chosen["stored_bytes"],
            "took_s": chosen["seconds"],
            "says": judge(points, chosen),
            "chosen": chosen,
            "mates": mates,
            "points": points,
            "dense": [dense],
        }

    controls = {
        "grid": W.Dropdown(options=kinds, value="4 bits" if "4 bits" in kinds else kinds[0]),
        "group_size": W.Dropdown(options=[64], value=64),
        "method": W.Dropdown(options=["RTN"], value="RTN"),
    }
    on_offer(controls)
    return Explorer(
        compute, draw, name="weight_only_explorer", size=(8.6, 3.4), settle=on_offer, **options, **controls
    )


def offer(control, options: list) -> None:
    """Set a control's options; its value stays where it is still on offer."""
    if list(control.options) != options:
        kept = control.value if control.value in options else 64 if 64 in options else options[0]
        control.options = options
        control.value = kept
