"""QIREN: a function of coordinates as quantum circuits between linear layers.

Zhao, Qiao, Zhang, Gao 2024, "Quantum Implicit Neural Representations", ICML, arXiv:2406.03873.
A hybrid layer is Linear -> batch norm -> circuit. The circuit is a Fourier series of its angles; the linear
layer scales and shifts the coordinates for every qubit, and so chooses the frequencies.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from lightlib.quantum.circuit import Circuit, run
from lightlib.quantum.pennylane_circuit import qnode

BACKENDS = ("torch", "pennylane")


class QuantumLayer(nn.Module):
    """Angles (..., qubits) to <Z_j> (..., qubits) of a circuit whose weights learn; they start in [0, 2 pi).

    backend: "torch" is `circuit.run`; "pennylane" is the same circuit on PennyLane's simulator: much slower,
    and there to be compared with.
    """

    def __init__(self, circuit: Circuit, backend: str = "torch", generator: torch.Generator | None = None):
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} is none of {', '.join(BACKENDS)}")
        self.circuit, self.backend = circuit, backend
        self.weights = nn.Parameter(2 * math.pi * torch.rand(circuit.weights_shape, generator=generator))
        self.run = partial(run, circuit) if backend == "torch" else qnode(circuit)

    def forward(self, x: Tensor) -> Tensor:
        # PennyLane's simulator computes in float64 whatever it is given
        return self.run(self.weights, x).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.circuit}, backend={self.backend!r}"


class QIREN(nn.Module):
    """`layers` hybrid layers of `qubits` qubits, then a Linear: (points, inputs) -> (points, outputs).

    gain: what the first batch norm multiplies its output with at the start; the angles' deviation, and so the
    scale of the frequencies that the network begins with. With 8 qubits it learns 649 numbers for one
    coordinate and 657 for two. In training mode the batch norms tie the points of a batch together, and their
    running statistics lag behind: `fitting.settle` sets them from the training points before other points are
    asked for; `fitting.fit` does so.
    """

    def __init__(
        self, inputs: int, outputs: int, *, qubits: int = 8, layers: int = 3, uploads: int = 2,
        blocks: int = 2, entangler: str = "CZ", backend: str = "torch", gain: float = 1.0,
        generator: torch.Generator | None = None,
    ):  # fmt: skip
        super().__init__()
        if min(inputs, outputs, layers) < 1:
            raise ValueError(f"inputs={inputs}, outputs={outputs}, layers={layers}: each must be at least 1")
        circuit = Circuit(qubits, uploads, blocks, entangler)
        self.layers = nn.ModuleList(
            hybrid(inputs if i == 0 else qubits, circuit, backend, gain if i == 0 else 1.0, generator)
            for i in range(layers)
        )
        self.last = linear(qubits, outputs, generator)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)  # (points, qubits)
        return self.last(x)


def hybrid(
    inputs: int, circuit: Circuit, backend: str = "torch", gain: float = 1.0,
    generator: torch.Generator | None = None,
) -> nn.Sequential:  # fmt: skip
    """One hybrid layer: (points, inputs) -> (points, qubits), values from -1 to 1."""
    n = circuit.qubits
    return nn.Sequential(
        linear(inputs, n, generator), batch_norm(n, gain), QuantumLayer(circuit, backend, generator)
    )


def linear(
    inputs: int, outputs: int, generator: torch.Generator | None = None, bound: float | None = None
) -> nn.Linear:
    """A Linear whose weights are uniform within `bound`, by default as its bias within 1/sqrt(inputs)."""
    # the usual constructor would draw from torch's own generator
    layer, plain = nn.utils.skip_init(nn.Linear, inputs, outputs), 1 / math.sqrt(inputs)
    for part, limit in ((layer.weight, plain if bound is None else bound), (layer.bias, plain)):
        nn.init.uniform_(part, -limit, limit, generator=generator)
    return layer


def batch_norm(width: int, gain: float = 1.0) -> nn.BatchNorm1d:
    """A batch norm (points, width) with this initial gain. Raises ValueError for a gain of 0 or less."""
    if not gain > 0:
        raise ValueError(f"gain={gain}: must be above 0")
    norm = nn.BatchNorm1d(width)
    nn.init.constant_(norm.weight, gain)
    return norm
