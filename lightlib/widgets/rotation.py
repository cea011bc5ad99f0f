"""Rotation explorer: points turned by Q, normed, and turned back by Q^T; which norms let Q through."""

from __future__ import annotations

import functools

import ipywidgets as W
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightlib.widgets.explorer import Explorer
from lightlib.widgets.style import BLACK, BLUE, PALE, VERMILION, panels

SCALE = np.array([2.0, 0.5])
EPS = 1e-9  # as every norm has, so that a point of which the mean is all has a norm too
POINTS = np.array([[1.9, 0.5], [0.5, 1.3], [-0.9, 0.75], [-1.4, -1.1], [0.35, -0.6]])
MARKS = "os^Dv"  # a shape for each point
AROUND = np.linspace(0, 2 * np.pi, 360)  # directions, none of them a diagonal
CIRCLE = np.stack([np.cos(AROUND), np.sin(AROUND)], 1)


def rms_norm(x: np.ndarray) -> np.ndarray:
    """x / sqrt(mean of x^2) along the last axis: of two values, a point on the circle of radius sqrt(2)."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)


def scaled_rms_norm(x: np.ndarray) -> np.ndarray:
    """RMSNorm, then each value by its own SCALE: the circle becomes an ellipse along the axes."""
    return SCALE * rms_norm(x)


def layer_norm(x: np.ndarray) -> np.ndarray:
    """RMSNorm of x without its mean: of two values only (1, -1) or (-1, 1) is left."""
    return rms_norm(x - x.mean(-1, keepdims=True))


NORMS = {"RMSNorm": rms_norm, "RMSNorm with scale": scaled_rms_norm, "LayerNorm": layer_norm}
WHY = {
    "RMSNorm": "RMSNorm divides by the length, which no rotation changes: Q goes in, and Q^T takes it out.",
    "RMSNorm with scale": "The scale stretches along the axes, and Q has turned them; moved into the weights "
    "that read it, it stands in no rotation's way.",
    "LayerNorm": "LayerNorm takes away what lies along (1, 1), before the turn as after it; where what "
    "writes to the stream is centred beforehand, it has nothing to take, and is an RMSNorm.",
}


def rotation(degrees: float) -> np.ndarray:
    """Q (2, 2), orthogonal: x Q is x turned by so many degrees, counterclockwise."""
    a = np.deg2rad(degrees)
    return np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])


def gaps(norm: str, degrees: float, x: np.ndarray = POINTS) -> np.ndarray:
    """How far norm(xQ) Q^T is from norm(x) (points, 2)."""
    Q, f = rotation(degrees), NORMS[norm]
    return f(x @ Q) @ Q.T - f(x)


def largest(differences: np.ndarray) -> float:
    """The longest of them, to twelve digits: beyond lies the rounding of float64."""
    return round(float(np.linalg.norm(differences, axis=-1).max()), 12)


@functools.cache
def largest_anywhere(norm: str) -> float:
    """The largest distance at any whole angle."""
    return max(largest(gaps(norm, degrees)) for degrees in range(-180, 180))


def draw(fig: Figure, result: dict) -> None:
    """The points and the turned ones; both normed; what was turned back, on what was never turned."""
    axes = panels(fig, (1, 1, 1), (0.65, 0.62, 0.62), right=0.12, top=0.4, bottom=0.58)
    f, Q = NORMS[result["norm"][0]], result["Q"]
    plain, turned, back = f(POINTS), f(POINTS @ Q), f(POINTS @ Q) @ Q.T
    ring = f(CIRCLE)
    for ax, first, second, reach in (
        (axes[0], POINTS, POINTS @ Q, 2.4),
        (axes[1], plain, turned, 3.1),
        (axes[2], plain, back, 3.1),
    ):
        points(ax, first, second)
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach), xlabel="value 1")
        ax.set_yticks([-2, 0, 2])
        ax.set_xticks([-2, 0, 2])
    axes[0].set(ylabel="value 2")
    axes[1].plot(*ring.T, color=PALE, zorder=0)
    axes[2].plot(*ring.T, color=PALE, zorder=0)
    axes[2].plot(*(ring @ Q.T).T, color=PALE, ls=":", zorder=0)
    apart = np.linalg.norm(back - plain, axis=1) > 1e-3
    if apart.any():
        start, way = plain[apart], (back - plain)[apart]
        axes[2].quiver(
            *start.T, *way.T, color=BLACK, angles="xy", scale_units="xy", scale=1, width=0.009, zorder=3
        )
    for ax, title in zip(axes, ("x", "norm(x)", "norm(x)"), strict=True):
        ax.set_title(title, color=BLUE)
    for ax, title in zip(axes, ("xQ", "norm(xQ)", "norm(xQ) Q^T"), strict=True):
        ax.set_title(title, color=VERMILION, loc="right")


def points(ax: Axes, first: np.ndarray, second: np.ndarray) -> None:
    """`first` (points, 2) filled, `second` as larger rings; a point keeps its shape."""
    for mark, one, other in zip(MARKS, first, second, strict=True):
        ax.plot(*one, mark, color=BLUE, ms=7)
        ax.plot(*other, mark, color=VERMILION, mfc="none", ms=11, mew=1.6)


def rotation_explorer(**options) -> Explorer:
    """Turn five points by an angle, norm them, turn them back: does what comes out depend on the angle?

    >>> rotation_explorer().set(angle=77).result["largest_distance"]
    0.0
    """

    def compute(norm, angle):
        distance = largest(gaps(norm, angle))
        anywhere, says = largest_anywhere(norm), WHY[norm]
        if anywhere and not distance:
            says = (
                "No turn and half a turn change signs at most; at other angles norm(xQ) Q^T is not norm(x)."
            )
        return {
            "largest_distance": distance,
            "largest_at_any_angle": anywhere,
            "says": says,
            "norm": [norm],
            "Q": rotation(angle),
        }

    return Explorer(
        compute, draw, name="rotation_explorer", size=(8.6, 3.18), **options,
        norm=W.Dropdown(options=list(NORMS), value="RMSNorm"),
        angle=W.IntSlider(40, -180, 180, description="angle (°)"),
    )  # fmt: skip
