import pytest
import torch
from torch.testing import assert_close

from lightlib.quantum import shift
from lightlib.quantum.circuit import Circuit, run
from lightlib.quantum.shift import shift_gradients, shift_runs
from tests.quantum.test_circuit import drawn, every_entangler


@every_entangler
@pytest.mark.parametrize(("qubits", "uploads", "blocks"), [(1, 1, 1), (2, 3, 1), (3, 2, 2)])
def test_shifts_give_the_gradients_of_autograd(qubits, uploads, blocks, entangler):
    circuit = Circuit(qubits, uploads, blocks, entangler)
    weights, x = drawn(circuit)
    expected = torch.autograd.functional.jacobian(lambda w, a: run(circuit, w, a), (weights, x))
    assert_close(shift_gradients(circuit, weights, x), expected, rtol=0, atol=1e-6)


def test_each_point_of_a_batch_has_its_own_gradients():
    circuit = Circuit(2, entangler="CNOT")
    weights, x = drawn(circuit, 3, 2)
    by_weights, by_x = shift_gradients(circuit, weights, x)
    assert by_weights.shape == (3, 2, 2, *circuit.weights_shape) and by_x.shape == (3, 2, 2, 2)
    assert_close(shift_gradients(circuit, weights, x[2, 1]), (by_weights[2, 1], by_x[2, 1]))


def test_an_angle_takes_two_runs_and_an_upload_none(monkeypatch):
    circuit, calls = Circuit(2, 2, 2), []
    monkeypatch.setattr(shift, "run", lambda *given: calls.append(1) or run(*given))
    shift_gradients(circuit, *drawn(circuit))
    assert len(calls) == shift_runs(circuit) == 2 * (2 + 1) * 2 * 2 * 3


def test_what_is_not_of_the_circuit_is_refused():
    circuit = Circuit(2)
    weights, x = drawn(circuit)
    with pytest.raises(ValueError, match="weights_shape"):
        shift_gradients(circuit, weights[0], x)
