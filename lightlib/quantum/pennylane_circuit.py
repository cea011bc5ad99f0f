"""The same circuit in PennyLane: to check ours, to draw it, and as a way to its devices.

Bergholm et al. 2018 (PennyLane), arXiv:1811.04968.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from lightlib.quantum.circuit import Circuit, check


def import_pennylane() -> ModuleType:
    """The package, or an ImportError that says how it comes."""
    try:
        import pennylane
    except ImportError as error:
        raise ImportError(
            "PennyLane is not installed: pip install pennylane, or lightlib with its extra [lab]; "
            "lightlib.quantum.circuit runs without it"
        ) from error
    return pennylane


def apply_gates(circuit: Circuit, weights: Tensor, x: Tensor) -> None:
    """Queue the circuit's gates; x (qubits) or (B, qubits), which PennyLane broadcasts."""
    qml = import_pennylane()
    wires = range(circuit.qubits)
    for upload in range(circuit.uploads + 1):
        if upload:
            for j in wires:
                # x[j] would be a point, not a qubit, of a batch, and pass unseen where B equals the qubits
                qml.RZ(x[..., j], wires=j)
        for k in range(circuit.blocks):
            for j in wires:
                qml.Rot(*weights[upload, k, j], wires=j)
            for pair in circuit.ring(k):
                (qml.CZ if circuit.entangler == "CZ" else qml.CNOT)(wires=pair)


def qnode(circuit: Circuit) -> Callable[[Tensor, Tensor], Tensor]:
    """`run` of this circuit by PennyLane's default.qubit: called as (weights, x) -> <Z> (..., qubits)."""
    qml = import_pennylane()

    @qml.qnode(qml.device("default.qubit"), interface="torch", diff_method="backprop")
    def node(weights: Tensor, x: Tensor):
        apply_gates(circuit, weights, x)
        return [qml.expval(qml.Z(j)) for j in range(circuit.qubits)]

    def call(weights: Tensor, x: Tensor) -> Tensor:
        check(circuit, weights, x)
        flat = x.reshape(-1, circuit.qubits) if x.ndim > 2 else x
        return torch.stack(node(weights, flat), -1).reshape(x.shape).to(x.dtype)

    return call


def draw(circuit: Circuit):
    """The circuit's gates as a matplotlib figure, angles left out."""
    qml = import_pennylane()

    def gates():
        apply_gates(circuit, torch.zeros(circuit.weights_shape), torch.zeros(circuit.qubits))
        return [qml.expval(qml.Z(j)) for j in range(circuit.qubits)]

    figure, _ = qml.draw_mpl(gates)()
    return figure
