"""Gradients from runs of the circuit alone, as hardware has them: each angle shifted by a quarter turn.

Mitarai et al. 2018, arXiv:1803.00745; Schuld et al. 2019, arXiv:1811.11184.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightlib.quantum.circuit import Circuit, check, run


@torch.no_grad()
def shift_gradients(circuit: Circuit, weights: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """d<Z>/d weights (..., qubits, *weights_shape) and d<Z>/dx (..., qubits, qubits), exact at any angle.

    An angle of one gate only enters as its cosine and sine, so df/da = (f(a + pi/2) - f(a - pi/2)) / 2: two
    runs a weight, `shift_runs` in all. x takes no more: after each upload's RZ(x_j) comes the RZ(phi) of the
    next Rot, so that phi's derivative is this upload's.
    """
    check(circuit, weights, x)
    flat = weights.flatten()
    columns = [
        (shifted(circuit, flat, i, x, math.pi / 2) - shifted(circuit, flat, i, x, -math.pi / 2)) / 2
        for i in range(len(flat))
    ]
    by_weights = torch.stack(columns, -1).unflatten(-1, circuit.weights_shape)  # (..., n, L + 1, K, n, 3)
    # every upload of x_j is one more place where it acts
    by_x = by_weights[..., 1:, 0, :, 0].sum(-2)  # (..., n, n)
    return by_weights, by_x


def shift_runs(circuit: Circuit) -> int:
    """How many runs the gradients of one point take; autograd, on a simulator, takes one there and back."""
    return 2 * math.prod(circuit.weights_shape)


def shifted(circuit: Circuit, flat: Tensor, i: int, x: Tensor, by: float) -> Tensor:
    """<Z> with weight i of the flat weights moved."""
    moved = flat.index_add(0, torch.tensor([i], device=flat.device), flat.new_tensor([by]))
    return run(circuit, moved.view(circuit.weights_shape), x)
