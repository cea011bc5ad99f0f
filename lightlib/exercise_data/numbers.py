"""The exercises of lesson 01."""

import torch
from torch import Tensor, tensor

from lightlib.exercise_data.exercise import Exercise


def symmetric_scale(W: Tensor) -> Tensor:
    return W.abs().max() / 127


def quantize(row: Tensor, scale: float) -> Tensor:
    return (row / scale).round().clamp(-127, 127)


def dequantize(codes: Tensor, scale: float, zero: int) -> Tensor:
    return (codes.float() - zero) * scale


def zero_point(low: float, high: float, bits: int) -> int:
    return round(-low / ((high - low) / (2**bits - 1)))


BY_HAND = tensor([[0.4, -1.2, 2.3], [3.1, -5.08, 0.6], [1.7, 0.0, -0.9]])
ROW = tensor([0.31, -0.77, 1.26, -2.6, 0.04, 2.9])

EXERCISES = {
    "01.scale": Exercise(
        "Write scale(W): the scale of a symmetric 8-bit grid, codes -127 to 127, for the whole matrix W.",
        symmetric_scale,
        cases=((BY_HAND,), (BY_HAND.abs() * 0.3,), (-BY_HAND.T * 10,)),
        slips=(
            (lambda W: W.max() / 127, "the largest weight in size may be a negative one."),
            (
                lambda W: W.abs().max() / 128,
                "the largest code is 127, so that both sides have as many points.",
            ),
            (lambda W: W.abs().max() / 255, "from 0 to the largest code there are 127 steps."),
            (
                lambda W: (W.max() - W.min()) / 255,
                "that is the asymmetric scale; a symmetric grid reaches down as far as up.",
            ),
            (lambda W: 127 / W.abs().max(), "upside down: a code times the scale gives back the weight."),
            (lambda W: W.abs().amax(1) / 127, "that is one scale a row; here the whole matrix shares one."),
        ),
        hints=("the weight that is largest in size must land on code 127 or -127.", "W.abs().max() / ..."),
    ),
    "01.quantize": Exercise(
        "Write quantize(row, scale): the code of each weight on the symmetric 8-bit grid, -127 to 127.",
        quantize,
        cases=((ROW, 2.9 / 127), (ROW * 10, 0.1), (ROW, 0.02)),
        slips=(
            (
                lambda r, s: (r / s).trunc().clamp(-127, 127),
                "that cuts the fraction off; round to the nearest code.",
            ),
            (
                lambda r, s: (r / s).floor().clamp(-127, 127),
                "that always rounds down; round to the nearest code.",
            ),
            (lambda r, s: (r / s).clamp(-127, 127), "codes are whole numbers: round them."),
            (lambda r, s: (r / s).round(), "a weight beyond the grid's end must get the last code: clamp."),
            (lambda r, s: (r / s).round().clamp(-128, 127), "a symmetric grid ends at -127, not at -128."),
            (lambda r, s: (r / s).round().to(torch.int8), "int8 wraps around beyond its ends: clamp first."),
            (
                lambda r, s: (r / s).round().clamp(-127, 127) * s,
                "those are weights again; asked for are the codes.",
            ),
            (
                lambda r, s: (r * s).round().clamp(-127, 127),
                "divide by the scale: it is the width of a step.",
            ),
        ),
        hints=(
            "how many steps of `scale` is each weight away from 0?",
            "divide, round, clamp to -127 and 127.",
        ),
    ),
    "01.dequantize": Exercise(
        "Write dequantize(codes, scale, zero): the weights of these unsigned codes; `zero` is the code of 0.",
        dequantize,
        cases=(
            (tensor([0, 3, 7, 15], dtype=torch.uint8), 0.25, 7),
            (tensor([[1, 2], [14, 15]], dtype=torch.uint8), 0.1, 0),
        ),
        slips=(
            (lambda q, s, z: (q - z) * s, "uint8 wraps around below 0: convert the codes to float first."),
            (lambda q, s, z: q.float() * s - z, "the zero point is a code: take it away before you scale."),
            (lambda q, s, z: q.float() * s, "the zero point is missing: code `zero` must give the weight 0."),
            (lambda q, s, z: (q.float() + z) * s, "the zero point is taken away, not added."),
            (lambda q, s, z: (q.float() - z) / s, "multiply: the scale is the width of a step."),
        ),
        hints=("which weight must the code `zero` give?", "(codes - zero) x scale, in float."),
    ),
    "01.zero_point": Exercise(
        "Write zero_point(low, high, bits): the code of the weight 0 on an asymmetric grid from low to high.",
        zero_point,
        cases=((-1.0, 3.0, 4), (-0.92, 1.27, 8), (0.0, 2.0, 4), (-2.0, 0.0, 3)),
        slips=(
            (
                lambda lo, hi, b: -lo / ((hi - lo) / (2**b - 1)),
                "a zero point is a code, so a whole number: round it.",
            ),
            (
                lambda lo, hi, b: round(-lo / ((hi - lo) / 2**b)),
                "2^bits points have 2^bits - 1 steps between them.",
            ),
            (
                lambda lo, hi, b: round(lo / ((hi - lo) / (2**b - 1))),
                "the sign is wrong: `low` has code 0, and the weight 0 lies above it.",
            ),
            (
                lambda lo, hi, b: int(-lo / ((hi - lo) / (2**b - 1))),
                "that cuts the fraction off; round to the nearest.",
            ),
            (
                lambda lo, hi, b: 2 ** (b - 1),
                "that is the middle of the codes; the weight 0 may lie elsewhere.",
            ),
        ),
        hints=(
            "`low` has code 0: how many steps is it from there to the weight 0?",
            "scale = (high - low) / (2^bits - 1); the zero point is -low / scale, rounded.",
        ),
    ),
    "01.bits_per_weight": Exercise(
        "4-bit codes in groups of 64, each with a 16-bit scale and a 4-bit zero: how many bits a weight?",
        4 + (16 + 4) / 64,
        slips=(
            (4, "that counts only the codes; the scales and zero points take room too."),
            (4.25, "the zero points are missing."),
            (4.0625, "the scales are missing."),
            (24, "64 weights share one scale and one zero point."),
            (4.3125 / 8, "that is in bytes; asked for are bits."),
        ),
        hints=("what does a whole group take, in bits?", "(64 x 4 + 16 + 4) / 64."),
    ),
}
