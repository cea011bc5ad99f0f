"""A data re-uploading circuit, simulated whole on tensors: what QIREN's quantum layers compute.

The parameter layers do not depend on the batch, so they are multiplied out first; an upload is one phase an
amplitude. Zhao et al. 2024 (QIREN), arXiv:2406.03873; Schuld et al. 2021, arXiv:2008.08605.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

ENTANGLERS = ("CZ", "CNOT", "none")
# up to here one dense unitary a layer is fastest, beyond it the Kronecker products of half the qubits
DENSE_QUBITS = 6


@dataclass(frozen=True)
class Circuit:
    """`uploads` times {parameter layer, RZ(x_j) on each qubit j}, then a last parameter layer.

    A parameter layer is `blocks` times {Rot = RZ RY RZ on each qubit, then a ring of entanglers "CZ", "CNOT"
    or "none", of range k mod (qubits - 1) + 1 in block k}. One qubit has no ring.
    """

    qubits: int
    uploads: int = 1
    blocks: int = 2
    entangler: str = "CZ"

    def __post_init__(self):
        for name in ("qubits", "uploads", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a circuit has at least 1")
        if self.entangler not in ENTANGLERS:
            raise ValueError(f"entangler={self.entangler!r} is none of {', '.join(ENTANGLERS)}")

    @property
    def weights_shape(self) -> tuple[int, int, int, int]:
        """(uploads + 1, blocks, qubits, 3): the angles phi, theta, omega of every Rot."""
        return self.uploads + 1, self.blocks, self.qubits, 3

    def ring(self, block: int) -> list[tuple[int, int]]:
        """The pairs (control, target) of the block's entanglers, in their order; [] where it has none."""
        n = self.qubits
        if n == 1 or self.entangler == "none":
            return []
        return [(i, (i + block % (n - 1) + 1) % n) for i in range(n)]


def run(circuit: Circuit, weights: Tensor, x: Tensor) -> Tensor:
    """<Z> (..., qubits), from -1 to 1, for uploaded angles x (..., qubits) and weights of weights_shape.

    Zero weights give 1. For one value on all qubits say x.expand(..., qubits). Gradients pass to both.
    """
    psi = state(circuit, weights, x)
    return (psi.real.square() + psi.imag.square()) @ signs(circuit.qubits, x)


def state(circuit: Circuit, weights: Tensor, x: Tensor) -> Tensor:
    """The state (..., 2**qubits) of norm 1, from |0...0>; qubit 0 is the first bit of an amplitude's index.

    complex64 for float32 and complex128 for float64.
    """
    check(circuit, weights, x)
    phase = encoding(x.reshape(-1, circuit.qubits))  # (2^n, B)
    psi = torch.eye(2**circuit.qubits, 1, dtype=phase.dtype, device=x.device)  # |0...0>
    for upload, layer in enumerate(layers(circuit, weights)):
        psi = layer(psi * phase if upload else psi)  # (2^n, 1), after the first upload (2^n, B)
    return psi.mT.reshape(*x.shape[:-1], 2**circuit.qubits)


def check(circuit: Circuit, weights: Tensor, x: Tensor) -> None:
    """Raise ValueError where the tensors do not fit the circuit or each other."""
    if weights.shape != circuit.weights_shape:
        raise ValueError(f"weights are {tuple(weights.shape)}, but weights_shape is {circuit.weights_shape}")
    if x.ndim == 0 or x.shape[-1] != circuit.qubits:
        raise ValueError(
            f"x is {tuple(x.shape)}, but its last dimension holds the {circuit.qubits} qubits' angles; "
            f"for one value on all of them say x.expand(..., {circuit.qubits})"
        )
    if weights.dtype != x.dtype or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"weights are {weights.dtype} and x is {x.dtype}: make both float32 or both float64")


def signs(qubits: int, like: Tensor) -> Tensor:
    """Z's diagonal on each qubit (2^n, n): +1 where its bit of the index is 0, -1 where it is 1."""
    return torch.from_numpy(1.0 - 2.0 * bits(qubits)).to(like)


def encoding(x: Tensor) -> Tensor:
    """The diagonals (2^n, B) of RZ(x_j) on every qubit j, for x (B, n): exp(-i/2 sum of +-x_j)."""
    half = (signs(x.shape[1], x) / 2) @ x.mT
    return torch.complex(half.cos(), -half.sin())


def rotations(weights: Tensor) -> Tensor:
    """Rot(phi, theta, omega) = RZ(omega) RY(theta) RZ(phi), (..., 2, 2) for weights (..., 3)."""
    phi, theta, omega = weights.unbind(-1)
    cos, sin = (theta / 2).cos(), (theta / 2).sin()
    plus, minus = torch.exp(0.5j * (phi + omega)), torch.exp(0.5j * (phi - omega))
    rows = [cos * plus.conj(), -sin * minus, sin * minus.conj(), cos * plus]
    return torch.stack(rows, -1).unflatten(-1, (2, 2))


def kronecker(gates: Tensor) -> Tensor:
    """The product (..., 2^m, 2^m) of one gate a qubit (..., m, 2, 2); 1 for no qubit."""
    product = gates.new_ones(*gates.shape[:-3], 1, 1)
    for gate in gates.unbind(-3):
        product = product[..., :, None, :, None] * gate[..., None, :, None, :]
        product = product.flatten(-4, -3).flatten(-2)
    return product


def layers(circuit: Circuit, weights: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """Each parameter layer as a function of states (2^n, B), column by column."""
    if circuit.qubits <= DENSE_QUBITS:
        return [partial(torch.matmul, V) for V in unitaries(circuit, weights)]
    rots, half = rotations(weights), circuit.qubits // 2
    A, B = kronecker(rots[:, :, :half]), kronecker(rots[:, :, half:])  # (L + 1, K, 2^(n/2), 2^(n/2)) each
    return [partial(by_halves, circuit, *pair) for pair in zip(A, B, strict=True)]


def unitaries(circuit: Circuit, weights: Tensor) -> Tensor:
    """Each parameter layer as a matrix (uploads + 1, 2^n, 2^n); at zero weights only the rings are left."""
    blocks = kronecker(rotations(weights))  # (L + 1, K, 2^n, 2^n)
    product = entangle(circuit, 0, blocks[:, 0])
    for k in range(1, circuit.blocks):
        product = entangle(circuit, k, blocks[:, k]) @ product
    return product


def by_halves(circuit: Circuit, A: Tensor, B: Tensor, psi: Tensor) -> Tensor:
    """One layer on psi (2^n, B): in block k, A[k] on the first half of the qubits and B[k] on the others."""
    for k in range(circuit.blocks):
        split = (A[k] @ psi.reshape(A.shape[-1], -1)).reshape(A.shape[-1], B.shape[-1], -1)
        psi = entangle(circuit, k, torch.bmm(B[k].expand(len(split), -1, -1), split).flatten(0, 1))
    return psi


def entangle(circuit: Circuit, block: int, rows: Tensor) -> Tensor:
    """The block's ring on rows (..., 2^n, m) of amplitudes: CZs change signs, CNOTs change places."""
    if not circuit.ring(block):
        return rows
    table = torch.from_numpy(ring_table(circuit, block)).to(rows.device)
    return rows * table[:, None] if circuit.entangler == "CZ" else rows.index_select(-2, table)


def bits(qubits: int) -> np.ndarray:
    """The bits (2^n, n) of every index, qubit 0 first."""
    return (np.arange(2**qubits)[:, None] >> np.arange(qubits - 1, -1, -1)) & 1


@lru_cache
def ring_table(circuit: Circuit, block: int) -> np.ndarray:
    """For CZs each amplitude's sign (2^n); for CNOTs the index (2^n) of the one that comes to its place."""
    bit, place = bits(circuit.qubits), 2 ** np.arange(circuit.qubits - 1, -1, -1)
    if circuit.entangler == "CZ":
        both = sum(bit[:, a] & bit[:, b] for a, b in circuit.ring(block))
        return (1 - 2 * (both % 2)).astype(np.float32)
    for control, target in reversed(circuit.ring(block)):
        bit[:, target] ^= bit[:, control]
    return bit @ place
