"""The exercises of lesson 09."""

from __future__ import annotations

import torch
from torch import Tensor, tensor

from lightlib.exercise_data.exercise import Exercise


def thin(W: Tensor, r: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r] * S[:r] @ Vh[:r]


def last_directions(W: Tensor, r: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, -r:] * S[-r:] @ Vh[-r:]


def without_values(W: Tensor, r: int) -> Tensor:
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r] @ Vh[:r]


def break_even(n_out: int, n_in: int) -> float:
    return n_out * n_in / (n_out + n_in)


def main_outputs(W: Tensor, U: Tensor) -> Tensor:
    return U @ (U.T @ W)


def rank_for_energy(singular: Tensor, share: float) -> int:
    held = singular.square().cumsum(0) / singular.square().sum()
    return int((held < share).sum()) + 1


def rank_for_sum(singular: Tensor, share: float) -> int:
    return int((singular.cumsum(0) / singular.sum() < share).sum()) + 1


W = tensor([[3.0, 1.0, 0.5], [1.0, -2.0, 0.25], [0.5, 0.75, 1.5], [2.0, -0.5, 1.0]])
U = tensor([[0.6, 0.0], [0.8, 0.0], [0.0, 0.0], [0.0, 1.0]])
SINGULAR = tensor([5.0, 3.0, 2.0, 0.5, 0.1])

EXERCISES = {
    "09.thin": Exercise(
        "Write thin(W, r): the matrix of rank r that is nearest to W (out, in), from torch.linalg.svd.",
        thin,
        cases=((W, 1), (W, 2), (W.T, 2)),
        slips=(
            (without_values, "each direction has its strength, the singular value; it is missing."),
            (last_directions, "those are the weakest directions; singular values come largest first."),
        ),
        hints=(
            "U[:, :r] are the first r columns, Vh[:r] the first r rows.",
            "U, S, Vh = torch.linalg.svd(W, full_matrices=False); U[:, :r] * S[:r] @ Vh[:r]",
        ),
    ),
    "09.break_even": Exercise(
        "Write break_even(n_out, n_in): the rank at which two factors (n_out, r) and (r, n_in) take as many "
        "numbers as the matrix (n_out, n_in). It need not be whole.",
        break_even,
        cases=((576, 576), (192, 576), (4096, 14336)),
        slips=(
            (lambda a, b: min(a, b), "that is full rank, which takes more than the matrix itself."),
            (lambda a, b: min(a, b) / 2, "right for a square matrix alone."),
            (lambda a, b: a + b, "that is what each rank costs."),
        ),
        hints=("each rank costs n_out + n_in numbers.", "n_out * n_in / (n_out + n_in)"),
    ),
    "09.main_outputs": Exercise(
        "Write main_outputs(W, U): the weight (out, in) whose outputs are those of W (out, in), projected on "
        "the orthonormal directions U (out, r).",
        main_outputs,
        cases=((W, U), (W, U[:, :1])),
        slips=(
            (lambda W, U: U.T @ W, "those are the coordinates along U; lead back from them to the outputs."),
            (lambda W, U: W - U @ (U.T @ W), "that is what the projection leaves out."),
        ),
        hints=("U^T y are the coordinates of an output y along U.", "U @ (U.T @ W)"),
    ),
    "09.rank_for_energy": Exercise(
        "Write rank_for_energy(singular, share): the lowest rank that keeps at least this share of the sum "
        "of squares of the singular values (n), which come largest first.",
        rank_for_energy,
        cases=((SINGULAR, 0.5), (SINGULAR, 0.85), (SINGULAR, 0.99), (SINGULAR, 0.9999)),
        slips=(
            (rank_for_sum, "energy is the sum of squares."),
            (
                lambda s, share: rank_for_energy(s, share) - 1,
                "one too few: at that rank, less than the share is held.",
            ),
        ),
        hints=(
            "singular.square().cumsum(0) is what the first 1, 2, ... hold.",
            "int((held < share).sum()) + 1, with held as shares of the whole",
        ),
    ),
}
