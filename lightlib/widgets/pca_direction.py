"""PCA by hand: turn a direction, see what a cloud of points keeps along it and what lies across."""

from __future__ import annotations

import math

import ipywidgets as W
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from lightlib.lowrank.pca import pca
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.style import BLACK, BLUE, GREEN, GREY, PALE, VERMILION, panels

ANGLES = np.arange(-90.0, 91.0)
X_SHOWN, Y_SHOWN = (-4.6, 2.3), (-2.3, 3.7)  # as wide to high as the panel, so that angles are true


def cloud() -> np.ndarray:
    """48 fixed points (points, 2): correlated, and their mean is not the origin."""
    drawn = np.random.default_rng(9).standard_normal((48, 2)) * [1.5, 0.5]
    turn = np.deg2rad(32)
    axes = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return drawn @ axes + [-0.7, 1.1]


def direction(degrees: float) -> np.ndarray:
    """The unit vector (2,) that lies `degrees` above the first axis."""
    return np.array([np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))])


def kept(points: np.ndarray, degrees) -> np.ndarray:
    """Of the points' squared distances from the origin, the share that lies along each of `degrees`."""
    along = points @ direction(np.asarray(degrees))
    return (along**2).sum(0) / (points**2).sum()


def best_angle(points: np.ndarray, center: bool) -> float:
    """Where the first direction of `pca` looks, from -90 to 90 degrees."""
    x, y = pca(torch.from_numpy(points), 1, center=center).directions[0].tolist()
    return (math.degrees(math.atan2(y, x)) + 90) % 180 - 90


def apart(a: float, b: float) -> float:
    """Degrees between two directions, of which each is the same as its opposite.

    >>> apart(-80, 85)
    15
    """
    return min(abs(a - b) % 180, 180 - abs(a - b) % 180)


def draw(fig: Figure, result: dict) -> None:
    """The points with their feet on the chosen direction; what every direction keeps."""
    left, right = panels(fig, (1, 1.35), (0.7, 0.95), right=0.25, top=0.42, bottom=0.6)
    scatter(left, result)
    best, angle = result["best_angle"], result["angle"][0]
    share, most = result["kept_percent"], result["best_keeps_percent"]
    right.fill_between(ANGLES, result["curve"], 100, color=PALE, alpha=0.5, lw=0)
    right.plot(ANGLES, result["curve"], color=BLUE)
    right.axvline(best, color=GREEN, ls="--", lw=1.5)
    right.plot(best, most, "s", color=GREEN, ms=8, mec="white")
    right.plot([angle, angle], [share, 100], color=VERMILION, lw=1.5)
    right.plot(angle, share, "o", color=VERMILION, ms=9, mec="white", clip_on=False)
    right.set(xlim=(-90, 90), ylim=(0, 104), xlabel="angle of the direction (°)", ylabel="kept along it (%)")
    right.set_xticks(range(-90, 91, 30))
    right.set_title("blue: kept; grey above: lost; green: best by PCA", fontsize=10)


def scatter(ax: Axes, result: dict) -> None:
    points, center = result["points"], result["center"]
    way, best = direction(result["angle"][0]), direction(result["best_angle"])
    feet = center + np.outer((points - center) @ way, way)
    ax.add_collection(LineCollection(np.stack([points, feet], 1), colors=GREY, lw=0.8), autolim=False)
    for one, color, style in ((best, GREEN, "--"), (way, VERMILION, "-")):
        ax.plot(*np.stack([center - 9 * one, center + 9 * one], 1), style, color=color, lw=1.5)
    ax.plot(*points.T, "o", color=BLUE, ms=5)
    ax.plot(*feet.T, "o", color=VERMILION, ms=3.5)
    ax.plot(*center, "P", color=BLACK, ms=8, mec="white")
    ax.set(xlim=X_SHOWN, ylim=Y_SHOWN, xlabel="value 1", ylabel="value 2")
    ax.set_title("red: what is kept; grey: lost", fontsize=10)


def pca_direction(**options) -> Explorer:
    """Turn a direction through a cloud of points, measured from their mean or from the origin.

    >>> pca_direction().set(angle=33).result["best_keeps_percent"] >= pca_direction().result["kept_percent"]
    True
    """
    points = cloud()
    mean = points.mean(0)

    def compute(angle, center):
        middle = mean if center else np.zeros(2)
        moved = points - middle
        share, best = float(kept(moved, angle)), best_angle(points, center)
        most, off = float(kept(moved, best)), apart(angle, best)
        what = "variance" if center else "squared distance from the origin"
        verdict = "to the degree, no direction keeps more" if off <= 0.5 else f"you are {off:.3g}° away"
        lead = "" if center else "With the mean left in, the best direction is drawn towards it. "
        return {
            "kept_percent": 100 * share,
            "lost_percent": 100 * (1 - share),
            "best_angle": best,
            "best_keeps_percent": 100 * most,
            "degrees_away": off,
            "says": f"{lead}At {angle}° {100 * share:.3g} % of the {what} is kept and "
            f"{100 * (1 - share):.3g} % lost; the best direction, {best:.3g}°, "
            f"keeps {100 * most:.3g} %: {verdict}.",
            "points": points,
            "center": middle,
            "angle": [angle],
            "curve": 100 * kept(moved, ANGLES),
        }

    return Explorer(
        compute, draw, name="pca_direction", size=(8.6, 3.5), **options,
        angle=W.IntSlider(-10, -90, 90, description="angle (°)"),
        center=W.Checkbox(True, description="take the mean out", indent=True),
    )  # fmt: skip
