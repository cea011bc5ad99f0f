"""The explorers of lesson 20: arrows, spectra and fits equal to those of lightlib.quantum."""

import base64
import itertools
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lightlib.quantum.baselines import count
from lightlib.quantum.circuit import ENTANGLERS, Circuit, run
from lightlib.quantum.fitting import fit
from lightlib.quantum.light_cone import reached_frequencies
from lightlib.quantum.signals import Signal, chirp, grid
from lightlib.quantum.spectrum import exponential_scales, frequencies, measured_spectrum
from lightlib.widgets.bloch_sphere import PLUS, TALL, ZERO, bloch_sphere, measured, seen, standard_error
from lightlib.widgets.circuit_spectrum import ALL_ONE, EXPONENTIAL, circuit_spectrum, weights_of
from lightlib.widgets.signal_fit import KNOBS, LISTED, PRESETS, SLICE, Choice, network, signal_fit
from tests.explorers import is_the_same_twice, redraws_within_200_ms


def small_fit(**options):
    return signal_fit({"chirp": chirp(60), "wave": wave()}, qubits=3, **options)


def wave(points=40):
    return Signal(grid(points), torch.sin(3 * grid(points)))


every_explorer = pytest.mark.parametrize("make", [bloch_sphere, circuit_spectrum, signal_fit])


@every_explorer
def test_two_of_a_kind_are_equal_and_every_description_is_wide_enough(make):
    is_the_same_twice(make)


@every_explorer
def test_without_a_kernel_there_is_a_picture_and_its_numbers(make):
    bundle = make()._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert bundle["text/plain"].startswith(f"{make.__name__}(") and " -> " in bundle["text/plain"]


@pytest.mark.alone
@every_explorer
def test_every_control_redraws_within_200_ms(make):
    redraws_within_200_ms(make)


# the Bloch sphere
@pytest.mark.parametrize(
    ("phi", "theta", "omega"), [(0, 0, 0), (40, 60, 70), (200, 135, 305), (360, 270, 90)]
)
def test_from_zero_the_arrow_ends_where_the_angles_say(phi, theta, omega):
    shown = bloch_sphere().set(phi=phi, theta=theta, omega=omega).result
    t, w = math.radians(theta), math.radians(omega)
    expected = [math.sin(t) * math.cos(w), math.sin(t) * math.sin(w), math.cos(t)]
    assert shown["arrow"].tolist() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("gates", [1, 2, 3])
def test_the_height_is_z_of_the_circuit_of_one_qubit(gates):
    degrees = {"phi": 25, "theta": 110, "omega": 235}
    circuit = Circuit(1, uploads=1, blocks=1)
    weights = torch.zeros(circuit.weights_shape, dtype=torch.float64)
    done = torch.tensor(list(degrees.values()), dtype=torch.float64).deg2rad()
    weights[0, 0, 0, :gates] = done[:gates]
    z = run(circuit, weights, torch.zeros(1, dtype=torch.float64)).item()
    shown = bloch_sphere().set(gates=gates, **degrees).result
    assert shown["mean_Z"] == pytest.approx(z, abs=1e-8)
    assert shown["P0"] - shown["P1"] == pytest.approx(z, abs=1e-8) and shown["P0"] + shown["P1"] == 1
    a, b = shown["state"]
    assert (abs(a) ** 2, abs(b) ** 2) == pytest.approx((shown["P0"], shown["P1"]), abs=1e-8)
    assert complex(shown["amplitude_of_0"].replace("i", "j")) == pytest.approx(a, abs=1e-3)


def test_the_trail_goes_from_gate_to_gate_on_the_sphere_and_rz_keeps_its_height():
    shown = bloch_sphere().set(start=PLUS, phi=95, theta=200, omega=340).result
    by_phi, by_theta, by_omega = shown["trail"]
    assert by_phi[0].tolist() == pytest.approx([1, 0, 0], abs=1e-9)
    for before, after in itertools.pairwise(shown["trail"]):
        assert_close(before[-1], after[0])
    assert by_omega[-1].tolist() == pytest.approx(shown["arrow"].tolist(), abs=1e-8)
    for points in shown["trail"]:
        assert_close(np.linalg.norm(points, axis=1), np.ones(len(points)))
        assert np.linalg.norm(np.diff(points, axis=0), axis=1).max() < math.radians(3.01)
    assert np.ptp(by_phi[:, 2]) < 1e-9 and np.ptp(by_omega[:, 2]) < 1e-9 and np.ptp(by_theta[:, 1]) < 1e-9


def test_the_first_rz_gives_zero_a_phase_alone_but_turns_plus():
    ex = bloch_sphere().set(gates=1, phi=90)
    assert ex.result["arrow"].tolist() == [0, 0, 1] and "phase" in ex.result["says"]
    assert ex.result["amplitude_of_0"] == "0.707-0.707i"
    assert ex.set(start=PLUS).result["arrow"].tolist() == pytest.approx([0, 1, 0], abs=1e-8)
    assert not ex.set(gates=0, start=ZERO).result["trail"]


def test_shots_scatter_as_the_standard_error_says():
    z, shots = 0.4, 200
    means = torch.tensor([measured((1 + z) / 2, shots, seed) for seed in range(300)])
    assert means.mean().item() == pytest.approx(z, abs=0.02)
    assert means.std().item() == pytest.approx(standard_error(z, shots), rel=0.12)
    shown = bloch_sphere().set(theta=120, shots=10_000, seed=3).result
    assert shown["standard_error"] == pytest.approx(math.sqrt(0.75 / 10_000))
    assert shown["measured_Z"] == measured(0.25, 10_000, 3)


@pytest.mark.parametrize(("theta", "z"), [(0, 1), (180, -1), (360, 1)])
def test_at_a_pole_every_shot_is_the_same(theta, z):
    shown = bloch_sphere().set(theta=theta, shots=100).result
    assert (shown["mean_Z"], shown["measured_Z"], shown["standard_error"]) == (z, z, 0)


def test_the_bars_stand_as_high_as_the_axis_of_the_sphere_is_drawn():
    places, ahead = seen([(0, 0, 1), (0, 0, -0.5), (1, 0, 0), (0, 0, 0)])
    assert_close(places[:2, 1], np.array([TALL, -0.5 * TALL]))
    assert ahead[2] > 0 and places[2, 0] < 0 and places[3].tolist() == [0, 0]


# the spectrum
@pytest.mark.parametrize("entangler", ENTANGLERS)
@pytest.mark.parametrize("scales", [ALL_ONE, EXPONENTIAL])
def test_the_counts_are_those_of_theory_and_of_the_light_cone(scales, entangler):
    ex = circuit_spectrum().set(scales=scales, entangler=entangler)
    for qubits, uploads in itertools.product((1, 2, 3, 4), (1, 3)):
        circuit = Circuit(qubits, uploads, 2, entangler)
        by = exponential_scales(circuit) if scales == EXPONENTIAL else None
        shown = ex.set(qubits=qubits, uploads=uploads).result
        assert shown["offered"] == len(frequencies(circuit, by))
        assert shown["measured"] == len(reached_frequencies(circuit, 0, by))
        assert shown["measured"] == np.count_nonzero(shown["sizes"]) and len(ex._png) > 5000
        assert ("them all" in shown["says"]) == (shown["offered"] == shown["measured"])


def test_bars_and_curve_are_those_of_the_measured_spectrum():
    circuit, seed = Circuit(3, 2), 4
    weights, scales = weights_of(circuit, seed), exponential_scales(circuit)
    shown = circuit_spectrum().set(preset="three qubits, scaled", seed=seed).result
    spectrum = measured_spectrum(circuit, weights, scales)
    sizes = dict(zip(spectrum.frequencies.tolist(), spectrum.coefficients.abs().tolist(), strict=True))
    assert shown["sizes"].tolist() == pytest.approx([sizes[w] for w in shown["frequencies"]], abs=1e-11)
    x, f, parts = shown["curve"]
    series = (torch.exp(1j * x[:, None] * spectrum.frequencies) @ spectrum.coefficients).real
    assert parts == 1 and x[-1].item() == pytest.approx(2 * math.pi)
    assert_close(f, series, rtol=0, atol=1e-9)
    assert shown["angles"] == weights.numel() == 54


@pytest.mark.parametrize(
    ("preset", "counts"), [("pitfall: two qubits", (3, 5)), ("pitfall: four qubits", (13, 17))]
)
def test_a_ring_that_cancels_itself_is_seen_and_said(preset, counts):
    ex = circuit_spectrum().set(preset=preset)
    assert (ex.result["measured"], ex.result["offered"]) == counts
    assert "pitfall" in ex.result["says"] and "a CZ twice is no gate" in ex.result["says"]
    assert "pitfall" not in ex.set(entangler="CNOT").result["says"]
    assert ex.result["measured"] == ex.result["offered"]


def test_what_else_is_missing_or_not_free_is_said():
    ex = circuit_spectrum().set(qubits=3, uploads=2, scales=ALL_ONE, entangler="none")
    assert "its own uploads alone" in ex.result["says"]
    scaled = ex.set(entangler="CZ", scales=EXPONENTIAL).result["says"]
    assert "5^3 = 125" in scaled and "54 angles set 125 numbers" in scaled


def test_of_a_fast_function_only_a_part_of_the_period_is_drawn():
    ex = circuit_spectrum().set(qubits=4, uploads=3, scales=EXPONENTIAL, entangler="CNOT")
    x, f, parts = ex.result["curve"]
    assert ex.result["highest_offered"] == 1200 and parts == 32 and len(x) == len(f) == 601
    assert x[-1].item() == pytest.approx(2 * math.pi / 32)


# the fit
@pytest.mark.parametrize("model", KNOBS)
def test_the_errors_are_those_of_fit(model):
    ex = small_fit().set(model=model, scale=3.0, lr=0.03).advance(25)
    choice, signal = Choice("chirp", model, 3.0 if KNOBS[model] else None, 0.03), chirp(60)
    made = fit(network(choice, 3, 0), signal.x, signal.y, steps=25, lr=0.03, progress=False)
    assert ex.result["errors"] == pytest.approx(list(made.curve), rel=1e-5)
    assert ex.result["mse"] == ex.result["errors"][-1] and ex.result["untrained_mse"] == made.curve[0]
    given = ex.result["given"][:, None]
    assert (given - signal.y).square().mean().item() == pytest.approx(ex.result["mse"], rel=1e-5)


def test_slices_are_the_same_as_one_go_and_steps_back_show_what_was():
    slices, once = small_fit(), small_fit(steps=30)
    for _ in range(3):
        slices.advance()
    assert slices.result["errors"] == once.result["errors"] and repr(slices) == repr(once)
    back = slices.set(steps=10)
    assert back.result["mse"] == once.result["errors"][10]
    assert_close(back.result["given"], small_fit(steps=10).result["given"])
    assert small_fit().result["given"].equal(once.result["untrained"])


def test_all_networks_have_about_as_many_parameters():
    sizes = {m: count(network(Choice("", m, 1.0 if KNOBS[m] else None, 0.01), 5, 0)) for m in KNOBS}
    assert sizes["QIREN"] == 376 and all(abs(size / 376 - 1) < 0.1 for size in sizes.values())


def test_the_scale_is_each_networks_own_knob():
    def made(model, scale=3.0):
        return network(Choice("", model, scale, 0.01), 3, 0)

    assert (made("QIREN").layers[0][1].weight == 3).all() and made("SIREN").layers[1].omega == 3
    assert_close(made("RFF").layers[0].B, 3 * made("RFF", 1.0).layers[0].B)
    ex = small_fit().set(model="ReLU", steps=20)
    assert ex.set(scale=30.0).result["errors"] and ex.values["steps"] == 20
    assert len([one for one in ex.runs if one.model == "ReLU"]) == 1 and "no scale" in ex.result["says"]


def test_another_network_stands_where_it_was_left_beside_those_before_it():
    ex = small_fit(steps=20).set(model="SIREN")
    assert (
        ex.values["steps"] == 0 and "QIREN gain 1: " in ex.result["says"] and "untrained" in ex.result["says"]
    )
    ex.advance(40).set(model="QIREN")
    assert ex.values[
        "steps"
    ] == 20 and f"{ex.runs[Choice('chirp', 'SIREN', 1.0, 0.01)].errors[40]:.4g}" in repr(ex)
    assert "Earlier" not in ex.set(signal="wave").result["says"]
    for scale in (0.5, 2.0, 3.0, 4.0, 8.0, 10.0):
        ex.set(signal="chirp", scale=scale, steps=1)
    assert len(ex.result["drawn"][1]) == LISTED


def test_a_constructor_and_a_preset_set_what_is_shown():
    assert small_fit(steps=30).values["steps"] == 30
    ex = small_fit().set(preset="SIREN, omega 30")
    assert ex.values["scale"] == 30 and set(PRESETS) == set(ex.presets)
    assert repr(ex).startswith("signal_fit(preset='SIREN, omega 30', signal='chirp', steps=0) -> MSE")


def test_the_button_begins_and_ends_slices_that_the_browser_asks_for():
    ex = small_fit(most=40)
    ex.clock.value = 1
    assert ex.values["steps"] == 0 and ex.button.description == "fit"  # nobody has pressed it
    ex.button.click()
    assert ex.clock.playing and ex.button.description == "stop"
    ex.clock.value = 7  # what came too fast is one slice
    assert ex.values["steps"] == SLICE and len(ex.result["errors"]) == SLICE + 1
    ex.button.click()
    ex.clock.value = 8
    assert ex.values["steps"] == SLICE and not ex.clock.playing
    ex.button.click()
    for tick in range(9, 15):
        ex.clock.value = tick
    assert ex.values["steps"] == 40 and not ex.clock.playing and ex.button.description == "fit"


def test_a_rate_that_breaks_a_fit_is_told_and_leaves_the_widget_usable():
    ex = small_fit()
    ex.runs[Choice("chirp", "QIREN", 1.0, 0.01)].optimizer.param_groups[0]["lr"] = math.inf
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no longer a number at a rate of 0\.01"):
            ex.advance()
    assert ex.values["steps"] == 0
    ex.play(True)
    ex.clock.value = 1
    assert "no longer a number" in ex._numbers.value and not ex.clock.playing
    assert ex.set(model="Tanh").advance().values["steps"] == SLICE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"signals": {}}, "give {name"),
        ({"signals": {"flat": Signal(grid(9), torch.zeros(9, 1))}}, "flat is 0 everywhere"),
        ({"signals": {"image": Signal(grid(4, 4), torch.ones(16, 1))}}, r"image has x \(16, 2\)"),
        ({"signals": {"a": Signal(grid(9), torch.ones(8, 1))}}, r"y \(8, 1\)"),
        ({"steps": 50, "most": 40}, "not from 0 to most=40"),
    ],
)
def test_signals_and_steps_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        signal_fit(**arguments)


def test_more_steps_than_there_are_are_refused_and_change_nothing():
    ex = small_fit(most=40, steps=30)
    with pytest.raises(ValueError, match="goes from 0 to 40"):
        ex.advance(20)
    assert ex.values["steps"] == 30 and len(ex.result["errors"]) == 31
