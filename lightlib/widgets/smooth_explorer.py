"""Smooth explorer: how much of the outliers moves from a layer's inputs to its weights, and what it buys."""

from __future__ import annotations

from collections.abc import Mapping

import ipywidgets as W
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightlib.machine import one_thread
from lightlib.quantization.int8_linear import Int8Linear
from lightlib.quantization.smoothquant import smoothing_scale
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.logarithm import LEAST, exponents, powers_of_ten
from lightlib.widgets.style import BLUE, GREY, PALE, VERMILION, panels

STEPS = 20  # of alpha, between 0 and 1
TOKENS = 128  # inputs that are multiplied at each step
SCHEMES = {
    "one a tensor": {"activations": "tensor", "per_tensor": True},
    "one a token and row": {"activations": "token"},
}


def rounding_error(inputs: Tensor, weights: list[Tensor], scale: Tensor, scheme: str) -> float:
    """||Y - Y'|| / ||Y|| of 8-bit layers with inputs / scale and weights * scale, the mean over `weights`."""
    errors = []
    for weight in weights:
        layer, exact = Int8Linear(weight * scale, **SCHEMES[scheme]), inputs @ weight.T
        errors.append(((layer(inputs / scale) - exact).norm() / exact.norm()).item())
    return sum(errors) / len(errors)


def largest(inputs: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The largest |x| and the largest |w| of each input channel (in,)."""
    return inputs.abs().amax(0), torch.cat(weights).abs().amax(0)


def peak(values: Tensor) -> float:
    """How far the largest channel stands above the one in the middle."""
    return (values.max() / values.median().clamp_min(LEAST)).item()


class Smoothing:
    """A layer's inputs (tokens, in) and its readers' weights (out, in), smoothed by every alpha on offer."""

    def __init__(self, inputs: Tensor, weights: list[Tensor]):
        X, Ws = inputs.detach().float().cpu(), [weight.detach().float().cpu() for weight in weights]
        if X.ndim != 2 or not Ws or any(weight.shape[1:] != X.shape[1:] for weight in Ws):
            raise ValueError("smooth_explorer: give each layer as (inputs (tokens, in), [weights (out, in)])")
        self.maxima, self.columns = largest(X, Ws)
        self.scales = [smoothing_scale(self.maxima, Ws, step / STEPS) for step in range(STEPS + 1)]
        ends = [
            m for s in (self.scales[0] * 0 + 1, *self.scales) for m in (self.maxima / s, self.columns * s)
        ]
        self.reach = min(m.median().item() for m in ends), max(m.max().item() for m in ends)
        few = X[:TOKENS]
        with one_thread():
            none = torch.ones_like(self.maxima)
            self.plain = {scheme: rounding_error(few, Ws, none, scheme) for scheme in SCHEMES}
            self.curves = {
                scheme: [rounding_error(few, Ws, s, scheme) for s in self.scales] for scheme in SCHEMES
            }

    def at(self, alpha: float, scheme: str) -> dict:
        """What the explorer shows of one setting."""
        step, curve, plain = round(alpha * STEPS), self.curves[scheme], self.plain[scheme]
        inputs, weights = self.maxima / self.scales[step], self.columns * self.scales[step]
        best = min(range(STEPS + 1), key=curve.__getitem__)
        return {
            "error": curve[step],
            "unsmoothed_error": plain,
            "best_alpha": best / STEPS,
            "best_error": curve[best],
            "says": f"Largest over median channel: inputs {peak(self.maxima):,.4g} before, "
            f"{peak(inputs):,.4g} now; weights {peak(self.columns):,.4g} before, {peak(weights):,.4g} now.",
            "inputs": (self.maxima, inputs),
            "weights": (self.columns, weights),
            "reach": self.reach,
            "curve": curve,
            "step": [step],
        }


def draw(fig: Figure, result: dict) -> None:
    """Each channel's largest input and weight before and after on one scale; the error over alpha."""
    left, middle, right = panels(fig, (1, 1, 1.1), (0.9, 0.45, 0.75), bottom=0.6, right=0.2)
    low, high = result["reach"]
    for ax, key in ((left, "inputs"), (middle, "weights")):
        before, after = result[key]
        ax.plot(exponents(before), color=PALE, lw=1.6)
        ax.plot(exponents(after), color=BLUE, lw=0.8)
        powers_of_ten(ax.yaxis, low / 10, high * 3)
        ax.set(xlim=(0, len(before)), xticks=[0, len(before) // 2, len(before)], xlabel="input channel")
    left.set(ylabel="largest magnitude", title="|x| (grey: before)")
    middle.set(title="|w| (same scale)")
    middle.yaxis.set_ticklabels([])
    alphas, curve, (step,) = [k / STEPS for k in range(STEPS + 1)], result["curve"], result["step"]
    plain = 100 * result["unsmoothed_error"]
    right.plot(alphas, [100 * e for e in curve], color=BLUE)
    right.plot(alphas[step], 100 * curve[step], "o", ms=9, color=VERMILION)
    right.axhline(plain, color=GREY, lw=1.2, ls="--")
    right.text(0.99, 1.03 * plain, "not smoothed", color=GREY, ha="right", va="bottom", fontsize=10)
    right.set(xlabel="alpha", ylabel="error of the output (%)", xlim=(-0.03, 1.03), xticks=[0, 0.5, 1])
    right.set_ylim(0, 115 * min(max(curve), 2.5 * result["unsmoothed_error"]))
    right.set_title(f"error {100 * curve[step]:.3g} %", color=VERMILION)


def smooth_explorer(layers: Mapping[str, tuple[Tensor, list[Tensor]]], **options) -> Explorer:
    """Explore smoothing on {name: (inputs (tokens, in), weights (out, in) that read them)}.

    All errors are computed here, so that a slider only draws; of many inputs the first 128 are multiplied.
    """
    if not layers:
        raise ValueError("smooth_explorer: give {name: (inputs, [weights])}")
    found = {name: Smoothing(*layer) for name, layer in layers.items()}

    def compute(layer, scales, alpha):
        return found[layer].at(alpha, scales)

    return Explorer(
        compute, draw, name="smooth_explorer", size=(8.6, 3.0), **options,
        layer=W.Dropdown(options=list(found)),
        scales=W.Dropdown(options=list(SCHEMES), description="8-bit scales"),
        alpha=W.FloatSlider(0.5, min=0, max=1, step=1 / STEPS),
    )  # fmt: skip
