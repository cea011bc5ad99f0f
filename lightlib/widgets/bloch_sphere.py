"""Bloch sphere: three rotations move one qubit's arrow, and its height is the mean of what is measured.

The order RZ RY RZ is PennyLane's Rot, the gate that a circuit's weights turn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import ipywidgets as W
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightlib.machine import one_thread
from lightlib.quantum.circuit import rotations
from lightlib.report import tidy
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.style import BLACK, BLUE, GREEN, GREY, ORANGE, PALE, PURPLE, SKY, VERMILION, boxes

ZERO, PLUS = "|0>", "|+>"
STARTS = {ZERO: (1.0, 0.0), PLUS: (math.sqrt(0.5), math.sqrt(0.5))}
GATES = ("RZ(phi)", "RY(theta)", "RZ(omega)")
TRAILS = ((GREEN, ":"), (PURPLE, "-"), (SKY, "--"))  # a gate's colour and line
NAMES = (("|+>", ""), ("|+i>", ""), ("|0>", "|1>"))  # of the ends of x, y and z
SHOTS = (1, 10, 100, 1000, 10_000, 100_000)
TURN, TILT = math.radians(30), math.radians(20)  # of the eye: from x towards y, and up
TALL = math.cos(TILT)  # how high the north pole is drawn
SIZE = (8.6, 3.7)
LEFT = -1.4  # of the picture, in radii from the centre
COLUMNS = (2.15, 3.2, 4.25)  # where the bars stand: the chances, <Z>, what the shots gave


def gate(which: int, angles: Tensor) -> Tensor:
    """Gate 0, 1 or 2 of Rot at each of `angles` (m), in radians: (m, 2, 2)."""
    return rotations(angles[:, None] * torch.eye(3, dtype=angles.dtype)[which])


def walk(start: str, angles: Tensor, gates: int) -> Iterator[Tensor]:
    """The states (m, 2) on the way through each of the first `gates` gates; the last one is where it ends."""
    psi = torch.tensor(STARTS[start], dtype=torch.complex128)
    for which in range(gates):
        # no step is wider than 3 degrees
        part = torch.linspace(0, 1, 2 + int(angles[which].abs() / math.radians(3)), dtype=torch.float64)
        states = gate(which, part * angles[which]) @ psi  # (m, 2)
        yield states
        psi = states[-1]


def arrow(states: Tensor) -> Tensor:
    """The Bloch vectors (..., 3) of states (..., 2): (<X>, <Y>, <Z>), all of length 1."""
    a, b = states.unbind(-1)
    across = 2 * a.conj() * b
    return torch.stack([across.real, across.imag, a.abs().square() - b.abs().square()], -1)


def measured(chance: float, shots: int, seed: int) -> float:
    """The mean of Z, +1 for 0 and -1 for 1, over shots of which each gives 0 with this chance."""
    drawn = torch.rand(shots, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 2 * (drawn < chance).double().mean().item() - 1


def standard_error(z: float, shots: int) -> float:
    """How far the mean of so many shots is off on average: 0 at the poles, 1/sqrt(shots) on the equator."""
    return math.sqrt(max(0.0, 1 - z * z) / shots)


def written(number: complex) -> str:
    """A complex number to three places.

    >>> written(-0.25j)
    '0-0.25i'
    """
    real, imaginary = (round(part, 3) + 0.0 for part in (number.real, number.imag))  # + 0.0: no minus zero
    return f"{real:g}{imaginary:+g}i"


# the picture
def seen(points) -> tuple[np.ndarray, np.ndarray]:
    """Where points (..., 3) are drawn (..., 2), and how far in front of the centre (...) they lie."""
    points = np.asarray(points, dtype=float)
    right = (-math.sin(TURN), math.cos(TURN), 0)
    up = (-math.sin(TILT) * math.cos(TURN), -math.sin(TILT) * math.sin(TURN), math.cos(TILT))
    ahead = (math.cos(TILT) * math.cos(TURN), math.cos(TILT) * math.sin(TURN), math.sin(TILT))
    return points @ np.array([right, up]).T, points @ np.array(ahead)


def draw(fig: Figure, result: dict) -> None:
    """The sphere; right of it, on the same scale of heights, the chances, <Z> and what the shots gave."""
    wide, high = SIZE
    ax = fig.add_axes((0, 0, 1, 1))
    unit = high / 2.75  # inches a radius
    ax.set(xlim=(LEFT, LEFT + wide / unit), ylim=(-1.3, 1.45))
    ax.axis("off")
    globe(ax)
    way(ax, result["trail"], result["arrow"])
    bars(ax, result)
    a, b = result["amplitude_of_0"], result["amplitude_of_1"]
    ax.text(1.68, 1.34, f"state: ({a}) |0> + ({b}) |1>", va="center", fontsize=11)


def globe(ax: Axes) -> None:
    """The outline, the equator, the axes and the names of their ends."""
    turn = np.linspace(0, 2 * np.pi, 121)
    ax.fill(np.cos(turn), np.sin(turn), facecolor="#F6F6F6", edgecolor=GREY, lw=1)
    two_sided(ax, np.stack([np.cos(turn), np.sin(turn), 0 * turn], 1), GREY, "-", 0.8)
    for axis, names, far in zip(np.eye(3), NAMES, (1.3, 1.38, 1.2), strict=True):
        ends, _ = seen([axis, -axis])
        ax.plot(*ends.T, color=PALE, lw=1)
        for name, place in zip(names, far * ends, strict=True):
            ax.text(*place, name, ha="center", va="center", fontsize=11)


def two_sided(ax: Axes, points: np.ndarray, color: str, style: str, wide: float) -> None:
    """A line on the sphere, pale where it is behind."""
    places, ahead = seen(points)
    behind, before = places.copy(), places.copy()
    behind[ahead > 0.03], before[ahead < -0.03] = np.nan, np.nan
    ax.plot(*behind.T, color=color, ls=style, lw=wide, alpha=0.35)
    ax.plot(*before.T, color=color, ls=style, lw=wide)


def way(ax: Axes, trail: list[np.ndarray], tip: np.ndarray) -> None:
    """The trail of each gate, the arrow, and its height carried over to the axis."""
    for points, (color, style) in zip(trail, TRAILS, strict=False):
        two_sided(ax, points, color, style, 2.5)
    (foot, head, axis), _ = seen([(tip[0], tip[1], 0), tip, (0, 0, tip[2])])
    ax.plot(*np.stack([head, foot, (0, 0)]).T, color=GREY, lw=0.8, ls=":")
    ax.plot(*np.stack([head, axis]).T, color=BLACK, lw=1, ls=":")
    ax.plot(*axis, "_", color=BLACK, ms=9, mew=2)
    ends = {"shrinkA": 0, "shrinkB": 0, "mutation_scale": 16}
    ax.annotate("", head, (0, 0), arrowprops={"arrowstyle": "-|>", "color": VERMILION, "lw": 3, **ends})
    x, y = LEFT + 0.07, -0.86
    for i, (name, (color, style)) in enumerate(zip(GATES, TRAILS, strict=True)):
        strong = 1 if i < len(trail) else 0.3
        ax.plot([x, x + 0.22], [y - 0.16 * i] * 2, color=color, ls=style, lw=2.5, alpha=strong)
        ax.text(x + 0.28, y - 0.16 * i, name, va="center", fontsize=10, alpha=strong)


def bars(ax: Axes, result: dict) -> None:
    """A bar of height 2, cut at the arrow's height into the two chances; <Z>; the mean of the shots."""
    z, mean, error = result["mean_Z"], result["measured_Z"], result["standard_error"]
    split, exact, by_shots = COLUMNS
    end = by_shots + 0.45
    for level in (-1, 0, 1):
        ax.plot([1.68, end], [TALL * level] * 2, color=PALE, lw=1, zorder=0)
        ax.text(1.6, TALL * level, f"{level:g}", ha="right", va="center", fontsize=10)
    ax.text(1.62, 1.13, "height", ha="right", va="center", fontsize=10)
    boxes(
        ax,
        [(split - 0.3, split + 0.3, -TALL, TALL * z), (split - 0.3, split + 0.3, TALL * z, TALL),
         (exact - 0.3, exact + 0.3, min(0, TALL * z), max(0, TALL * z))],
        [BLUE, ORANGE, VERMILION],
    )  # fmt: skip
    ax.plot([0, end], [TALL * z] * 2, color=BLACK, lw=1, ls=":")
    reach = [TALL * max(mean - error, -1), TALL * min(mean + error, 1)]
    ax.plot([by_shots] * 2, reach, color=BLACK, lw=2)
    ax.plot(by_shots, TALL * mean, "D", color=BLACK, ms=8, mec="white")
    for x, name in ((split, f"P(1) = {result['P1']:.3g}"), (exact, "exact"), (by_shots, "measured")):
        ax.text(x, 1.13, name, ha="center", va="center", fontsize=10)
    shots = result["shots"][0]
    below = (
        f"P(0) = {result['P0']:.3g}",
        f"<Z> = {z:.3g}",
        f"{mean:.3g} in {shots:,} shot{'s' * (shots > 1)}",
    )
    for x, text in zip((split, exact, by_shots), below, strict=True):
        ax.text(x, -1.12, text, ha="center", va="center", fontsize=10)


def verdict(gates: int, start: str, z: float, mean: float, error: float, shots: int) -> str:
    """What the last gate did, and how near the shots came."""
    does = (
        f"The arrow stands at {start}." if not gates
        else f"RZ(phi) gives {ZERO} a phase that no measurement sees." if gates == 1 and start == ZERO
        else "RY(theta) tips the arrow, and <Z> with it." if gates == 2
        else f"{GATES[gates - 1]} turns the arrow about the vertical axis, so <Z> stays."
    )  # fmt: skip
    off = "as at a pole every shot does" if error < 1e-9 else (
        f"off by {tidy(round(abs(mean - z) / error, 2))} times the standard error"
    )  # fmt: skip
    took = f"{shots:,} shots give" if shots > 1 else "One shot gives"
    return f"{does} Its height is <Z> = P(0) - P(1) = {tidy(z)}; {took} {tidy(mean)}, {off}."


def bloch_sphere(**options) -> Explorer:
    """Turn one qubit by RZ(phi), RY(theta), RZ(omega), angles in degrees, and measure it.

    From |0> the arrow ends at (sin theta cos omega, sin theta sin omega, cos theta).

    >>> bloch_sphere().set(theta=60).result["mean_Z"]
    0.5
    """

    def compute(gates, phi, theta, omega, start, shots, seed):
        with one_thread():
            angles = torch.deg2rad(torch.tensor([phi, theta, omega], dtype=torch.float64))
            trail = list(walk(start, angles, gates))
            psi = trail[-1][-1] if trail else torch.tensor(STARTS[start], dtype=torch.complex128)
            x, y, z = (round(part, 9) + 0.0 for part in arrow(psi).tolist())  # + 0.0: no minus zero
            mean, error = measured((1 + z) / 2, shots, seed), standard_error(z, shots)
        a, b = psi.tolist()
        return {
            "amplitude_of_0": written(a),
            "amplitude_of_1": written(b),
            "P0": (1 + z) / 2,
            "P1": (1 - z) / 2,
            "mean_Z": z,
            "measured_Z": mean,
            "standard_error": error,
            "says": verdict(gates, start, z, mean, error, shots),
            "state": psi.numpy(),
            "arrow": np.array([x, y, z]),
            "trail": [arrow(states).numpy() for states in trail],
            "shots": [shots],
        }

    return Explorer(
        compute, draw, name="bloch_sphere", size=SIZE, **options,
        gates=W.SelectionSlider(
            options=[("none", 0), ("RZ", 1), ("RZ, RY", 2), ("RZ, RY, RZ", 3)], value=3,
            description="gates so far",
        ),
        phi=W.IntSlider(40, 0, 360, 5, description="phi (°)"),
        theta=W.IntSlider(60, 0, 360, 5, description="theta (°)"),
        omega=W.IntSlider(70, 0, 360, 5, description="omega (°)"),
        start=W.Dropdown(options=list(STARTS), description="start at"),
        shots=W.SelectionSlider(options=SHOTS, value=100),
        seed=W.IntSlider(0, 0, 20, description="seed of the shots"),
    )  # fmt: skip
