"""QIREN: its size, its two back ends, and that a point is a point whatever the batch."""

import math

import pytest
import torch
from torch.testing import assert_close

from lightlib.quantum.baselines import count
from lightlib.quantum.circuit import Circuit, run
from lightlib.quantum.fitting import settle
from lightlib.quantum.layer import QIREN, QuantumLayer


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def points(n, inputs, seed=1):
    return 2 * torch.rand(n, inputs, generator=drawn(seed)) - 1


@pytest.mark.parametrize(("inputs", "learnt"), [(1, 649), (2, 657)])
def test_the_papers_defaults_have_the_papers_number_of_parameters(inputs, learnt):
    assert count(QIREN(inputs, 1)) == learnt


@pytest.mark.parametrize("entangler", ["CZ", "CNOT", "none"])
def test_both_back_ends_give_the_same_values_and_gradients(entangler):
    pytest.importorskip("pennylane")
    x, single, double = points(7, 2), [], []
    for backend in ("torch", "pennylane"):
        model = QIREN(2, 1, qubits=3, entangler=entangler, backend=backend, generator=drawn())
        single.append(model(x))
        out = model.double()(x.double())
        out.square().sum().backward()
        double.append([out, *(p.grad for p in model.parameters())])
    assert single[1].dtype == torch.float32
    assert_close(*single, atol=1e-5, rtol=0)
    for ours, theirs in zip(*double, strict=True):
        assert_close(ours, theirs, atol=1e-9, rtol=0)


def test_a_layer_with_zero_weights_gives_one():
    layer = QuantumLayer(Circuit(3, uploads=2))
    torch.nn.init.zeros_(layer.weights)
    assert_close(layer(points(5, 3)), torch.ones(5, 3))


def test_weights_start_all_around_the_circle():
    weights = QuantumLayer(Circuit(8, uploads=5, blocks=4), generator=drawn()).weights
    assert 0 <= weights.min() < 0.1 and 6.18 < weights.max() <= 2 * math.pi
    assert weights.mean().item() == pytest.approx(math.pi, abs=0.25)


def test_a_layer_is_its_circuit():
    circuit = Circuit(3, uploads=2, entangler="CNOT")
    layer, x = QuantumLayer(circuit, generator=drawn()), points(5, 3)
    assert_close(layer(x), run(circuit, layer.weights, x))


@pytest.mark.parametrize("backend", ["torch", "pennylane"])
def test_as_many_points_as_qubits_are_the_same_points_one_by_one(backend):
    if backend == "pennylane":
        pytest.importorskip("pennylane")
    model, x = QIREN(2, 1, qubits=3, layers=2, backend=backend, generator=drawn()), points(3, 2)
    settle(model, points(20, 2, seed=2))
    model.eval()
    assert_close(model(x), torch.cat([model(one[None]) for one in x]))


def test_the_same_generator_draws_the_same_network_and_leaves_torchs_own_alone():
    before = torch.get_rng_state()
    a, b = (QIREN(1, 1, qubits=3, generator=drawn()) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_gain_scales_the_angles_of_the_first_layer_alone():
    plain, wide = (QIREN(2, 1, qubits=3, gain=g, generator=drawn()) for g in (1.0, 5.0))
    x = points(40, 2)
    first, wider = (model.layers[0][:2](x) for model in (plain, wide))
    assert_close(wider, 5 * first)
    assert_close(first.std(0, correction=0), torch.ones(3), atol=1e-2, rtol=0)
    assert_close(wide.layers[1][1].weight, torch.ones(3))


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"gain": 0.0}, "gain=0.0"),
        ({"layers": 0}, "layers=0"),
        ({"backend": "qiskit"}, "backend='qiskit'"),
        ({"qubits": 0}, "qubits=0"),
    ],
)
def test_what_cannot_be_is_refused(knobs, said):
    with pytest.raises(ValueError, match=said):
        QIREN(1, 1, **knobs)
