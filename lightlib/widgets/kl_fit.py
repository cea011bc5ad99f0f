"""KL fit: one Gaussian for two humps; forward KL covers both, reverse KL takes one, JSD lies between."""

from __future__ import annotations

import ipywidgets as W
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightlib.distillation.toy import (
    DIVERGENCES,
    FORWARD,
    JSD,
    REVERSE,
    Fit,
    Humps,
    divergence,
    fit,
    gaussian,
    integrand,
    line,
)
from lightlib.machine import one_thread
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.style import BLACK, BLUE, GREEN, PALE, VERMILION, panels

COLORS = {FORWARD: BLUE, REVERSE: VERMILION, JSD: GREEN}
DASHES = {FORWARD: "-.", REVERSE: "--", JSD: ":"}  # two that agree are both seen
POINTWISE, OVER_MEAN = "what each point adds", "divergence over the mean"
SHOWN = 8.0  # of the line, to both sides
TICKS = [-8, -4, 0, 4, 8]
MEANS = torch.linspace(-SHOWN, SHOWN, 97, dtype=torch.float64)


def within(target: Humps, found: Fit) -> float:
    """The share of the target within two standard deviations of the fit's mean."""
    x = line()
    inside = (x - found.mean).abs() <= 2 * found.sd
    return (target.log_density(x).exp()[inside].sum() * (x[1] - x[0])).item()


def verdict(kind: str, found: Fit, target: Humps, covered: float) -> str:
    """What the fit made of the two humps, in a sentence."""
    hit = [abs(mean - found.mean) <= 2 * found.sd for mean in target.means]
    sits = {
        (True, True): "covers both humps",
        (True, False): "takes the left hump and leaves the right one",
        (False, True): "takes the right hump and leaves the left one",
        (False, False): "sits between the humps and reaches the middle of neither",
    }[tuple(hit)]
    return (
        f"{kind} {sits}: within two of its standard deviations lie {100 * covered:.0f} % of the target, and "
        f"{100 * found.outside_share:.2g} % of the fit lies where the target has next to nothing."
    )


def draw(fig: Figure, result: dict) -> None:
    """The target and the three fits; on the right where one divergence comes from, or where it is least."""
    left, right = panels(fig, (1.35, 1), (0.65, 0.85), right=0.2, top=0.4, bottom=0.6)
    x, target, chosen, fits = result["x"], result["target"], result["chosen"][0], result["fits"]
    p = target.log_density(x).exp()
    left.fill_between(x, p, color=PALE, lw=0)
    left.plot(x, p, color=BLACK, lw=1.2, label="target")
    high = p.max().item()
    for kind, found in fits.items():
        q = density(x, found)
        high = max(high, q.max().item())
        wide, dashes = (3, "-") if kind == chosen else (1.5, DASHES[kind])
        left.plot(x, q, color=COLORS[kind], lw=wide, ls=dashes, label=kind)
    left.set(xlim=(-SHOWN, SHOWN), xticks=TICKS, ylim=(0, 1.32 * high), ylabel="density", xlabel="x")
    left.set_title("one Gaussian for two humps")
    left.legend(loc="upper center", ncols=4, columnspacing=1.2, handlelength=1.4)
    (pointwise if result["view"][0] == POINTWISE else over_mean)(right, result)


def density(x: torch.Tensor, found: Fit) -> torch.Tensor:
    return gaussian(x, torch.tensor(found.mean), torch.tensor(found.sd)).exp()


def pointwise(ax: Axes, result: dict) -> None:
    x, chosen, found = result["x"], result["chosen"][0], result["fits"][result["chosen"][0]]
    log_q = gaussian(x, torch.tensor(found.mean), torch.tensor(found.sd))
    adds = integrand(result["target"].log_density(x), log_q, chosen, result["beta"][0])
    ax.fill_between(x, adds, color=COLORS[chosen], alpha=0.35, lw=0)
    ax.plot(x, adds, color=COLORS[chosen], lw=1.5)
    ax.axhline(0, color=BLACK, lw=0.8)
    ax.set(xlim=(-SHOWN, SHOWN), xticks=TICKS, xlabel="x", ylabel="nats a unit of x")
    ax.set_title(f"area: {found.divergence:.3g} nats", color=COLORS[chosen])


def over_mean(ax: Axes, result: dict) -> None:
    chosen, found, values = result["chosen"][0], result["fits"][result["chosen"][0]], result["over_mean"]
    ax.plot(MEANS, values, color=COLORS[chosen])
    ax.plot(found.mean, found.divergence, "o", ms=9, color=COLORS[chosen], mec="white")
    reach = values[MEANS.abs() <= result["target"].means[1] + 2]
    ax.set(xlim=(-SHOWN, SHOWN), ylim=(0, 1.15 * reach.max().item() + 1e-3))
    ax.set(xticks=TICKS, xlabel="mean", ylabel="nats")
    ax.set_title(f"at its sd of {found.sd:.3g}", color=COLORS[chosen])


def kl_fit(**options) -> Explorer:
    """Fit one Gaussian to two humps under three divergences; move, widen and weigh the humps."""

    def compute(**controls):
        with one_thread():
            return fitted(**controls)

    return Explorer(
        compute, draw, name="kl_fit", size=(8.6, 3.3), **options,
        presets={
            "two equal humps, apart": dict(distance=7.0, left_weight=0.5, left_width=1.0, right_width=1.0),
            "one is narrow": dict(distance=5.0, left_weight=0.5, left_width=0.4, right_width=1.5),
            "one is small": dict(distance=6.0, left_weight=0.8, left_width=1.0, right_width=0.6),
            "nearly one": dict(distance=2.0, left_weight=0.5, left_width=1.0, right_width=1.0),
        },
        divergence=W.Dropdown(options=list(DIVERGENCES), value=REVERSE),
        beta=W.FloatSlider(0.5, min=0.05, max=0.95, step=0.05, description="beta of JSD"),
        view=W.Dropdown(options=[POINTWISE, OVER_MEAN], description="on the right"),
        distance=W.FloatSlider(7.0, min=0, max=9, step=0.25),
        left_weight=W.FloatSlider(0.5, min=0.05, max=0.95, step=0.05),
        left_width=W.FloatSlider(1.0, min=0.4, max=1.6, step=0.1),
        right_width=W.FloatSlider(1.0, min=0.4, max=1.6, step=0.1),
    )  # fmt: skip


def fitted(divergence, beta, view, distance, left_weight, left_width, right_width) -> dict:
    """What the explorer shows of one setting."""
    kind, half = divergence, distance / 2
    target = Humps((-half, half), (left_width, right_width), left_weight)
    fits = {one: fit(target, one, beta) for one in DIVERGENCES}
    found, covered = fits[kind], within(target, fits[kind])
    return {
        "mean": found.mean,
        "sd": found.sd,
        "nats": found.divergence,
        "target_within_two_sd_share": covered,
        "outside_share": found.outside_share,
        "says": verdict(kind, found, target, covered),
        "target": target,
        "fits": fits,
        "chosen": [kind],
        "beta": [beta],
        "view": [view],
        "x": line(),
        "over_mean": along(target, found.sd, kind, beta) if view == OVER_MEAN else None,
    }


def along(target: Humps, sd: float, kind: str, beta: float) -> torch.Tensor:
    """The divergence of Gaussians of one width at each of MEANS."""
    return divergence(target, MEANS, torch.full_like(MEANS, sd), kind, beta)
