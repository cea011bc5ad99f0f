"""Noise on the gates: angles that are a little off, and qubits that lose their state."""

from __future__ import annotations

import torch
from torch import Tensor

from lightlib.quantum.circuit import Circuit, check, encoding, entangle, kronecker, rotations, run, signs

# density matrices of all points at once: 128 MiB in complex64
MOST_ENTRIES = 2**24


def run_perturbed(
    circuit: Circuit, weights: Tensor, x: Tensor, eps: float, generator: torch.Generator, draws: int = 1
) -> Tensor:
    """<Z> (draws, ..., qubits) with N(0, eps^2) added to every Rot's angles, anew in each draw.

    eps is in radians, and 0 gives `run`. On average, what turns with an angle shrinks by exp(-eps^2 / 2).
    """
    if not eps >= 0 or draws < 1:
        raise ValueError(
            f"eps={eps}, draws={draws}: give a standard deviation in radians and at least 1 draw"
        )
    check(circuit, weights, x)
    noise = torch.randn(
        draws, *weights.shape, generator=generator, dtype=weights.dtype, device=generator.device
    )
    return torch.stack([run(circuit, weights + eps * off, x) for off in noise.to(weights.device)])


def run_depolarized(circuit: Circuit, weights: Tensor, x: Tensor, p: float) -> Tensor:
    """<Z> (..., qubits) where after every block each qubit meets X, Y or Z with probability p / 3 each.

    Exact, by density matrices, so 4^n numbers a point; p = 0 gives `run`, p = 3/4 gives 0.
    """
    check(circuit, weights, x)
    if not 0 <= p <= 1:
        raise ValueError(f"p={p} is no probability")
    n, points = circuit.qubits, x[..., 0].numel()
    if points * 4**n > MOST_ENTRIES:
        raise ValueError(f"{points} points of {n} qubits need {points} * 4^{n} numbers: give fewer at once")
    phase = encoding(x.reshape(points, n)).mT  # (B, 2^n)
    upload = phase[:, :, None] * phase[:, None].conj()
    blocks = kronecker(rotations(weights))  # (L + 1, K, 2^n, 2^n)
    first = torch.eye(2**n, 1, dtype=phase.dtype, device=x.device)
    rho = first @ first.mT  # (2^n, 2^n), after the first upload (B, 2^n, 2^n)
    for layer in range(circuit.uploads + 1):
        rho = rho * upload if layer else rho
        for k in range(circuit.blocks):
            U = entangle(circuit, k, blocks[layer, k])
            rho = depolarize(U @ rho @ U.mH, p, n)
    return (rho.diagonal(dim1=1, dim2=2).real @ signs(n, x)).reshape(x.shape)


def depolarize(rho: Tensor, p: float, qubits: int) -> Tensor:
    """(1 - p) rho + p / 3 (X rho X + Y rho Y + Z rho Z) on every qubit, for rho (..., 2^n, 2^n)."""
    index = torch.arange(2**qubits, device=rho.device)
    for j, Z in enumerate(signs(qubits, rho.real).mT):
        by_z = rho * (Z[:, None] * Z)
        other = index ^ 2 ** (qubits - 1 - j)
        # Y = iXZ, so X(rho + Z rho Z)X is both X's and Y's share
        by_x_and_y = (rho + by_z)[..., other, :][..., other]
        rho = (1 - p) * rho + p / 3 * (by_z + by_x_and_y)
    return rho
