"""Pruning explorer: zeros and method against the mask of one layer, its output, and the model's perplexity.

The mask and the layer's error are computed on the weight at hand; the perplexities were measured beforehand,
by data/scan_pruning.py on the whole model (data/pruning.json).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import ipywidgets as W
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from lightlib.fetch import data_file
from lightlib.machine import one_thread
from lightlib.report import relative_error
from lightlib.sparsity.masks import Sparsity, mask_of
from lightlib.sparsity.sparsegpt import sparsegpt_weight
from lightlib.sparsity.wanda import wanda_score
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.plots import plain_logarithm
from lightlib.widgets.style import BLACK, BLUE, GREEN, GREY, HEAT, VERMILION, boxes, panels

METHODS = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}
COLORS = {"magnitude": VERMILION, "wanda": BLUE, "sparsegpt": GREEN}
MARKS = {"magnitude": "o", "wanda": "s", "sparsegpt": "^"}
ROWS, COLUMNS = 32, 64  # the part of the mask that is drawn
PRUNED = 128  # rows that are pruned to measure the error
MOST = 1000.0  # perplexity; what lies above is drawn there


def scan() -> dict:
    """data/pruning.json: settings, the dense model, and a list of points."""
    return json.loads(data_file("pruning.json").read_text())


def pruned(weight: Tensor, gram: Tensor, method: str, sparsity: Sparsity) -> tuple[Tensor, Tensor]:
    """(weight, mask), both (out, in), after one of METHODS with the inputs' `gram` (in, in)."""
    if method == "sparsegpt":
        return sparsegpt_weight(weight, gram, sparsity)
    if method == "magnitude":
        mask = mask_of(weight.abs(), sparsity, "layer")
    else:
        mask = mask_of(wanda_score(weight, gram.diagonal()), sparsity)
    return weight * mask, mask


def share(sparsity: Sparsity) -> str:
    """In words: 50%, or 2:4."""
    return sparsity if isinstance(sparsity, str) else f"{sparsity:.0%}"


def judge(mates: list[Mapping], chosen: Mapping, dense: float) -> str:
    """How the chosen point compares with the other methods at as many zeros."""
    best = min(mates, key=lambda p: p["perplexity"])
    if best is not chosen:
        return f"With as many zeros {METHODS[best['method']]} reaches {best['perplexity']:.4g}."
    if chosen["perplexity"] < 1.1 * dense:
        return "The best of the three here, and within a tenth of the dense model."
    return "The best of the three with as many zeros."


def draw(fig: Figure, result: dict) -> None:
    """A part of the mask, how many weights of each input stay, and all points, the chosen one marked."""
    left, right = panels(fig, (1, 1), (0.6, 0.85), right=0.2, top=0.4)
    x, y, across, up = left.get_position().bounds
    below = fig.add_axes((x, y, across, 0.16 * up))
    left.set_position((x, y + 0.22 * up, across, 0.78 * up))
    cmap = matplotlib.colormaps[HEAT].with_extremes(bad="white")
    left.imshow(
        result["part"], cmap=cmap, aspect="auto", interpolation="nearest", vmin=0, vmax=result["top"][0]
    )
    left.set(xticks=[], yticks=[], ylabel=f"{ROWS} outputs")
    left.set_title(f"what stays, large weights bright ({result['name'][0]})", fontsize=10)
    boxes(below, [(i - 0.45, i + 0.45, 0, 100 * s) for i, s in enumerate(result["stay"])], BLUE)
    below.set(xlim=(-0.5, COLUMNS - 0.5), ylim=(0, 100), xlabel=f"{COLUMNS} inputs", yticks=(0, 100))
    below.set_ylabel("stay (%)", fontsize=9)

    chosen, dense = result["chosen"], result["dense"][0]
    for key, name in METHODS.items():
        mine = [p for p in result["points"] if p["method"] == key]
        free = sorted((p["sparsity"], p["perplexity"]) for p in mine if not isinstance(zeros(p), str))
        x, y = [100 * s for s, _ in free], [min(p, MOST) for _, p in free]
        right.plot(x, y, MARKS[key], ls="-", ms=6, color=COLORS[key], label=name)
    right.axhline(dense, color=GREY, lw=1, ls=":")
    right.text(74, dense, "dense", ha="right", va="bottom", color=GREY, fontsize=10)
    regular = isinstance(zeros(chosen), str)
    at = 100 * chosen["sparsity"], min(chosen["perplexity"], MOST)
    if regular:
        right.plot(*at, MARKS[chosen["method"]], ms=7, mfc="white", mec=COLORS[chosen["method"]])
        right.annotate(zeros(chosen), at, (-26, 4), textcoords="offset points", fontsize=10)
    right.plot(*at, "o", ms=17, mfc="none", mec=BLACK, mew=2)
    right.set(yscale="log", ylim=(0.9 * dense, 1.2 * MOST), xlim=(0, 75))
    right.set(xlabel="zeros (%)", ylabel=f"perplexity (cut at {MOST:.0f})")
    plain_logarithm(right.yaxis)
    right.legend(loc="upper left")


def zeros(point: Mapping) -> Sparsity:
    return point["knobs"]["sparsity"]


def pruning_explorer(weight: Tensor, gram: Tensor, found: dict | None = None, **options) -> Explorer:
    """Prune `weight` (out, in) with its inputs' `gram` (in, in); `found`: by default data/pruning.json.

    Raises ValueError for a weight of less than 32 x 64, or a gram that is not its inputs'.
    """
    if gram.shape != (weight.shape[1],) * 2:
        raise ValueError(f"the gram of {weight.shape[1]} inputs is square, not {tuple(gram.shape)}")
    if weight.shape[0] < ROWS or weight.shape[1] < COLUMNS:
        raise ValueError(f"give a weight of at least {ROWS} x {COLUMNS}, not {tuple(weight.shape)}")
    found = found or scan()
    points = [p for p in found["points"] if p["method"] in METHODS and not p["budget"]]
    dense = found["dense"]["perplexity"]
    rows, inputs = weight[:PRUNED].detach().float().cpu(), gram.detach().float().cpu()
    top = rows[:ROWS, :COLUMNS].abs().quantile(0.98).item()
    settings = sorted({zeros(p) for p in points}, key=lambda s: (isinstance(s, str), s))

    def compute(method, sparsity):
        with one_thread():
            after, mask = pruned(rows, inputs, method, sparsity)
            error = relative_error(rows, after, inputs)
        mates = [p for p in points if zeros(p) == sparsity]
        chosen = next(p for p in mates if p["method"] == method)
        part = np.ma.masked_array(after.abs().numpy(), ~mask.numpy())[:ROWS, :COLUMNS]
        return {
            "perplexity": chosen["perplexity"],
            "times_dense": chosen["perplexity"] / dense,
            "error_of_this_layer_share": error,
            "bits_per_weight": chosen["bits_per_weight"],
            "linear_layers_bytes": chosen["linear_bytes"],
            "says": judge(mates, chosen, dense),
            "part": part,
            "stay": mask[:, :COLUMNS].float().mean(0).numpy(),
            "top": [top],
            "chosen": chosen,
            "name": [f"{METHODS[method]}, {share(sparsity)}"],
            "points": points,
            "dense": [dense],
        }

    return Explorer(
        compute, draw, name="pruning_explorer", size=(8.6, 3.9), **options,
        method=W.Dropdown(options=[(name, key) for key, name in METHODS.items()], value="wanda"),
        sparsity=W.SelectionSlider(options=[(share(s), s) for s in settings], value=0.5, description="zeros"),
    )  # fmt: skip
