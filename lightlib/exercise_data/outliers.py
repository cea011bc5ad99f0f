"""The exercises of lesson 02."""

import torch
from torch import Tensor, tensor

from lightlib.exercise_data.exercise import Exercise


def product(qx: Tensor, sx: Tensor, qw: Tensor, sw: Tensor) -> Tensor:
    return (qx.int() @ qw.int().T) * sx * sw.T


def smooth(X: Tensor, W: Tensor, alpha: float) -> Tensor:
    return X.abs().amax(0) ** alpha / W.abs().amax(0) ** (1 - alpha)


OUT, IN, KEPT = 576, 1536, 15
BITS = 8 + 16 / IN + KEPT * (16 * OUT + 32) / (OUT * IN)
QX = tensor([[127, -3, 40], [90, 127, -127]], dtype=torch.int8)
QW = tensor([[127, 5, -60], [-20, 127, 127], [0, -64, 127]], dtype=torch.int8)
SX, SW = tensor([[0.02], [0.5]]), tensor([[0.001], [0.004], [0.01]])
X = tensor([[0.3, -9.0, 1.2, 6.0], [-0.5, 2.0, -5.9, 0.1], [0.2, 1.0, 0.4, -2.0]])
W = tensor([[0.5, -0.2, 0.9, 0.1], [-0.7, 0.3, -1.6, 0.4]])

EXERCISES = {
    "02.erased": Exercise(
        "One 8-bit scale serves all inputs of a layer, and one of them is 3,000. How large in size may "
        "another input be and still get the code 0?",
        1500 / 127,
        slips=(
            (3000 / 127, "that is a whole step; what lies within half a step of 0 becomes 0."),
            (3000 / 255, "the codes reach from -127 to 127, so 127 steps lead from 0 to the largest."),
            (1500 / 128, "the largest code is 127."),
            (3000 / 256, "the largest code is 127."),
            (127 / 3000, "upside down: a step is the largest value over 127."),
        ),
        hints=("how wide is a step? From where on is the next code nearer?", "3000 / 127 / 2."),
    ),
    "02.product": Exercise(
        "Write product(qx, sx, qw, sw): the layer's outputs (tokens, out) from int8 codes qx (tokens, in) "
        "and qw (out, in), a scale a token sx (tokens, 1) and a scale an output sw (out, 1).",
        product,
        cases=((QX, SX, QW, SW), (-QX, SX * 3, QW, SW), (QX[:1], SX[:1], QW, SW)),
        slips=(
            (
                lambda qx, sx, qw, sw: (qx @ qw.T) * sx * sw.T,
                "int8 sums wrap around beyond 127: convert the codes to int32 before the product.",
            ),
            (
                lambda qx, sx, qw, sw: (qx.int() @ qw.int().T).float(),
                "those are the integer sums; the scales are missing.",
            ),
            (lambda qx, sx, qw, sw: (qx.int() @ qw.int().T) * sx, "the outputs' scales are missing."),
            (lambda qx, sx, qw, sw: (qx.int() @ qw.int().T) * sw.T, "the tokens' scales are missing."),
            (
                lambda qx, sx, qw, sw: (qx.int() @ qw.int().T) / sx / sw.T,
                "multiply: a code times its scale gives the value.",
            ),
        ),
        hints=(
            "a product of integers first; then rows times the tokens' scales, columns times the outputs'.",
            "(qx.int() @ qw.int().T) * sx * ...",
        ),
    ),
    "02.bits": Exercise(
        "A layer from 1,536 inputs to 576 outputs stores 8-bit codes for all weights and a 16-bit scale a "
        "row. Beside them it keeps 15 columns as 16-bit numbers, with a 32-bit index each. How many bits is "
        "that a weight?",
        BITS,
        slips=(
            (BITS - 16 / IN, "the rows' scales are missing."),
            (8.0, "that counts only the codes."),
            (8 + 16 / IN, "the columns apart are missing."),
            (8 + 16 / IN + KEPT * 16 / IN, "the columns' indices are missing."),
            (
                BITS - 8 * KEPT / IN,
                "the codes of those columns are stored too (as zeros), so that the product stays whole.",
            ),
            (BITS * OUT * IN, "those are the bits of the whole layer; divide by its weights."),
            (BITS / 8, "that is in bytes; asked for are bits."),
        ),
        hints=(
            "count the bits of the whole layer, then divide by 576 x 1536.",
            "8 x 576 x 1536 + 16 x 576 + 15 x (16 x 576 + 32) bits in all.",
        ),
        rtol=1e-5,
    ),
    "02.smooth": Exercise(
        "Write smooth_by(X, W, alpha): SmoothQuant's scale of each input channel, for inputs X (tokens, in) "
        "and weights W (out, in).",
        smooth,
        cases=((X, W, 0.7), (X, W, 0.5), (-X, W * 3, 0.0), (X, -W, 1.0)),
        slips=(
            (
                lambda X, W, a: W.abs().amax(0) ** (1 - a) / X.abs().amax(0) ** a,
                "upside down: this scale divides the inputs.",
            ),
            (
                lambda X, W, a: X.abs().amax(0) ** (1 - a) / W.abs().amax(0) ** a,
                "alpha and 1 - alpha have changed places.",
            ),
            (
                lambda X, W, a: (X.abs().amax(0) / W.abs().amax(0)) ** a,
                "the weights have the power 1 - alpha.",
            ),
            (
                lambda X, W, a: X.abs().amax(0) ** a * W.abs().amax(0) ** (1 - a),
                "the weights' share divides: where they are large already, less should be moved to them.",
            ),
            (lambda X, W, a: X.abs().amax(0) ** a, "the weights have a say too: divide by their share."),
            (
                lambda X, W, a: X.abs().mean(0) ** a / W.abs().mean(0) ** (1 - a),
                "the largest in size counts, not the mean: it is what sets an 8-bit scale.",
            ),
        ),
        hints=(
            "two numbers a channel: the largest |x| over tokens, and the largest |w| over outputs.",
            "X.abs().amax(0) ** alpha / ...",
        ),
    ),
}
