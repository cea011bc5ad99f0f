import cmath
import math

import pytest
import torch
from torch.testing import assert_close

from lightlib.quantum import circuit as module
from lightlib.quantum.circuit import ENTANGLERS, Circuit, run, state, unitaries

every_entangler = pytest.mark.parametrize("entangler", ENTANGLERS)


def drawn(circuit, *batch, seed=0, dtype=torch.float64):
    """Weights over two turns either way, so that every cosine and sine is negative somewhere, and angles."""
    generator = torch.Generator().manual_seed(seed)
    weights = 12 * torch.rand(circuit.weights_shape, generator=generator, dtype=dtype) - 6
    return weights, 3 * torch.randn(*batch, circuit.qubits, generator=generator, dtype=dtype)


@every_entangler
@pytest.mark.parametrize("qubits", [1, 2, 3, 7])
def test_zero_weights_read_one_whatever_is_uploaded(qubits, entangler):
    circuit = Circuit(qubits, 2, 3, entangler)
    weights, x = drawn(circuit, 5)
    assert_close(run(circuit, 0 * weights, x), torch.ones_like(x))


@pytest.mark.parametrize("theta", [0.0, 0.4, 2.0, 4.0, -1.0])
def test_one_qubit_turned_by_theta_reads_its_cosine(theta):
    circuit = Circuit(1, blocks=1)
    weights = torch.zeros(circuit.weights_shape, dtype=torch.float64)
    weights[0, 0, 0, 1] = theta
    assert run(circuit, weights, torch.tensor([0.7], dtype=torch.float64)).item() == pytest.approx(
        math.cos(theta)
    )


def test_one_qubit_between_two_quarter_turns_reads_the_cosine_of_what_is_uploaded():
    circuit = Circuit(1, uploads=2, blocks=1)
    weights = torch.zeros(circuit.weights_shape, dtype=torch.float64)
    weights[0, 0, 0, 1], weights[2, 0, 0, 1] = math.pi / 2, -math.pi / 2
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)[:, None]
    assert_close(run(circuit, weights, x), (2 * x).cos())


def test_a_rot_turns_first_by_phi_then_by_theta_then_by_omega():
    circuit, x = Circuit(1, blocks=1), torch.zeros(1, dtype=torch.float64)
    weights = torch.zeros(circuit.weights_shape, dtype=torch.float64)
    weights[0, 0, 0] = torch.tensor([0.3, 0.5, 0.9])
    expected = torch.tensor([math.cos(0.25) * cmath.exp(-0.6j), math.sin(0.25) * cmath.exp(0.3j)])
    assert_close(state(circuit, weights, x), expected.to(torch.complex128))


def test_without_entanglers_every_qubit_is_alone():
    circuit = Circuit(3, 2, 2, "none")
    weights, x = drawn(circuit, 4)
    alone = [run(Circuit(1, 2, 2), weights[:, :, j : j + 1], x[:, j : j + 1]) for j in range(3)]
    assert_close(run(circuit, weights, x), torch.cat(alone, -1))


def test_two_qubits_in_a_ring_of_controlled_z_are_not_entangled():
    weights, x = drawn(Circuit(2, 2, 2), 4)
    assert_close(run(Circuit(2, 2, 2), weights, x), run(Circuit(2, 2, 2, "none"), weights, x))
    assert not torch.allclose(run(Circuit(2, 2, 2, "CNOT"), weights, x), run(Circuit(2, 2, 2), weights, x))


@pytest.mark.parametrize("qubits", [3, 5, 7])
def test_controlled_z_before_the_read_out_do_nothing(qubits):
    weights, x = drawn(Circuit(qubits, blocks=1), 4)
    weights[0] = 0  # |0...0> up to the last layer
    with_ring, without, turned = (run(Circuit(qubits, 1, 1, e), weights, x) for e in ("CZ", "none", "CNOT"))
    assert_close(with_ring, without)
    assert not torch.allclose(with_ring, turned)


@every_entangler
@pytest.mark.parametrize("qubits", [1, 2, 4, 7, 8])
def test_the_state_keeps_norm_one(qubits, entangler):
    circuit = Circuit(qubits, 2, 2, entangler)
    psi = state(circuit, *drawn(circuit, 2, 3))
    assert psi.shape == (2, 3, 2**qubits) and psi.dtype == torch.complex128
    assert_close(psi.abs().square().sum(-1), torch.ones(2, 3, dtype=torch.float64))


@every_entangler
@pytest.mark.parametrize("qubits", [1, 2, 3, 6])
def test_halves_of_the_qubits_give_what_the_whole_matrices_give(qubits, entangler, monkeypatch):
    circuit = Circuit(qubits, 2, 3, entangler)
    weights, x = drawn(circuit, 4)
    found = []
    for dense in (0, qubits):
        monkeypatch.setattr(module, "DENSE_QUBITS", dense)
        w, angles = weights.clone().requires_grad_(), x.clone().requires_grad_()
        run(circuit, w, angles).square().sum().backward()
        found.append((state(circuit, weights, x), w.grad, angles.grad))
    assert_close(*found)


@every_entangler
def test_a_parameter_layer_is_unitary_and_the_identity_at_zero_without_rings(entangler):
    circuit = Circuit(4, 1, 2, entangler)
    weights, _ = drawn(circuit)
    V, eye = unitaries(circuit, weights), torch.eye(16, dtype=torch.complex128).expand(2, 16, 16)
    assert_close(V @ V.mH, eye)
    assert torch.equal(unitaries(circuit, 0 * weights), eye) == (entangler == "none")


def test_any_leading_shape_gives_what_point_after_point_gives():
    circuit = Circuit(3)
    weights, x = drawn(circuit, 2, 3)  # batches of as many points as qubits among them
    whole = run(circuit, weights, x)
    assert whole.shape == x.shape
    assert_close(whole, torch.stack([torch.stack([run(circuit, weights, p) for p in row]) for row in x]))
    assert run(circuit, weights, x[:, :0]).shape == (2, 0, 3)


def test_one_value_for_all_qubits_is_an_expanded_column():
    circuit = Circuit(3)
    weights, x = drawn(circuit, 5)
    column = x[:, :1]
    assert_close(run(circuit, weights, column.expand(-1, 3)), run(circuit, weights, column.repeat(1, 3)))
    with pytest.raises(ValueError, match=r"expand\(..., 3\)"):
        run(circuit, weights, column)


@every_entangler
@pytest.mark.parametrize("qubits", [1, 2, 3])
def test_gradients_are_those_of_small_differences(qubits, entangler):
    circuit = Circuit(qubits, 1, 2, entangler)
    weights, x = (t.requires_grad_() for t in drawn(circuit, 2))
    assert torch.autograd.gradcheck(lambda w, a: run(circuit, w, a), (weights, x))


def test_gradients_at_zero_angles_are_those_of_small_differences():
    circuit = Circuit(2, 1, 2, "CNOT")
    weights, x = (torch.zeros_like(t).requires_grad_() for t in drawn(circuit, 2))
    weights.data[0, 0, :, 1] = math.pi / 2
    assert torch.autograd.gradcheck(lambda w, a: run(circuit, w, a), (weights, x))


@every_entangler
@pytest.mark.parametrize("qubits", [3, 8])
def test_single_precision_is_close_to_double(qubits, entangler):
    circuit = Circuit(qubits, 2, 2, entangler)
    weights, x = drawn(circuit, 6)
    single = run(circuit, weights.float(), x.float())
    assert single.dtype == torch.float32
    assert_close(single.double(), run(circuit, weights, x), rtol=0, atol=1e-5)
    assert state(circuit, weights.float(), x.float()).dtype == torch.complex64


def test_the_ring_of_each_block_reaches_one_qubit_further():
    assert Circuit(4, entangler="CNOT").ring(0) == [(0, 1), (1, 2), (2, 3), (3, 0)]
    assert Circuit(4).ring(1) == [(0, 2), (1, 3), (2, 0), (3, 1)]
    assert Circuit(4).ring(3) == Circuit(4).ring(0)
    assert Circuit(1).ring(0) == Circuit(4, entangler="none").ring(0) == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(qubits=0), "qubits=0"),
        (dict(qubits=2, uploads=0), "uploads=0"),
        (dict(qubits=2, blocks=-1), "blocks=-1"),
        (dict(qubits=2, entangler="CY"), "'CY' is none of CZ, CNOT, none"),
    ],
)
def test_a_circuit_that_is_none_is_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        Circuit(**settings)


def test_what_does_not_fit_the_circuit_is_refused():
    circuit = Circuit(3)
    weights, x = drawn(circuit, 4)
    with pytest.raises(ValueError, match=r"weights are \(1, 2, 3, 3\), but weights_shape is \(2, 2, 3, 3\)"):
        run(circuit, weights[1:], x)
    for wrong in (x[:, :2], x.mT, x[0, 0]):
        with pytest.raises(ValueError, match="last dimension"):
            run(circuit, weights, wrong)
    with pytest.raises(ValueError, match="both float32 or both float64"):
        run(circuit, weights, x.float())
    with pytest.raises(ValueError, match="both float32 or both float64"):
        run(circuit, weights.half(), x.half())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_entangler
@pytest.mark.parametrize("qubits", [4, 10])
def test_a_cuda_device_gives_what_a_cpu_gives(qubits, entangler):
    circuit, found = Circuit(qubits, 2, 2, entangler), []
    weights, x = drawn(circuit, 4096, dtype=torch.float32)
    for device in ("cpu", "cuda"):
        w, angles = (t.detach().to(device).requires_grad_() for t in (weights, x))
        z = run(circuit, w, angles)
        z.square().mean().backward()
        assert z.device.type == device
        found.append([t.detach().cpu() for t in (z, w.grad, angles.grad)])
    assert_close(*found, rtol=1e-3, atol=1e-4)
