"""The exercises of lesson 08."""

from __future__ import annotations

import math

import torch
from torch import Tensor, tensor

from lightlib.exercise_data.exercise import Exercise


def fold_scale(W: Tensor, scale: Tensor) -> Tensor:
    return W * scale


def reader(W: Tensor, Q: Tensor) -> Tensor:
    return W @ Q


def writer(W: Tensor, Q: Tensor) -> Tensor:
    return Q.T @ W


def shortcut(Q1: Tensor, Q2: Tensor, k: int) -> Tensor:
    return Q1[:, :k].T @ Q2[:, :k]


def turned(degrees: float, size: int = 3) -> Tensor:
    """A rotation (size, size) in the plane of the first and the last axis."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    Q = torch.eye(size)
    Q[0, 0], Q[0, -1], Q[-1, 0], Q[-1, -1] = c, -s, s, c
    return Q


W = tensor([[0.9, -0.4, 0.35], [-0.2, 0.75, 0.45], [0.1, 0.3, -0.8]])
SCALE = tensor([2.0, 0.5, -1.0])
Q1, Q2 = turned(30), turned(100) @ tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
RATIO = 2 * 576**2 / 3_538_944  # two whole shortcuts, in block weights
PAYS_FROM = (1 + 2 * RATIO - math.sqrt(1 + 4 * RATIO)) / (2 * RATIO)  # f = RATIO (1 - f)^2

EXERCISES = {
    "08.fold_scale": Exercise(
        "Write fold_scale(W, scale): the weight (out, in) that makes of x / rms(x) what W (out, in) makes of "
        "x / rms(x) * scale, scale (in): the norm's scale moves into the weight.",
        fold_scale,
        cases=((W, SCALE), (W[:2], SCALE)),
        slips=(
            (lambda W, s: W * s[: len(W), None], "that scales the outputs; the scale belongs to the inputs."),
            (lambda W, s: W / s, "the other way round: what the norm no longer multiplies, the weight must."),
            (lambda W, s: W, "then the scale is lost: the norm no longer applies it."),
        ),
        hints=("column j of W meets input j.", "W * scale"),
    ),
    "08.reader": Exercise(
        "Write reader(W, Q): what becomes of a weight W (out, in), y = x W^T, when its input arrives as x Q; "
        "y is to stay as it was.",
        reader,
        cases=((W, Q1), (W[:2], Q2)),
        slips=(
            (lambda W, Q: W @ Q.T, "x Q (W Q^T)^T is x Q Q W^T: turned twice. It must be turned back."),
            (
                lambda W, Q: Q.T[: len(W), : len(W)] @ W,
                "that turns the outputs; here the inputs have turned.",
            ),
            (lambda W, Q: W, "then y = x Q W^T, which is another one."),
        ),
        hints=("x Q Q^T = x, so x W^T = (x Q) (Q^T W^T).", "W @ Q"),
    ),
    "08.writer": Exercise(
        "Write writer(W, Q): what becomes of a weight W (out, in), y = x W^T, whose output is to arrive in "
        "the stream as y Q.",
        writer,
        cases=((W, Q1), (W[:, :2], Q2)),
        slips=(
            (lambda W, Q: Q @ W, "x (Q W)^T is y Q^T: turned the other way."),
            (
                lambda W, Q: W @ Q[: W.shape[1], : W.shape[1]],
                "that is what a reader becomes; this one writes.",
            ),
        ),
        hints=("y Q = x W^T Q = x (Q^T W)^T.", "Q.T @ W"),
    ),
    "08.shortcut": Exercise(
        "Write shortcut(Q1, Q2, k): the matrix (k, k) that takes a residual from the first k directions of "
        "the basis Q1 (d, d) to the first k of Q2: x Q1[:, :k] times it is as near to x Q2[:, :k] as can be.",
        shortcut,
        cases=((Q1, Q2, 2), (Q1, Q2, 3), (Q1, Q1, 2)),
        slips=(
            (lambda Q1, Q2, k: Q2[:, :k].T @ Q1[:, :k], "that leads from the second basis to the first."),
            (lambda Q1, Q2, k: Q1.T @ Q2, "only the first k directions of both are left."),
            (lambda Q1, Q2, k: Q1[:k].T @ Q2[:k], "directions are the columns of Q, not its rows."),
            (
                lambda Q1, Q2, k: torch.eye(k),
                "only if both bases are the same does a residual pass as it is.",
            ),
        ),
        hints=("back to the old stream by Q1^T, then on by Q2.", "Q1[:, :k].T @ Q2[:, :k]"),
    ),
    "08.pays_from": Exercise(
        "A block of SmolLM2-135M has 3,538,944 weights, all of which shrink with the width 576 (1 - f). "
        "Its two shortcuts have (576 (1 - f))^2 weights each. From which fraction f on is the block smaller "
        "than it was?",
        PAYS_FROM,
        slips=(
            (RATIO, "the shortcuts shrink as well: their width is 576 (1 - f)."),
            ((1 + RATIO - math.sqrt(1 + 2 * RATIO)) / RATIO, "there are two shortcuts in a block."),
            (100 * PAYS_FROM, "give a share between 0 and 1."),
        ),
        hints=(
            "f 3,538,944 = 2 (576 (1 - f))^2.",
            "with r = 2 x 576^2 / 3,538,944: f = r (1 - f)^2, a quadratic equation; r = 0.1875.",
        ),
        rtol=5e-3,
    ),
}
