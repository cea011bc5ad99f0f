"""The exercises of lesson 20."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from lightlib.exercise_data.exercise import Exercise


@dataclass(frozen=True)
class Measured:
    """<Z> over an angle, constant + cosine cos(theta) + sine sin(theta), to the third decimal as of shots."""

    constant: float
    cosine: float
    sine: float

    def __call__(self, theta: float) -> float:
        return round(self.constant + self.cosine * math.cos(theta) + self.sine * math.sin(theta), 3)


def rotate(theta: float) -> tuple[float, float]:
    return math.cos(theta / 2), math.sin(theta / 2)


def mean_z(a: complex, b: complex) -> float:
    return abs(a) ** 2 - abs(b) ** 2


def frequencies(scales: tuple[int, ...], L: int) -> int:
    sums = {0}
    for scale in scales:
        sums = {s + scale * k for s in sums for k in range(-L, L + 1)}
    return len(sums)


def multiples(scales: tuple[int, ...], L: int) -> int:
    """Without the differences that subtract."""
    return len(
        {sum(picked) for picked in itertools.product(*([s * k for k in range(L + 1)] for s in scales))}
    )


def derivative(f: Callable[[float], float], theta: float) -> float:
    return (f(theta + math.pi / 2) - f(theta - math.pi / 2)) / 2


def state_bytes(qubits: int, points: int) -> int:
    return points * 2**qubits * 8


EXERCISES = {
    "20.rotate": Exercise(
        "Write rotate(theta): the two amplitudes, real numbers, of RY(theta)|0>.",
        rotate,
        cases=((1.0,), (math.pi,), (-2.0,), (5.0,)),
        slips=(
            (lambda t: (math.cos(t), math.sin(t)), "the amplitudes turn by half the angle of the arrow."),
            (
                lambda t: (math.cos(t / 2) ** 2, math.sin(t / 2) ** 2),
                "those are the chances; an amplitude is what is squared.",
            ),
            (lambda t: (math.sin(t / 2), math.cos(t / 2)), "the amplitude of |0> comes first."),
            (
                lambda t: (math.cos(t / 2), -math.sin(t / 2)),
                "that turns the other way: RY has -sin(theta / 2) above its diagonal and |0> takes the first "
                "column.",
            ),
        ),
        hints=(
            "at theta = pi the arrow points down: the state is |1>, its amplitudes 0 and 1.",
            "math.cos(theta / 2), math.sin(theta / 2)",
        ),
    ),
    "20.expectation": Exercise(
        "Write mean_z(a, b): <Z> of the state a|0> + b|1>, of length 1, whose amplitudes are complex.",
        mean_z,
        cases=((0.48 + 0.64j, 0.6), (0.5 + 0.5j, 0.5 - 0.5j), (-0.96j, 0.28), (1.0, 0.0)),
        slips=(
            (lambda a, b: abs(a) ** 2, "that is P(0), the chance to measure 0; <Z> lies between -1 and 1."),
            (lambda a, b: abs(b) ** 2 - abs(a) ** 2, "the sign is wrong: |0> is measured as +1."),
            (lambda a, b: abs(a) ** 2 + abs(b) ** 2, "the chances sum up to 1 in every state."),
            (lambda a, b: abs(a) - abs(b), "a chance is the square of an amplitude's size."),
            (
                lambda a, b: (a * a - b * b).real,
                "the square of a complex number may be negative; a chance is the square of its size.",
            ),
        ),
        hints=("Z is +1 with chance P(0) and -1 with chance P(1).", "abs(a) ** 2 - abs(b) ** 2"),
    ),
    "20.frequencies": Exercise(
        "Write frequencies(scales, L): how many frequencies L uploads of x offer, on each qubit j times "
        "scales[j], whole numbers: the different sums of scales[j] * k_j, each k_j from -L to L.",
        frequencies,
        cases=(((1, 1, 6), 1), ((1, 1, 1), 2), ((1, 5, 25), 2), ((2,), 3)),
        slips=(
            (lambda scales, L: 2 * len(scales) * L + 1, "right where all scales are 1."),
            (
                lambda scales, L: (2 * L + 1) ** len(scales),
                "right where no two sums agree, as with scales (2L + 1)^j; here some do.",
            ),
            (
                lambda scales, L: 2 * L * sum(scales) + 1,
                "those are all whole numbers up to the highest; some may be the sum of nothing.",
            ),
            (multiples, "each k_j also goes below 0."),
        ),
        hints=(
            "a set keeps equal sums once.",
            "begin with {0}; for each scale {s + scale * k for s in sums for k in range(-L, L + 1)}.",
        ),
    ),
    "20.shift": Exercise(
        "Write derivative(f, theta): df/dtheta from two values of f, which runs a circuit and is measured to "
        "three decimals; theta is the angle of one rotation.",
        derivative,
        cases=(
            (Measured(0.1, 0.5, 0.3), 2.0),
            (Measured(0.0, 1.0, 0.0), math.pi / 2),
            (Measured(-0.2, 0.3, -0.6), -0.4),
        ),
        slips=(
            (
                lambda f, t: f(t + math.pi / 2) - f(t - math.pi / 2),
                "twice too large: the two runs differ by twice the derivative.",
            ),
            (
                lambda f, t: (f(t + math.pi / 2) - f(t - math.pi / 2)) / math.pi,
                "that is the slope of the chord; a sine's own slope is half the difference.",
            ),
            (lambda f, t: (f(t - math.pi / 2) - f(t + math.pi / 2)) / 2, "the sign is wrong."),
            (
                lambda f, t: (f(t + math.pi) - f(t - math.pi)) / 2,
                "both runs are the same there, a whole turn apart; shift by a quarter turn.",
            ),
            (
                lambda f, t: (f(t + 1e-3) - f(t - 1e-3)) / 2e-3,
                "over a small step the rounding of what is measured is all that is left; shift by a quarter "
                "turn.",
            ),
        ),
        hints=(
            "the derivative of cos is what cos is a quarter turn further on; so is that of sin.",
            "(f(theta + math.pi / 2) - f(theta - math.pi / 2)) / 2",
        ),
        rtol=0.01,
    ),
    "20.state_bytes": Exercise(
        "Write state_bytes(qubits, points): how many bytes the states of so many points take in a simulator, "
        "in complex64.",
        state_bytes,
        cases=((8, 1024), (3, 1), (20, 16)),
        slips=(
            (lambda n, points: points * 2 * n * 8, "n qubits have 2^n amplitudes, not 2 n."),
            (lambda n, points: points * 2**n * 4, "complex64 is two numbers of 4 bytes."),
            (lambda n, points: points * 2**n * 16, "that is complex128."),
            (lambda n, points: points * 2**n, "those are the amplitudes; how many bytes has each?"),
            (lambda n, points: 2**n * 8, "every point has a state of its own."),
            (lambda n, points: points * 4**n * 8, "that is a density matrix; a state is one column."),
        ),
        hints=("an amplitude for each way to set n bits.", "points * 2**qubits * 8"),
    ),
}
