import math

import pennylane as qml
import pytest
import torch
from torch.testing import assert_close

from lightlib.quantum import noise
from lightlib.quantum.circuit import Circuit, run
from lightlib.quantum.noise import run_depolarized, run_perturbed
from tests.quantum.test_circuit import drawn, every_entangler


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@every_entangler
def test_no_noise_is_the_circuit_itself(entangler):
    circuit = Circuit(3, 2, 2, entangler)
    weights, x = drawn(circuit, 2, 2)
    still = run(circuit, weights, x)
    assert torch.equal(
        run_perturbed(circuit, weights, x, 0.0, seeded(), draws=2), torch.stack([still, still])
    )
    assert_close(run_depolarized(circuit, weights, x, 0.0), still)


def test_each_draw_is_the_circuit_with_other_weights():
    circuit = Circuit(2, entangler="CNOT")
    weights, x = drawn(circuit, 3)
    off = torch.randn(4, *weights.shape, generator=seeded(5), dtype=torch.float64)
    expected = [run(circuit, weights + 0.2 * one, x) for one in off]
    assert_close(run_perturbed(circuit, weights, x, 0.2, seeded(5), draws=4), torch.stack(expected))


def test_on_average_an_angle_that_is_off_shrinks_its_cosine():
    circuit = Circuit(1, blocks=1)
    weights = torch.zeros(circuit.weights_shape, dtype=torch.float64)
    weights[0, 0, 0, 1] = 0.5
    mean = run_perturbed(circuit, weights, torch.zeros(1).double(), 0.4, seeded(), draws=3000).mean()
    # both layers' theta are off: exp(-eps^2 / 2) for each
    assert mean.item() == pytest.approx(math.cos(0.5) * math.exp(-(0.4**2)), abs=0.01)


def test_alone_each_block_shrinks_what_is_read_by_the_same_factor():
    circuit = Circuit(2, 2, 3, "none")
    weights, x = drawn(circuit, 4)
    assert_close(
        run_depolarized(circuit, weights, x, 0.06), (1 - 4 * 0.06 / 3) ** 9 * run(circuit, weights, x)
    )


@every_entangler
def test_where_nothing_of_a_qubit_is_left_all_read_zero(entangler):
    circuit = Circuit(3, 1, 2, entangler)
    weights, x = drawn(circuit, 4)
    assert_close(run_depolarized(circuit, weights, x, 0.75), torch.zeros_like(x))


@pytest.mark.parametrize("entangler", ["CZ", "CNOT"])
@pytest.mark.parametrize("qubits", [2, 3])
def test_pennylanes_density_matrices_read_the_same(qubits, entangler):
    circuit, p = Circuit(qubits, 1, 2, entangler), 0.07
    weights, x = drawn(circuit, qubits)

    @qml.qnode(qml.device("default.mixed", wires=qubits))
    def node(x):
        for upload, layer in enumerate(weights.numpy()):
            if upload:
                qml.AngleEmbedding(x, wires=range(qubits), rotation="Z")
            for k, block in enumerate(layer):
                for j in range(qubits):
                    qml.Rot(*block[j], wires=j)
                for pair in circuit.ring(k):
                    (qml.CZ if entangler == "CZ" else qml.CNOT)(wires=pair)
                for j in range(qubits):
                    qml.DepolarizingChannel(p, wires=j)
        return [qml.expval(qml.Z(j)) for j in range(qubits)]

    expected = torch.tensor([[float(z) for z in node(point.numpy())] for point in x], dtype=torch.float64)
    assert_close(run_depolarized(circuit, weights, x, p), expected, rtol=0, atol=1e-6)


def test_gradients_pass_through_noise():
    circuit = Circuit(2, entangler="CNOT")
    weights, x = (t.requires_grad_() for t in drawn(circuit, 2))
    assert torch.autograd.gradcheck(lambda w, a: run_depolarized(circuit, w, a, 0.1), (weights, x))
    assert torch.autograd.gradcheck(lambda w, a: run_perturbed(circuit, w, a, 0.1, seeded(), 2), (weights, x))


def test_noise_that_is_none_is_refused(monkeypatch):
    circuit = Circuit(2)
    weights, x = drawn(circuit, 3)
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="is no probability"):
            run_depolarized(circuit, weights, x, p)
    with pytest.raises(ValueError, match=r"eps=-0.1"):
        run_perturbed(circuit, weights, x, -0.1, seeded())
    with pytest.raises(ValueError, match="draws=0"):
        run_perturbed(circuit, weights, x, 0.1, seeded(), draws=0)
    with pytest.raises(ValueError, match="last dimension"):
        run_depolarized(circuit, weights, x[:, :1], 0.1)
    monkeypatch.setattr(noise, "MOST_ENTRIES", 3 * 16 - 1)
    with pytest.raises(ValueError, match=r"3 points of 2 qubits need 3 \* 4\^2 numbers"):
        run_depolarized(circuit, weights, x, 0.1)
