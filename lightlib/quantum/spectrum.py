"""A circuit is a Fourier series of what is uploaded: its frequencies from theory, its coefficients measured.

Schuld, Sweke, Meyer 2021, arXiv:2008.08605. One x goes to every qubit, times the qubit's scale:
f(x) = <Z_qubit>(scales * x) = sum of c_w exp(iwx). Each upload of an RZ adds -scale, 0 or scale to w.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightlib.quantum.circuit import Circuit, run
from lightlib.quantum.shift import shift_gradients

MOST_FREQUENCIES = 10**6
AMPLITUDES_AT_ONCE = 2**20


@dataclass(frozen=True)
class Spectrum:
    """Whole frequencies (F), ascending, and the complex coefficient (F) of each."""

    frequencies: Tensor
    coefficients: Tensor

    def count(self, tolerance: float = 1e-11) -> int:
        """How many coefficients are larger than the tolerance."""
        return int((self.coefficients.abs() > tolerance).sum())


def exponential_scales(circuit: Circuit) -> Tensor:
    """The scales (qubits) (2 uploads + 1)^j: no two of their sums agree, so the frequencies are the most."""
    return (2.0 * circuit.uploads + 1) ** torch.arange(circuit.qubits, dtype=torch.float64)


def frequencies(circuit: Circuit, scales: Tensor | None = None) -> Tensor:
    """What the uploads offer: the sums (F), ascending, of scale_j k_j, each k_j from -uploads to uploads.

    Without scales 2 qubits uploads + 1 of them; at most (2 uploads + 1)^qubits. Scales are any real numbers.
    A read-out may reach fewer: `light_cone.reached_frequencies`.
    """
    k = torch.arange(-circuit.uploads, circuit.uploads + 1, dtype=torch.float64)
    sums = torch.zeros(1, dtype=torch.float64)
    for scale in checked(circuit, scales):
        within_limit(len(sums) * len(k))
        sums = (sums[:, None] + scale * k).round(decimals=9).unique()
    return sums


@torch.no_grad()
def measured_spectrum(
    circuit: Circuit, weights: Tensor, scales: Tensor | None = None, *, qubit: int = 0, oversample: int = 2
) -> Spectrum:
    """The coefficients of <Z_qubit> by a Fourier transform of samples over one period, in float64.

    For scales that are whole, so that the period is 2 pi. `oversample` times as many samples as the highest
    frequency of theory needs: what is above it must come out as 0.
    """
    if oversample < 1:
        raise ValueError(
            f"oversample={oversample}: with fewer than 1 times the samples frequencies would merge"
        )
    weights = weights.double()
    f = sampled(lambda x: run(circuit, weights, x), circuit, scales, qubit, oversample, weights.device)
    whole = torch.fft.fftfreq(len(f), 1 / len(f), dtype=torch.float64)
    coefficients = torch.fft.fft(f) / len(f)
    return Spectrum(torch.fft.fftshift(whole).round(), torch.fft.fftshift(coefficients))


def free_directions(
    circuit: Circuit, weights: Tensor, scales: Tensor | None = None, *, qubit: int = 0
) -> int:
    """In how many directions the weights can move <Z_qubit> as a function of x: the rank of its derivative.

    F frequencies have F real numbers to set, exponentially many; the rank is at most the number of weights.
    """
    weights = weights.double()

    def derivative(x: Tensor) -> Tensor:
        return shift_gradients(circuit, weights, x)[0]  # (M, n, *weights_shape)

    by_weights = sampled(derivative, circuit, scales, qubit, 1, weights.device).flatten(1)
    return int(torch.linalg.matrix_rank(by_weights, atol=1e-9, rtol=0.0))


def sampled(
    of: Callable[[Tensor], Tensor], circuit: Circuit, scales: Tensor | None, qubit: int, oversample: int,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """The qubit's row of `of` at evenly spaced points (M) of one period, some at a time."""
    check_qubit(circuit, qubit)
    x = period(circuit, scales, oversample).to(device)
    return torch.cat([of(some)[:, qubit] for some in x.split(max(1, AMPLITUDES_AT_ONCE >> circuit.qubits))])


def period(circuit: Circuit, scales: Tensor | None, oversample: int) -> Tensor:
    """The angles (M, qubits) scales * x of evenly spaced x from 0 to 2 pi."""
    steps = whole_scales(circuit, scales)
    points = oversample * width(circuit, steps)
    within_limit(points)
    x = torch.arange(points, dtype=torch.float64) * (2 * math.pi / points)
    return x[:, None] * torch.tensor(steps, dtype=torch.float64)


def check_qubit(circuit: Circuit, qubit: int) -> None:
    """Raise ValueError where the circuit has no such qubit to read."""
    if not 0 <= qubit < circuit.qubits:
        raise ValueError(
            f"qubit={qubit} is none of the circuit's {circuit.qubits}: 0 to {circuit.qubits - 1}"
        )


def checked(circuit: Circuit, scales: Tensor | None) -> list[float]:
    """One scale a qubit; 1 each by default."""
    scales = torch.ones(circuit.qubits) if scales is None else scales.double()
    if scales.shape != (circuit.qubits,):
        raise ValueError(f"scales are {tuple(scales.shape)}, but the circuit has {circuit.qubits} qubits")
    if not scales.isfinite().all():
        raise ValueError(f"scales {scales.tolist()}: give finite numbers")
    return scales.tolist()


def whole_scales(circuit: Circuit, scales: Tensor | None) -> list[int]:
    """The scales, where they are whole, so that f has the period 2 pi."""
    found = checked(circuit, scales)
    if not all(scale.is_integer() for scale in found):
        raise ValueError(f"scales {found} are not whole numbers, so that 2 pi is no period: round them")
    within_limit(width(circuit, found))
    return [int(scale) for scale in found]


def width(circuit: Circuit, scales: list[float]) -> int:
    """How many whole numbers there are from the lowest frequency to the highest."""
    return 2 * circuit.uploads * sum(abs(int(scale)) for scale in scales) + 1


def within_limit(count: int) -> None:
    """Refuse a spectrum that would take too long."""
    if count > MOST_FREQUENCIES:
        raise ValueError(
            f"{count} frequencies are more than {MOST_FREQUENCIES}: fewer qubits or smaller scales"
        )
