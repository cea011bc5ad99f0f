"""The exercises of lesson 07."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, tensor

from lightlib.exercise_data.exercise import Exercise


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def cut_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, kept: Tensor) -> Tensor:
    return mlp(x, gate[kept], up[kept], down[:, kept])


def first_order(W: Tensor, g: Tensor) -> Tensor:
    return (W * g).abs().sum(1)


def angle_share(x: Tensor, y: Tensor) -> Tensor:
    cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    return cosine.clamp(-1, 1).arccos() / torch.pi


GATE = tensor([[0.9, -0.4], [-0.2, 0.7], [0.1, 0.3], [0.5, -0.8]])
UP, DOWN = GATE.flip(0) * 2, GATE.T + 1
KEPT = tensor([0, 2])
G = tensor([[0.1, 0.5], [-0.3, 0.2], [0.4, -0.1], [-0.2, -0.6]])
X, Y = tensor([[1.0, 0.0], [3.0, 4.0]]), tensor([[0.0, 2.0], [3.0, 4.0]])
HEAD_WEIGHTS = 576 * (3 * 64 + 2 * 64 + 3 * 64)

EXERCISES = {
    "07.cut_mlp": Exercise(
        "Write cut_mlp(x, gate, up, down, kept): what a gated MLP, (silu(x gate^T) * (x up^T)) down^T, makes "
        "of x (tokens, d) with only the neurons whose numbers are in kept; gate, up (f, d), down (d, f).",
        cut_mlp,
        cases=((X, GATE, UP, DOWN, KEPT), (X, GATE, UP, DOWN, tensor([3]))),
        slips=(
            (
                lambda x, gate, up, down, kept: mlp(x, gate[kept], up[kept], down[:, : len(kept)]),
                "down reads neurons by its columns: take those of the same neurons.",
            ),
            (
                lambda x, gate, up, down, kept: mlp(x, gate[kept], up[: len(kept)], down[:, kept]),
                "gate and up are multiplied neuron by neuron: both keep the same rows.",
            ),
            (lambda x, gate, up, down, kept: mlp(x, gate, up, down), "all neurons are still there."),
        ),
        hints=("a neuron is a row of gate, a row of up, a column of down.", "down[:, kept]"),
    ),
    "07.head_weights": Exercise(
        "SmolLM2-135M: d_model 576, 9 query heads and 3 key-value heads of 64. How many weights of W_q, W_k, "
        "W_v and W_o go with one key-value head and all that depends on it?",
        HEAD_WEIGHTS,
        slips=(
            (576 * 4 * 64, "three query heads share this key-value head, and go with it."),
            (576 * 5 * 64, "the output reads three heads of 64: its columns go as well."),
            (576 * 8 * 64 // 3, "per key-value head, not per query head."),
        ),
        hints=(
            "3 x 64 rows of W_q, 64 of W_k, 64 of W_v, and 3 x 64 columns of W_o.",
            "each row and each column has 576 weights.",
        ),
    ),
    "07.first_order": Exercise(
        "Write first_order(W, g): for each neuron, a row of W (f, d), the sum of |w g| over its weights; g "
        "(f, d) is the gradient of the loss.",
        first_order,
        cases=((GATE, G), (UP, G)),
        slips=(
            (lambda W, g: (W * g).abs().sum(0), "that sums over the neurons; a neuron is a row."),
            (lambda W, g: (W * g).sum(1).abs(), "weights may cancel so: take |w g| first, then the sum."),
            (lambda W, g: g.abs().sum(1), "a steep loss matters by how far the weight moves, which is w."),
            (lambda W, g: W.abs().sum(1), "that is magnitude: no word of the loss."),
        ),
        hints=("to zero a weight moves it by -w, the loss by about -w g.", "(W * g).abs().sum(1)"),
    ),
    "07.angle": Exercise(
        "Write angle(x, y): the angle between x and y (tokens, d) as a share of a half turn, for each token: "
        "0 where they point the same way, 0.5 where they are at right angles.",
        angle_share,
        cases=((X, Y), (X, -X)),
        slips=(
            (
                lambda x, y: ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).clamp(-1, 1).arccos(),
                "that is in radians: a half turn is pi.",
            ),
            (lambda x, y: (x - y).norm(dim=-1), "a distance grows with the lengths; only directions count."),
        ),
        hints=("cosine: x y / (|x| |y|).", "rounding may lift it above 1, and arccos is NaN there: clamp."),
    ),
}
