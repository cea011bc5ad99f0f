"""A weight matrix as a function of its row and column: is an implicit representation a way to compress it?

A network that gives W[i, j] for coordinates (i, j) saves numbers where neighbours are alike, as in a smooth
matrix. Rows and columns of a language model come in no order: `shuffled`, the same weights in random places,
tells what the network can store of anything. Beside it stands the truncated SVD with as many numbers, the
best of its rank (Eckart and Young 1936).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightlib.quantum.baselines import count
from lightlib.quantum.fitting import fit, predict
from lightlib.quantum.signals import Signal, grid
from lightlib.report import relative_error


@dataclass(frozen=True)
class Represented:
    """W' (rows, columns), how many numbers it is made of, and ||W - W'|| / ||W||: 1 is what zeros give."""

    weight: Tensor
    parameters: int
    error: float


def as_function(weight: Tensor) -> Signal:
    """W (rows, columns) as a function of (row, column): y (rows * columns, 1) is W over its root mean square.

    So the relative error of a fit is the root of its mean squared error.
    """
    if weight.dim() != 2 or not weight.any():
        raise ValueError(f"weight of {tuple(weight.shape)}: give a matrix that is not all zeros")
    y = (weight / weight.square().mean().sqrt()).reshape(-1, 1)
    return Signal(grid(*weight.shape).to(y), y.detach())


def represent(
    weight: Tensor, model: nn.Module, *, steps: int = 300, lr: float = 0.01, progress: bool = True
) -> Represented:
    """The matrix that the model (2 inputs, 1 output) gives after it has learnt `weight`, in place."""
    signal = as_function(weight)
    fit(model, signal.x, signal.y, steps=steps, lr=lr, progress=progress)
    learnt = predict(model, signal.x).view(weight.shape) * weight.square().mean().sqrt()
    return Represented(learnt, count(model), relative_error(weight, learnt))


def truncated(weight: Tensor, parameters: int) -> Represented:
    """The SVD cut to the rank r that so many numbers pay for, r (rows + columns) of them; full rank is exact.

    Raises ValueError where they do not pay for rank 1: then compare on a block of the matrix.
    """
    rows, columns = weight.shape
    rank = min(parameters // (rows + columns), rows, columns)
    if rank < 1:
        raise ValueError(
            f"rank 1 of {rows} x {columns} takes {rows + columns} numbers and {parameters} are given; "
            f"take a block with at most {parameters} rows and columns together"
        )
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    near = U[:, :rank] * S[:rank] @ Vh[:rank]
    return Represented(near, rank * (rows + columns), relative_error(weight, near))


def smooth(rows: int, columns: int, waves: int, generator: torch.Generator | None = None) -> Tensor:
    """A smooth random matrix (rows, columns), the `waves` x `waves` slowest cosines; of rank `waves`."""
    if not 1 <= waves <= min(rows, columns):
        raise ValueError(f"waves={waves}: give 1 to {min(rows, columns)} for {rows} x {columns}")
    amounts = torch.randn(waves, waves, generator=generator)
    return cosines(rows, waves) @ amounts @ cosines(columns, waves).T


def shuffled(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The entries of the matrix in random places: a control that nothing but chance can fit."""
    places = torch.randperm(weight.numel(), generator=generator)
    return weight.flatten()[places].view(weight.shape)


def cosines(n: int, waves: int) -> Tensor:
    """(n, waves): cos(pi k (i + 1/2) / n), the basis of the discrete cosine transform."""
    return torch.cos(torch.pi * torch.outer(torch.arange(n) + 0.5, torch.arange(waves)) / n)
