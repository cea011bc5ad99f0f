"""The exercises of lesson 10."""

from __future__ import annotations

import math

import torch
from torch import Tensor, tensor

from lightlib.exercise_data.exercise import Exercise


def unfold(T: Tensor, mode: int) -> Tensor:
    return T.movedim(mode, 0).reshape(T.shape[mode], -1)


def mode_product(T: Tensor, M: Tensor, mode: int) -> Tensor:
    return torch.tensordot(M, T, dims=([1], [mode])).movedim(0, mode)


def tucker_numbers(shape: tuple[int, ...], ranks: tuple[int, ...]) -> int:
    return math.prod(ranks) + sum(n * r for n, r in zip(shape, ranks, strict=True))


def train_numbers(shape: tuple[int, ...], ranks: tuple[int, ...]) -> int:
    bonds = (1, *ranks, 1)
    return sum(bonds[k] * n * bonds[k + 1] for k, n in enumerate(shape))


def ket_row(vectors: Tensor, i: int) -> Tensor:
    base = vectors.shape[1]
    return torch.kron(vectors[0, i // base], vectors[1, i % base])


T = torch.arange(24.0).reshape(2, 3, 4)
VECTORS = tensor([[[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]], [[1.0, -1.0], [2.0, 0.5], [0.0, 4.0]]])

EXERCISES = {
    "10.unfold": Exercise(
        "Write unfold(T, mode): the matrix (n_mode, rest) whose rows are the slices of the tensor T along "
        "`mode`, the other modes in their order.",
        unfold,
        cases=((T, 0), (T, 1), (T, 2)),
        slips=(
            (
                lambda T, mode: T.reshape(T.shape[mode], -1),
                "right for the first mode alone: reshape takes the numbers as they lie; move the mode to the "
                "front first.",
            ),
            (
                lambda T, mode: T.transpose(0, mode).reshape(T.shape[mode], -1),
                "transpose swaps two modes, so the others are no longer in their order; movedim does.",
            ),
        ),
        hints=("T.movedim(mode, 0) brings it to the front.", "T.movedim(mode, 0).reshape(T.shape[mode], -1)"),
    ),
    "10.mode_product": Exercise(
        "Write mode_product(T, M, mode): each vector of T along `mode` times the matrix M (m, n_mode), so "
        "that this mode has m entries afterwards.",
        mode_product,
        cases=((T, torch.arange(6.0).view(3, 2), 0), (T, torch.arange(6.0).view(2, 3), 1)),
        slips=(
            (
                lambda T, M, mode: torch.tensordot(M, T, dims=([1], [mode])),
                "the new mode has come to the front; it belongs where the old one was.",
            ),
        ),
        hints=(
            "torch.tensordot(M, T, dims=([1], [mode])) sums over the mode and puts the new one first.",
            "... .movedim(0, mode)",
        ),
    ),
    "10.tucker_numbers": Exercise(
        "Write tucker_numbers(shape, ranks): how many numbers a Tucker decomposition stores, "
        "core and factors.",
        tucker_numbers,
        cases=(((12, 12, 12), (4, 4, 4)), ((30, 576, 576), (30, 200, 100))),
        slips=(
            (lambda shape, ranks: math.prod(ranks), "the core alone; the factors are stored as well."),
            (
                lambda shape, ranks: sum(n * r for n, r in zip(shape, ranks, strict=True)),
                "the factors alone; the core is stored as well.",
            ),
            (
                lambda shape, ranks: math.prod(ranks) * sum(shape),
                "the factors are beside the core; add them.",
            ),
        ),
        hints=(
            "the core has as many modes as the tensor, each as long as its rank.",
            "math.prod(ranks) + sum(n * r for n, r in zip(shape, ranks))",
        ),
    ),
    "10.train_numbers": Exercise(
        "Write train_numbers(shape, ranks): how many numbers a tensor train stores; ranks are those of the "
        "bonds between its cores, one less than there are modes.",
        train_numbers,
        cases=(((12, 12, 12), (4, 4)), ((8, 9, 8, 24), (8, 20, 24))),
        slips=(
            (
                lambda shape, ranks: sum(n * r for n, r in zip(shape, ranks, strict=False)),
                "an inner core has two bonds and a mode: r n r'; and the last core counts too.",
            ),
        ),
        hints=("with a 1 at both ends every core is (r, n, r').", "bonds = (1, *ranks, 1)"),
    ),
    "10.ket_row": Exercise(
        "Write ket_row(vectors, i): row i of a word2ketXS table of rank 1 and order 2, from vectors "
        "(2, t, q): the tensor product of the vectors that the two digits of i in base t choose, as one "
        "vector (q^2).",
        ket_row,
        cases=((VECTORS, 0), (VECTORS, 5), (VECTORS, 7)),
        slips=(
            (
                lambda v, i: torch.kron(v[1, i % v.shape[1]], v[0, i // v.shape[1]]),
                "the first digit's vector comes first.",
            ),
            (
                lambda v, i: torch.kron(v[0, i % v.shape[1]], v[1, i // v.shape[1]]),
                "the first digit is i // t, the second i % t.",
            ),
            (
                lambda v, i: v[0, i // v.shape[1]] * v[1, i % v.shape[1]],
                "each entry of the one times each of the other: q^2 numbers, not q.",
            ),
        ),
        hints=("5 in base 3 is 12.", "torch.kron(vectors[0, i // t], vectors[1, i % t])"),
    ),
}
