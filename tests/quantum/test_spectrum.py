import math

import pytest
import torch
from torch.testing import assert_close

from lightlib.quantum.circuit import Circuit, run
from lightlib.quantum.light_cone import reached, reached_frequencies
from lightlib.quantum.spectrum import (
    exponential_scales,
    free_directions,
    frequencies,
    measured_spectrum,
)
from tests.quantum.test_circuit import drawn, every_entangler


def tensor(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def found(circuit, scales=None, qubit=0, seed=0):
    """The frequencies whose coefficients are not 0 at weights drawn at random."""
    spectrum = measured_spectrum(circuit, drawn(circuit, seed=seed)[0], scales, qubit=qubit)
    return spectrum.frequencies[spectrum.coefficients.abs() > 1e-11]


def test_a_cosine_has_two_coefficients_of_one_half():
    circuit = Circuit(1, uploads=2, blocks=1)
    weights = torch.zeros(circuit.weights_shape)
    weights[0, 0, 0, 1], weights[2, 0, 0, 1] = math.pi / 2, -math.pi / 2
    spectrum = measured_spectrum(circuit, weights)
    expected = torch.where(spectrum.frequencies.abs() == 2, 0.5, 0.0).to(torch.complex128)
    assert_close(spectrum.coefficients, expected, rtol=0, atol=1e-6)


def test_zero_weights_leave_the_constant_one():
    circuit = Circuit(3)
    spectrum = measured_spectrum(circuit, torch.zeros(circuit.weights_shape), exponential_scales(circuit))
    assert spectrum.count() == 1
    assert_close(spectrum.coefficients[spectrum.frequencies == 0], torch.ones(1, dtype=torch.complex128))


def test_the_coefficients_sum_up_to_the_function():
    circuit, scales = Circuit(3, 2, 2), tensor(1, -5, 2)
    weights, x = drawn(circuit)[0], tensor(0.3, -2.0, 11.0)
    spectrum = measured_spectrum(circuit, weights, scales, qubit=1)
    series = torch.exp(1j * x[:, None] * spectrum.frequencies) @ spectrum.coefficients
    assert_close(series, run(circuit, weights, x[:, None] * scales)[:, 1].to(torch.complex128))


@pytest.mark.parametrize("entangler", ["CZ", "CNOT"])
@pytest.mark.parametrize(("qubits", "uploads"), [(n, L) for n in (1, 2, 3) for L in (1, 2, 3)])
def test_without_and_with_scales_the_counts_are_those_of_theory(qubits, uploads, entangler):
    circuit = Circuit(qubits, uploads, 2, entangler)
    plain, scaled = frequencies(circuit), frequencies(circuit, exponential_scales(circuit))
    most = qubits * uploads
    assert plain.tolist() == list(range(-most, most + 1))
    assert len(scaled) == (2 * uploads + 1) ** qubits
    if (qubits, entangler) != (2, "CZ"):  # whose ring cancels itself
        assert torch.equal(found(circuit), plain)
        assert torch.equal(found(circuit, exponential_scales(circuit)), scaled)


@every_entangler
@pytest.mark.parametrize(
    ("qubits", "uploads", "blocks"),
    [(2, 1, 1), (2, 2, 2), (3, 2, 1), (3, 1, 3), (4, 1, 1), (4, 2, 2), (4, 1, 3)],
)
def test_each_qubit_reads_just_the_frequencies_that_its_light_cone_reaches(
    qubits, uploads, blocks, entangler
):
    circuit = Circuit(qubits, uploads, blocks, entangler)
    for qubit in range(qubits):
        for scales in (None, exponential_scales(circuit)):
            assert torch.equal(found(circuit, scales, qubit), reached_frequencies(circuit, qubit, scales))


@pytest.mark.parametrize(
    ("qubits", "uploads", "scaled", "reaches", "offered"),
    [(2, 1, False, 3, 5), (4, 2, False, 13, 17), (4, 2, True, 359, 625), (8, 2, False, 21, 33)],
)
def test_rings_that_cancel_or_come_late_cost_frequencies(qubits, uploads, scaled, reaches, offered):
    circuit = Circuit(qubits, uploads)
    scales = exponential_scales(circuit) if scaled else None
    assert len(frequencies(circuit, scales)) == offered
    assert len(reached_frequencies(circuit, 0, scales)) == reaches
    assert measured_spectrum(circuit, drawn(circuit)[0], scales).count() == reaches


def test_a_read_out_reaches_its_neighbours_and_further_with_every_layer():
    assert reached(Circuit(3, 2, 2, "none"), 1) == ((1,), (1,))
    assert reached(Circuit(2, 2, 2), 1) == ((1,), (1,))
    assert reached(Circuit(5, 1, 1), 2) == ((2,),)  # its only ring comes right before the read-out
    assert reached(Circuit(6, 2, 2), 0) == ((0, 1, 2, 3, 4, 5), (0, 1, 5))
    assert reached(Circuit(4, 2, 2), 0) == ((0, 1, 2, 3), (0, 1, 3))


def test_scales_of_any_sign_and_size_have_their_sums():
    circuit = Circuit(2, 1, 2, "CNOT")
    assert_close(
        frequencies(circuit, tensor(0.1, 2.5)), tensor(-2.6, -2.5, -2.4, -0.1, 0, 0.1, 2.4, 2.5, 2.6)
    )
    assert frequencies(circuit, tensor(0, 0)).tolist() == [0]
    assert reached_frequencies(circuit, 0, torch.tensor([1, 3])).tolist() == list(
        range(-4, 5)
    )  # whole tensors too
    assert torch.equal(found(circuit, tensor(-3, 2)), reached_frequencies(circuit, 0, tensor(-3, 2)))
    assert reached_frequencies(circuit, 0, tensor(3, 0)).tolist() == [-3, 0, 3]


def test_more_samples_show_nothing_above_the_highest_frequency():
    circuit = Circuit(3, 2)
    weights, _ = drawn(circuit)
    once, thrice = (measured_spectrum(circuit, weights, oversample=k) for k in (1, 3))
    assert (len(once.frequencies), len(thrice.frequencies)) == (13, 39)
    assert_close(thrice.coefficients[13:26], once.coefficients)
    assert thrice.count() == once.count() == 13


def test_exponentially_many_frequencies_are_not_free():
    circuit = Circuit(3, 2)
    weights, _ = drawn(circuit)
    assert free_directions(circuit, weights) == len(frequencies(circuit)) == 13
    free = free_directions(circuit, weights, exponential_scales(circuit))
    assert 13 < free <= weights.numel() < len(frequencies(circuit, exponential_scales(circuit)))
    assert free_directions(Circuit(1, blocks=1), torch.zeros(2, 1, 1, 3)) == 0  # at the top of the cosine


def test_what_has_no_spectrum_here_is_refused():
    circuit = Circuit(2)
    weights, _ = drawn(circuit)
    with pytest.raises(ValueError, match="whole numbers"):
        measured_spectrum(circuit, weights, tensor(1, 0.5))
    with pytest.raises(ValueError, match="whole numbers"):
        reached_frequencies(circuit, 0, tensor(1, -0.25))
    with pytest.raises(ValueError, match="finite"):
        frequencies(circuit, tensor(1, math.inf))
    with pytest.raises(ValueError, match=r"scales are \(3,\), but the circuit has 2 qubits"):
        frequencies(circuit, tensor(1, 2, 3))
    with pytest.raises(ValueError, match="oversample=0"):
        measured_spectrum(circuit, weights, oversample=0)
    for qubit in (2, -1):
        with pytest.raises(ValueError, match=f"qubit={qubit}"):
            measured_spectrum(circuit, weights, qubit=qubit)
        with pytest.raises(ValueError, match=f"qubit={qubit}"):
            reached(circuit, qubit)


def test_a_spectrum_too_large_is_refused_before_it_is_made():
    circuit = Circuit(10, 2)
    for of in (frequencies, lambda c, s: reached_frequencies(c, 0, s)):
        with pytest.raises(ValueError, match="more than 1000000"):
            of(circuit, exponential_scales(circuit))
    with pytest.raises(ValueError, match="more than 1000000"):
        measured_spectrum(circuit, drawn(circuit)[0], exponential_scales(circuit))
    with pytest.raises(ValueError, match=r"4\^10 Pauli strings"):
        reached(circuit)
