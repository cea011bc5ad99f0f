"""One qubit in ten pictures: states, turns, a measurement, and what entangling leaves of an arrow."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from matplotlib.axes import Axes

from lightlib.widgets.bloch_sphere import PLUS, ZERO, arrow, globe, seen, two_sided, walk
from lightlib.widgets.plots import Picture
from lightlib.widgets.style import GREEN, GREY, VERMILION, WIDTH, new_figure, styled

COLUMNS, ROWS = 5, 2
FLAT = math.pi / 2
THIRD = math.pi / 3
HIGH = 5.1  # inches


@dataclass(frozen=True)
class Scene:
    """Where the arrow ends (3), the way there (m, 3), where it may also be (k, 3), and two lines of text."""

    name: str
    below: str
    end: np.ndarray
    way: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))
    ghosts: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))


def turned(name: str, below: str, start: str, phi: float, theta: float, omega: float) -> Scene:
    """A start turned by RZ(phi), RY(theta), RZ(omega)."""
    angles = torch.tensor([phi, theta, omega], dtype=torch.float64)
    way = arrow(torch.cat(list(walk(start, angles, 3)))).numpy()
    return Scene(name, below, way[-1], way)


def entangled(name: str, below: str, theta: float) -> Scene:
    """The arrow of the second qubit, a CNOT behind the first one, which RY(theta) had turned.

    The two are cos(theta/2)|00> + sin(theta/2)|11>: what is left of either arrow is its height, cos(theta).
    """
    return Scene(name, below, np.array([0.0, 0.0, math.cos(theta)]))


def scenes() -> list[Scene]:
    up = np.array([0.0, 0.0, 1.0])
    return [
        Scene("1  |0>", "always measured as 0", up),
        Scene("2  |1>", "always measured as 1", -up),
        turned("3  RY(90°)", "|+>: 0 or 1 by halves", ZERO, 0, FLAT, 0),
        turned("4  RY(60°)", "0 in three of four shots", ZERO, 0, THIRD, 0),
        turned("5  RZ(90°) on |0>", "turns about itself", ZERO, FLAT, 0, 0),
        turned("6  RZ(90°) on |+>", "moves; still by halves", PLUS, FLAT, 0, 0),
        turned("7  RZ, RY, RZ", "reaches every state", ZERO, 0.7, 2.0, 1.2),
        Scene("8  |+> measured", "now at one of the poles", up, ghosts=np.stack([up, -up])),
        entangled("9  CNOT, 60°", "half of the arrow is left", THIRD),
        entangled("10  CNOT, 90°", "nothing of its own is left", FLAT),
    ]


def bloch_pictures() -> Picture:
    """The ten pictures. In the last two the qubit is the second of a pair, whose first one had so much RY.

    >>> bloch_pictures().text.split("; ")[3]
    '4 RY(60°): height 0.5, 0 in three of four shots'
    """
    found = scenes()
    with styled():
        fig = new_figure((WIDTH, HIGH))
        for i, scene in enumerate(found):
            column, row = i % COLUMNS, i // COLUMNS
            ax = fig.add_axes((column / COLUMNS, 1 - (row + 1) / ROWS, 1 / COLUMNS, 1 / ROWS))
            draw(ax, scene)
    said = (
        f"{' '.join(scene.name.split())}: height {round(float(scene.end[2]), 3) + 0.0:g}, {scene.below}"
        for scene in found
    )
    return Picture(fig, "; ".join(said))


def draw(ax: Axes, scene: Scene) -> None:
    """A sphere with its name above and what it says below."""
    wide, high = WIDTH / COLUMNS, HIGH / ROWS
    reach = 1.5
    ax.set(xlim=(-reach, reach), ylim=(-reach * high / wide, reach * high / wide))
    ax.axis("off")
    globe(ax)
    two_sided(ax, scene.way, GREEN, "-", 2)
    ends = {"shrinkA": 0, "shrinkB": 0, "mutation_scale": 12}
    for ghost in scene.ghosts:
        (tip,), _ = seen([ghost])
        ax.annotate("", tip, (0, 0), arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 1.5, **ends})
    (tip,), _ = seen([scene.end])
    if np.linalg.norm(tip) > 1e-6:
        ax.annotate("", tip, (0, 0), arrowprops={"arrowstyle": "-|>", "color": VERMILION, "lw": 2.5, **ends})
    else:
        ax.plot(0, 0, "o", color=VERMILION, ms=6)
    ax.text(0, 1.75, scene.name, ha="center", va="center", fontsize=10, weight="bold")
    ax.text(0, -1.75, scene.below, ha="center", va="center", fontsize=9)
