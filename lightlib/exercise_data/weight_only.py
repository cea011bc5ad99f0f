"""The exercises of lesson 03."""

import torch
from torch import Tensor, tensor

from lightlib.exercise_data.exercise import Exercise


def output_error(W: Tensor, W2: Tensor, gram: Tensor) -> Tensor:
    D = W - W2
    return ((D @ gram * D).sum() / (W @ gram * W).sum()).sqrt()


def compensate(w: Tensor, q: float, gram: Tensor) -> Tensor:
    return w[1:] + (w[0] - q) * torch.linalg.solve(gram[1:, 1:], gram[1:, 0])


def channel_scale(magnitude: Tensor, exponent: float) -> Tensor:
    scale = magnitude**exponent
    return scale / (scale.max() * scale.min()).sqrt()


def scaled_rounding(W: Tensor, s: Tensor, step: float) -> Tensor:
    return (W * s / step).round() * step / s


W = tensor([[0.9, -0.4, 0.35], [-0.2, 0.75, 0.45]])
ROUNDED = tensor([[1.0, -0.5, 0.5], [0.0, 1.0, 0.5]])
GRAM = tensor([[4.0, 2.5, 1.0], [2.5, 3.0, 1.5], [1.0, 1.5, 2.0]])
UNRELATED = tensor([3.0, 1.0, 0.5]).diag()
MAGNITUDE = tensor([0.1, 0.3, 0.2, 4.0, 0.25])
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)

EXERCISES = {
    "03.output_error": Exercise(
        "Write output_error(W, W2, gram): ||(W - W2)X|| / ||WX||, from the inputs' gram X^T X alone.",
        output_error,
        cases=((W, ROUNDED, GRAM), (W, ROUNDED, UNRELATED), (W, W * 0.5, GRAM)),
        slips=(
            (
                lambda W, V, G: (W - V).norm() / W.norm(),
                "that is the error of the weights; the gram says how strong each input is.",
            ),
            (
                lambda W, V, G: ((W - V) @ G * (W - V)).sum() / (W @ G * W).sum(),
                "that is the square of it: take the root.",
            ),
            (
                lambda W, V, G: ((W - V) @ G * (W - V)).sum().sqrt(),
                "divide by ||WX||, the same for W itself.",
            ),
            (
                lambda W, V, G: ((W - V) @ G).norm() / (W @ G).norm(),
                "the gram is X^T X, not X: (W - W2) stands on both sides of it.",
            ),
            (
                lambda W, V, G: (((W - V) ** 2 * G.diagonal()).sum() / (W**2 * G.diagonal()).sum()).sqrt(),
                "the gram's diagonal is not enough: inputs that go together add up or cancel.",
            ),
        ),
        hints=(
            "for one row d, ||d X||^2 is d G d^T.",
            "for all rows: (D @ gram * D).sum() with D = W - W2; the same for W; divide; take the root.",
        ),
    ),
    "03.compensate": Exercise(
        "Write compensate(w, q, gram): w[0] becomes q; where must the other weights w[1:] go, so that the "
        "output's error is least?",
        compensate,
        cases=(
            (tensor([0.4, 0.3]), 0.0, tensor([[6.0, 5.0], [5.0, 5.0]])),
            (tensor([0.9, -0.4, 0.35]), 1.0, GRAM),
            (tensor([0.9, -0.4, 0.35]), 1.0, UNRELATED),
        ),
        slips=(
            (
                lambda w, q, G: w[1:] - (w[0] - q) * torch.linalg.solve(G[1:, 1:], G[1:, 0]),
                "the sign is wrong: what the first weight lost, the others must give.",
            ),
            (
                lambda w, q, G: w[1:] + (w[0] - q) * G[1:, 0] / G.diagonal()[1:],
                "that moves each weight as if it were the only one left; they share the work: solve with "
                "gram[1:, 1:].",
            ),
            (
                lambda w, q, G: w[1:] + (w[0] - q) * G[1:, 0] / G[0, 0],
                "divide by what the moving weights' own inputs are, not by the first one's.",
            ),
            (lambda w, q, G: (w[0] - q) * torch.linalg.solve(G[1:, 1:], G[1:, 0]), "that is only the move."),
            (lambda w, q, G: w[1:], "that leaves them where they are, as rounding to nearest does."),
        ),
        hints=(
            "the error of the output is e G e^T with e = (w[0] - q, w[1:] - new): where is its slope 0?",
            "gram[1:, 1:] @ move = (w[0] - q) * gram[1:, 0]; torch.linalg.solve finds the move.",
        ),
    ),
    "03.channel_scale": Exercise(
        "Write channel_scale(magnitude, exponent): magnitude^exponent, divided by the square root of its "
        "largest times its smallest value.",
        channel_scale,
        cases=((MAGNITUDE, 0.5), (MAGNITUDE, 0.0), (MAGNITUDE * 7, 0.85)),
        slips=(
            (lambda m, a: m**a, "the balance is missing: the largest and the smallest should lie around 1."),
            (lambda m, a: m**-a, "salient channels are stretched, so their scale is above 1."),
            (lambda m, a: m**a / (m**a).max(), "divide by the root of the largest times the smallest."),
            (lambda m, a: m**a / (m**a).mean(), "divide by the root of the largest times the smallest."),
            (
                lambda m, a: m**a / ((m**a).max() * (m**a).min()),
                "take the square root of the product of the largest and the smallest.",
            ),
            (lambda m, a: m * a, "the exponent is a power, not a factor."),
        ),
        hints=(
            "first raise to the power, then balance.",
            "s = magnitude**exponent; s / (s.max() * s.min()).sqrt()",
        ),
    ),
    "03.scaled_rounding": Exercise(
        "Write scaled_rounding(W, s, step): stretch W's columns by s, round to multiples of step, shrink.",
        scaled_rounding,
        cases=((W, tensor([4.0, 1.0, 0.5]), 0.25), (W, torch.ones(3), 0.1)),
        slips=(
            (
                lambda W, s, h: (W * s / h).round() * h,
                "the inputs are divided by s: divide the weights back too.",
            ),
            (lambda W, s, h: (W / h).round() * h, "that is rounding to nearest: s is not used."),
            (
                lambda W, s, h: (W / s / h).round() * h * s,
                "the other way round: multiply by s, round, divide.",
            ),
            (lambda W, s, h: (W * s / h).round() / s, "those are codes: times step gives weights."),
        ),
        hints=("three steps: W * s, round to the grid, divide by s.", "(W * s / step).round() * step / s"),
    ),
    "03.nf4_bits": Exercise(
        "QLoRA: 4-bit codes, and a scale for each 64 weights. The scales are stored in 8 bits, with a 32-bit "
        "scale for each 256 of them. How many bits does a weight take?",
        NF4_BITS,
        slips=(
            (4, "that counts only the codes."),
            (4 + 32 / 64, "that is without the second rounding: a 32-bit scale for each 64 weights."),
            (4 + 8 / 64, "nearly: the scales' own scales are missing."),
            (4 + 8 / 64 + 32 / 256, "256 scales share one 32-bit number, and each scale serves 64 weights."),
            (NF4_BITS - 4, "that is what the scales take; add the codes."),
        ),
        hints=("three parts: codes, scales, the scales' scales.", "4 + 8 / 64 + 32 / (64 x 256)."),
        rtol=1e-5,
    ),
}
