"""Threshold explorer: columns that leave the 8-bit product, what they cost and what they save."""

from __future__ import annotations

import math
from collections.abc import Mapping

import ipywidgets as W
from matplotlib.figure import Figure
from torch import Tensor

from lightlib.machine import one_thread
from lightlib.quantization.int8_linear import Int8Linear
from lightlib.quantization.llm_int8 import outlier_columns
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.logarithm import exponents, powers_of_ten
from lightlib.widgets.style import BLUE, PALE, VERMILION, boxes, panels

THRESHOLDS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 20.0, 50.0, 100.0, 500.0, math.inf)
ACTIVATIONS = {"one a token": "token", "one a tensor": "tensor"}
NONE = 0.3  # where a logarithmic axis shows that no column is kept
TOKENS = 128  # inputs that are multiplied at each threshold


def token_errors(layer: Int8Linear, weight: Tensor, inputs: Tensor) -> tuple[float, float]:
    """(||Y - Y'|| / ||Y|| over all tokens, the median over tokens of the same for one token)."""
    exact = inputs @ weight.T
    gone = (layer(inputs) - exact).norm(dim=1)
    length = exact.norm(dim=1)
    return (gone.norm() / length.norm()).item(), (gone / length.clamp_min(1e-30)).median().item()


class Sweep:
    """A layer with its inputs (tokens, in) and weight (out, in), rounded at every threshold on offer."""

    def __init__(self, inputs: Tensor, weight: Tensor):
        X, self.weight = inputs.detach().float().cpu(), weight.detach().float().cpu()
        if X.ndim != 2 or self.weight.shape[1:] != X.shape[1:]:
            raise ValueError("threshold_explorer: give each layer as (inputs (tokens, in), weight (out, in))")
        self.maxima = X.abs().amax(0)
        with one_thread():
            self.points = {
                kind: [self._point(X[:TOKENS], kind, t) for t in THRESHOLDS] for kind in ACTIVATIONS
            }

    def _point(self, inputs: Tensor, kind: str, threshold: float) -> tuple[int, float, float, float]:
        """(columns kept, error over all tokens, error of the median token, bits a weight)."""
        columns = outlier_columns(self.maxima, threshold)
        layer = Int8Linear(self.weight, activations=ACTIVATIONS[kind], columns=columns)
        errors = token_errors(layer, self.weight, inputs)
        return len(columns), *errors, layer.stored_bits() / self.weight.numel()

    def at(self, threshold: float, kind: str) -> dict:
        """What the explorer shows of one setting."""
        here = THRESHOLDS.index(threshold)
        kept, pooled, median, bits = self.points[kind][here]
        return {
            "columns_in_16_bits": f"{kept} of {len(self.maxima)}",
            "bits_per_weight": bits,
            "error_of_all": pooled,
            "error_of_the_median_token": median,
            "sorted": self.maxima.sort(descending=True).values,
            "points": self.points[kind],
            "where": (here, threshold),
        }


def draw(fig: Figure, result: dict) -> None:
    """The channels by size with the threshold across; the error over the number of columns kept."""
    left, right = panels(fig, (1, 1.1), (0.9, 0.95), bottom=0.6, right=0.3)
    sizes, points, (here, threshold) = (result[k] for k in ("sorted", "points", "where"))
    n, kept = len(sizes), points[here][0]
    low, high = sizes[int(0.98 * n)].item() / 2, 4 * sizes[0].item()
    powers_of_ten(left.xaxis, 0.8, 1.2 * n)
    powers_of_ten(left.yaxis, low, high)
    if kept:
        boxes(left, [(*exponents([0.8, kept + 0.5]), *exponents([low, high]))], PALE)
    left.plot(exponents(range(1, n + 1)), exponents(sizes), color=BLUE)
    left.axhline(exponents(min(threshold, high)), color=VERMILION, lw=1.2)
    left.set(xlabel="input channels by size", ylabel="largest |x|")
    left.set_title(f"{kept} of {n} channels in 16 bits")

    columns = exponents([max(point[0], NONE) for point in points])
    errors = [[100 * max(point[place], 1e-5) for point in points] for place in (1, 2)]
    for error, color in zip(errors, (BLUE, VERMILION), strict=True):
        right.plot(columns, exponents(error), "o-", ms=3, color=color, lw=1.4)
        right.plot(columns[here], exponents(error[here]), "o", ms=9, color=color)
    powers_of_ten(right.yaxis, 0.7 * min(map(min, errors)), 3 * max(map(max, errors)))
    powers_of_ten(right.xaxis, 0.7 * NONE, 1.5 * n, also={NONE: "0"})
    right.set(xlabel="columns in 16 bits", ylabel="error of the output (%)")
    right.set_title("over all tokens", color=BLUE)
    right.set_title("median token", color=VERMILION, loc="right")


def threshold_explorer(layers: Mapping[str, tuple[Tensor, Tensor]], **options) -> Explorer:
    """Explore LLM.int8()'s threshold on {name: (inputs (tokens, in), weight (out, in))}.

    All errors are computed here, so that a slider only draws; of many inputs the first 128 are multiplied.
    """
    if not layers:
        raise ValueError("threshold_explorer: give {name: (inputs, weight)}")
    found = {name: Sweep(*layer) for name, layer in layers.items()}
    offered = [("none" if math.isinf(t) else f"{t:g}", t) for t in THRESHOLDS]

    def compute(layer, scales, threshold):
        return found[layer].at(threshold, scales)

    return Explorer(
        compute, draw, name="threshold_explorer", size=(8.6, 3.0), **options,
        layer=W.Dropdown(options=list(found)),
        scales=W.Dropdown(options=list(ACTIVATIONS), description="input scales"),
        threshold=W.SelectionSlider(options=offered, value=6.0),
    )  # fmt: skip
