"""The exercises of lesson 05."""

import torch
from torch import Tensor, tensor

from lightlib.exercise_data.exercise import Exercise


def keep_largest(scores: Tensor, sparsity: float) -> Tensor:
    drop = scores.argsort(dim=-1, stable=True)[..., : int(scores.shape[-1] * sparsity)]
    return torch.ones_like(scores, dtype=torch.bool).scatter(-1, drop, False)


def keep_n_of_4(scores: Tensor, n: int) -> Tensor:
    return keep_largest(scores.reshape(-1, 4), 1 - n / 4).view(scores.shape)


def damage(w: Tensor, H: Tensor) -> Tensor:
    return 0.5 * w.square() * H.diagonal()


def surgeon(w: Tensor, j: int, H: Tensor) -> Tensor:
    inverse = H.inverse()
    return w - w[j] / inverse[j, j] * inverse[j]


def wanda_mask(W: Tensor, norms: Tensor, sparsity: float) -> Tensor:
    return keep_largest(W.abs() * norms, sparsity)


def two_of_four(scores: Tensor) -> Tensor:
    return keep_n_of_4(scores, 2)


def lost_weight(W: Tensor, norms: Tensor, sparsity: float) -> Tensor:
    return keep_largest((W.abs() * norms).flatten(), sparsity).view(W.shape)


w = tensor([0.8, 1.0, -0.3])
H = tensor([[4.0, 1.5, 0.5], [1.5, 1.0, 0.2], [0.5, 0.2, 2.0]])
UNRELATED = H.diagonal().diag()
W = tensor([[0.9, -0.4, 0.35, 0.1, -0.7, 0.2, 0.6, -0.15], [-0.2, 0.75, 0.45, -0.3, 0.05, 0.5, -0.1, 0.25]])
NORMS = tensor([1.0, 2.0, 0.5, 8.0, 1.0, 0.5, 0.1, 3.0])
EQUAL = torch.ones(8)
CSR_SHARE = 1 - 16 / 48

EXERCISES = {
    "05.damage": Exercise(
        "Write damage(w, H): for each weight of w, what the loss 1/2 (w - w') H (w - w') grows by if it "
        "alone goes to 0 and no other moves (Optimal Brain Damage).",
        damage,
        cases=((w, H), (w, UNRELATED), (w * 2, H)),
        slips=(
            (lambda w, H: w.square() * H.diagonal(), "the loss has a half in front."),
            (lambda w, H: w.abs(), "that is magnitude: it does not know how steep the loss is."),
            (lambda w, H: 0.5 * w.square(), "each weight has its own curvature: the diagonal of H."),
            (
                lambda w, H: 0.5 * w.square() / H.inverse().diagonal(),
                "that is the surgeon's: it lets the others move. Here they stay.",
            ),
            (lambda w, H: 0.5 * w * (H @ w), "only weight j changes, so only H_jj counts."),
            (lambda w, H: 0.5 * w.abs() * H.diagonal(), "the loss is a parabola: square the weight."),
        ),
        hints=(
            "put w - w' = (0, ..., w_j, ..., 0) into the loss: one entry of H is left.",
            "0.5 * w**2 * H.diagonal()",
        ),
    ),
    "05.surgeon": Exercise(
        "Write surgeon(w, j, H): all weights after weight j was taken out and the others moved to where the "
        "loss is least (Optimal Brain Surgeon).",
        surgeon,
        cases=((w, 0, H), (w, 1, H), (w, 2, UNRELATED)),
        slips=(
            (
                lambda w, j, H: w - w[j] / H.inverse()[j, j] * torch.eye(len(w))[j] * H.inverse()[j, j],
                "weight j is gone, but the others have not moved.",
            ),
            (
                lambda w, j, H: w - w[j] / H[j, j] * H[j],
                "that is a row of H; the others move along a row of its inverse.",
            ),
            (
                lambda w, j, H: w - w[j] * H.inverse()[j],
                "weight j must land on 0: divide by [H^-1]_jj.",
            ),
            (
                lambda w, j, H: w + w[j] / H.inverse()[j, j] * H.inverse()[j],
                "the sign is wrong: weight j ends at twice what it was.",
            ),
        ),
        hints=(
            "with P = H.inverse(), the step is a multiple of P[j] that brings w[j] to 0.",
            "w - w[j] / P[j, j] * P[j]",
        ),
    ),
    "05.wanda_mask": Exercise(
        "Write wanda_mask(W, norms, sparsity): True where a weight of W (out, in) stays. In each row "
        "int(in x sparsity) weights go, those of least |W_ij| x norms_j.",
        wanda_mask,
        cases=((W, NORMS, 0.5), (W, EQUAL, 0.25), (W, NORMS, 0.0)),
        slips=(
            (
                lambda W, n, s: keep_largest(W.abs(), s),
                "that is magnitude: the norms of the inputs are not used.",
            ),
            (lambda W, n, s: ~keep_largest(W.abs() * n, s), "the other way round: True stays."),
            (
                lambda W, n, s: lost_weight(W, n, s),
                "weights compete within their row, not within the whole layer.",
            ),
            (lambda W, n, s: keep_largest(W * n, s), "a large negative weight matters as well: take |W|."),
            (
                lambda W, n, s: keep_largest((W.abs() * n).T, s).T,
                "each row of W loses weights; you pruned each column.",
            ),
        ),
        hints=(
            "scores = W.abs() * norms; then sort each row.",
            "drop = scores.argsort(1)[:, :int(in * sparsity)]; "
            "torch.ones_like(W, dtype=torch.bool).scatter(1, drop, False)",
        ),
    ),
    "05.two_of_four": Exercise(
        "Write two_of_four(scores): a mask of the shape of scores (out, in); of every four that lie side by "
        "side in a row the two largest stay.",
        two_of_four,
        cases=((W.abs(),), (W.abs() * NORMS,)),
        slips=(
            (
                lambda s: keep_largest(s, 0.5),
                "half of each row stays, but not two of every four.",
            ),
            (lambda s: ~keep_n_of_4(s, 2), "the other way round: the two largest stay."),
            (lambda s: keep_n_of_4(s, 1), "one of four stays; two should."),
            (
                lambda s: keep_n_of_4(s.T, 2).T,
                "the groups of four lie along a row, not down a column.",
            ),
        ),
        hints=(
            "scores.view(out, in // 4, 4) puts each group on a row of its own.",
            "drop = groups.argsort(-1)[..., :2]; scatter False there into ones; view it as it was.",
        ),
    ),
    "05.csr_pays": Exercise(
        "CSR stores a 16-bit value and a 32-bit column for each weight that stays (the row starts count "
        "next to nothing). From which share of zeros on is it smaller than the dense 16-bit weight?",
        CSR_SHARE,
        slips=(
            (1 / 3, "that is the share of weights that may stay; zeros are the rest."),
            (0.5, "at half zeros it takes 48 bits for every second weight: 24 a weight."),
            (2 / 3 * 100, "give a share between 0 and 1."),
        ),
        hints=("density x 48 = 16.", "1 - 16 / 48"),
        rtol=1e-3,
    ),
}
