"""Loss bowl: two weights, the loss around their optimum, and what it costs to put one of them to zero."""

from __future__ import annotations

import ipywidgets as W
import numpy as np
from matplotlib.figure import Figure

from lightlib.widgets.explorer import Explorer
from lightlib.widgets.style import BLACK, BLUE, GREEN, GREY, PALE, VERMILION, panels

REACH = 2.2  # weights shown: from -REACH to REACH
COLORS = {"damage": VERMILION, "surgeon": GREEN}
CIRCLE = np.stack([np.cos(np.linspace(0, 2 * np.pi, 121)), np.sin(np.linspace(0, 2 * np.pi, 121))])


def hessian(curvature: float, correlation: float) -> np.ndarray:
    """H (2, 2): weight 2 is `curvature` times as steep as weight 1, their inputs correlate."""
    across = correlation * np.sqrt(curvature)
    return np.array([[1.0, across], [across, curvature]])


def loss(H: np.ndarray, optimum: np.ndarray, point: np.ndarray) -> float:
    """How much the loss grows from the optimum to `point`: half of d^T H d."""
    d = point - optimum
    return float(0.5 * d @ H @ d)


def pruned(H: np.ndarray, optimum: np.ndarray, which: int) -> dict[str, np.ndarray]:
    """Where weight `which` ends at zero: "damage" leaves the other, "surgeon" moves it to its best."""
    stay = optimum.copy()
    stay[which] = 0.0
    inverse = np.linalg.inv(H)
    best = optimum - optimum[which] / inverse[which, which] * inverse[:, which]
    return {"damage": stay, "surgeon": best}


def draw(fig: Figure, result: dict) -> None:
    """The bowl from above with the ways to zero, and the loss along the line where the weight is zero."""
    left, right = panels(fig, (1, 1.25), (0.75, 0.95), right=0.2, top=0.4, bottom=0.6)
    H, optimum, which, ends = result["H"], result["optimum"], result["which"][0], result["ends"]
    values, vectors = np.linalg.eigh(H)
    for level in (0.05, 0.2, 0.5, 1.0, 2.0, 4.0):
        ring = optimum[:, None] + vectors @ (np.sqrt(2 * level / values)[:, None] * CIRCLE)
        left.plot(*ring, color=PALE, lw=1.2)
    (left.axvline if which == 0 else left.axhline)(0, color=GREY, lw=1.2)
    left.plot(*optimum, "o", color=BLACK, ms=7)
    left.annotate("trained", optimum, (6, 6), textcoords="offset points", fontsize=10)
    for name, color in COLORS.items():
        left.plot(*zip(optimum, ends[name], strict=True), color=color)
        left.plot(*ends[name], "s", color=color, ms=6)
    left.plot(*zip(optimum, result["landing"], strict=True), color=BLUE, ls="--")
    left.plot(*result["landing"], "D", color=BLUE, ms=8, mec="white")
    left.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), xlabel="weight 1", ylabel="weight 2")
    left.set_title("loss from above")

    other = 1 - which
    t = np.linspace(-REACH, REACH, 121)
    points = np.zeros((121, 2))
    points[:, other] = t
    right.plot(t, [loss(H, optimum, p) for p in points], color=GREY)
    for name, color in COLORS.items():
        right.plot(ends[name][other], result[f"{name}_loss"], "s", color=color, ms=8, label=name)
    right.plot(result["landing"][other], result["your_loss"], "D", color=BLUE, ms=8, label="you")
    high = max(3 * result["damage_loss"], 1.2 * result["your_loss"], 0.05)
    right.set(
        xlim=(-REACH, REACH), ylim=(-0.04 * high, high), xlabel=f"weight {other + 1}", ylabel="loss added"
    )
    right.set_title(f"along weight {which + 1} = 0")
    right.legend(loc="upper center", ncols=3)


def loss_bowl(**options) -> Explorer:
    """Prune one of two weights, and drag the other to where the loss grows least."""

    def compute(prune, other, weight_1, weight_2, curvature, correlation):
        H, optimum = hessian(curvature, correlation), np.array([weight_1, weight_2])
        which = 0 if prune == "weight 1" else 1
        ends = pruned(H, optimum, which)
        landing = np.zeros(2)
        landing[1 - which] = other
        costs = {name: loss(H, optimum, point) for name, point in ends.items()}
        rest = pruned(H, optimum, 1 - which)
        cheaper = loss(H, optimum, rest["surgeon"]) < costs["surgeon"] - 1e-9
        return {
            "your_loss": loss(H, optimum, landing),
            "damage_loss": costs["damage"],
            "surgeon_loss": costs["surgeon"],
            "best_place": ends["surgeon"][1 - which],
            "says": f"Pruning weight {2 - which} instead would cost less."
            if cheaper
            else f"Weight {which + 1} is the right one to prune.",
            "H": H,
            "optimum": optimum,
            "which": [which],
            "ends": ends,
            "landing": landing,
        }

    return Explorer(
        compute, draw, name="loss_bowl", size=(8.6, 3.6), **options,
        prune=W.Dropdown(options=["weight 1", "weight 2"], value="weight 1"),
        other=W.FloatSlider(1.6, min=-2, max=2, step=0.1, description="other to"),
        weight_1=W.FloatSlider(0.8, min=-1.5, max=1.5, step=0.1, description="weight 1"),
        weight_2=W.FloatSlider(1.2, min=-1.5, max=1.5, step=0.1, description="weight 2"),
        curvature=W.FloatSlider(1.5, min=0.2, max=4, step=0.1),
        correlation=W.FloatSlider(-0.6, min=-0.9, max=0.9, step=0.1),
    )  # fmt: skip
