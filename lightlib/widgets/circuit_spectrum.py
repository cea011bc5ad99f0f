"""Circuit spectrum: what a circuit makes of x, and the frequencies that this function has, of those offered.

Schuld, Sweke, Meyer 2021, arXiv:2008.08605
"""

from __future__ import annotations

import math

import ipywidgets as W
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightlib.machine import one_thread
from lightlib.quantum.circuit import ENTANGLERS, Circuit, run
from lightlib.quantum.spectrum import Spectrum, exponential_scales, frequencies, measured_spectrum
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.style import BLUE, PALE, VERMILION, boxes, panels

ALL_ONE, EXPONENTIAL = "all 1", "(2L + 1)^j"
BLOCKS = 2  # of rotations and a ring in each parameter layer, as QIREN has
CYCLES = 64  # that are drawn at most
ABSENT = 1e-11  # coefficients up to here are rounding
READ = 0  # the qubit that is measured
PI_TICKS = {1: ("0", "π", "2π"), 2: ("0", "π/2", "π")}


def weights_of(circuit: Circuit, seed: int) -> Tensor:
    """Angles of weights_shape, uniform from 0 to 2 pi, as QIREN begins with."""
    drawn = torch.rand(
        circuit.weights_shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return 2 * math.pi * drawn


def curve(circuit: Circuit, weights: Tensor, scales: Tensor, highest: int) -> tuple[Tensor, Tensor, int]:
    """x (m), <Z> (m) and how many times what is drawn goes into the period: 1, or so that it can be seen."""
    parts = 2 ** max(0, math.ceil(math.log2(highest / CYCLES)))
    points = 1 + max(240, 16 * highest // parts)
    x = torch.linspace(0, 2 * math.pi / parts, points, dtype=torch.float64)
    return x, run(circuit, weights, x[:, None] * scales)[:, READ], parts


def present(spectrum: Spectrum, offered: Tensor) -> np.ndarray:
    """The size of the coefficient of each frequency of theory (F); 0 where it is absent."""
    middle = len(spectrum.frequencies) // 2  # where the frequency 0 stands
    sizes = spectrum.coefficients.abs()[offered.long() + middle].numpy()
    return np.where(sizes > ABSENT, sizes, 0.0)


def reason(circuit: Circuit) -> str:
    """Why a read-out of one of these circuits misses frequencies."""
    if circuit.entangler == "none":
        return "Without entanglers qubit 0 sees its own uploads alone."
    ring = "the ring" if circuit.qubits == 2 else "the second ring"
    return (
        f"The pitfall of {circuit.qubits} qubits: {ring} of CZs meets each pair twice, and a CZ twice is no "
        "gate; take 3 qubits or CNOT."
    )


def verdict(circuit: Circuit, scales: str, offered: int, measured: int, angles: int) -> str:
    """Theory and measurement in one line, what is missing, and what the frequencies do not promise."""
    n, L = circuit.qubits, circuit.uploads
    law = f"2 x {n} x {L} + 1" if scales == ALL_ONE else f"{2 * L + 1}^{n}"
    said = f"The uploads offer {law} = {offered:,} frequencies; <Z> of qubit 0 has "
    said += f"{measured:,} of them." if measured < offered else "them all."
    if measured < offered and (circuit.entangler == "none" or n in (2, 4)):
        said += " " + reason(circuit)
    if measured > angles:
        said += f" They are not free: {angles} angles set {measured:,} numbers."
    return said


# the picture
def draw(fig: Figure, result: dict) -> None:
    """<Z> over x; the size of every coefficient over its frequency, and red what is offered but absent."""
    left, right = panels(fig, (1, 1.25), (0.75, 1.0), right=0.2, top=0.4, bottom=0.6)
    x, f, parts = result["curve"]
    left.plot(x, f, color=BLUE, lw=1.5 if parts == 1 else 1)
    left.axhline(0, color=PALE, lw=1, zorder=0)
    end = 2 * math.pi / parts
    ends = PI_TICKS.get(parts, ("0", f"π/{parts}", f"2π/{parts}"))
    left.set_xticks([0, end / 2, end], ends)
    part = "one period" if parts == 1 else f"1/{parts} of the period"
    left.set(xlim=(0, end), ylim=(-1.05, 1.05), yticks=[-1, 0, 1], xlabel=f"x (radians), {part}")
    left.set_ylabel("<Z> of qubit 0")
    left.set_title("the circuit as a function of x")
    bars(right, result)


def bars(ax: Axes, result: dict) -> None:
    places, sizes = result["frequencies"], result["sizes"]
    # logarithms on plain axes: they are drawn in a third of the time
    floor = math.floor(np.log10(sizes[sizes > 0].min())) - 1
    top, reach = 0.15, places[-1] + 0.6
    wide = max(0.36, reach / 330)  # a pixel or two at least
    heights = np.log10(np.maximum(sizes, 10.0**floor))
    here = [(w - wide, w + wide, floor, h) for w, h, c in zip(places, heights, sizes, strict=True) if c]
    gone = [(w - wide, w + wide, floor, floor + 0.06 * (top - floor)) for w in places[sizes == 0]]
    boxes(ax, here + gone, [BLUE] * len(here) + [VERMILION] * len(gone))
    powers = range(floor + 1, 1, max(1, math.ceil(-floor / 5)))
    ax.set_yticks(list(powers), [f"{10.0**e:g}" for e in powers])
    ax.set(xlim=(-reach, reach), ylim=(floor, top), xlabel="frequency (cycles a period)")
    highest = int(places[-1])
    step = 1 if highest < 4 else 2 if highest < 10 else highest
    ax.set_xticks(range(-highest // step * step, highest + 1, step))
    ax.set_ylabel("size of its coefficient")
    ax.set_title(f"measured: {result['measured']:,} of {result['offered']:,} offered")
    if gone:
        ax.text(1, 1.04, "red: absent", color=VERMILION, ha="right", transform=ax.transAxes, fontsize=10)


def circuit_spectrum(**options) -> Explorer:
    """Explore <Z> of a circuit's first qubit as a Fourier series of x, which goes, scaled, to every qubit.

    >>> circuit_spectrum().set(qubits=4, uploads=2, entangler="CZ").result["measured"]
    13
    """

    def compute(qubits, uploads, scales, entangler, seed):
        circuit = Circuit(qubits, uploads, BLOCKS, entangler)
        by = torch.ones(qubits, dtype=torch.float64) if scales == ALL_ONE else exponential_scales(circuit)
        with one_thread():
            weights, offered = weights_of(circuit, seed), frequencies(circuit, by)
            spectrum = measured_spectrum(circuit, weights, by, qubit=READ)
            sizes = present(spectrum, offered)
            drawn = curve(circuit, weights, by, int(offered[-1]))
        found = spectrum.count(ABSENT)
        return {
            "offered": len(offered),
            "measured": found,
            "highest_offered": int(offered[-1]),
            "angles": weights.numel(),
            "largest_coefficient": sizes.max().item(),
            "says": verdict(circuit, scales, len(offered), found, weights.numel()),
            "frequencies": offered.numpy(),
            "sizes": sizes,
            "curve": drawn,
        }

    pitfall = {"entangler": "CZ", "uploads": 2}
    return Explorer(
        compute, draw, name="circuit_spectrum", size=(8.6, 3.3), **options,
        presets={
            "one qubit": {"qubits": 1, "uploads": 1, "scales": ALL_ONE, "entangler": "none"},
            "three qubits": {"qubits": 3, "scales": ALL_ONE, **pitfall},
            "three qubits, scaled": {"qubits": 3, "scales": EXPONENTIAL, **pitfall},
            "pitfall: two qubits": {"qubits": 2, "scales": ALL_ONE, **pitfall, "uploads": 1},
            "pitfall: four qubits": {"qubits": 4, "scales": ALL_ONE, **pitfall},
            "four qubits by CNOT": {"qubits": 4, "scales": ALL_ONE, **pitfall, "entangler": "CNOT"},
        },
        qubits=W.IntSlider(3, 1, 4),
        uploads=W.IntSlider(2, 1, 3, description="uploads L"),
        scales=W.Dropdown(options=[ALL_ONE, EXPONENTIAL], description="scales of x"),
        entangler=W.Dropdown(options=list(ENTANGLERS)),
        seed=W.IntSlider(0, 0, 20, description="seed of the angles"),
    )  # fmt: skip
