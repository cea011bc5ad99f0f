import numpy as np
import pytest
import torch

from lightlib.quantum.circuit import Circuit, state
from lightlib.widgets.bloch_pictures import bloch_pictures, scenes
from lightlib.widgets.pictures import pictures


def test_the_ten_pictures_are_states_of_length_1_but_for_the_entangled_ones():
    found = scenes()
    lengths = [float(np.linalg.norm(scene.end)) for scene in found]
    assert lengths == pytest.approx([1] * 8 + [0.5, 0], abs=1e-9)
    for scene in found:
        if len(scene.way):
            assert np.linalg.norm(scene.way, axis=1) == pytest.approx(1)
            assert scene.way[-1] == pytest.approx(scene.end)


@pytest.mark.parametrize(("scene", "theta"), [(8, torch.pi / 3), (9, torch.pi / 2)])
def test_what_a_cnot_leaves_of_an_arrow_is_the_partial_trace_of_the_circuits_state(scene, theta):
    circuit = Circuit(2, uploads=1, blocks=1, entangler="CNOT")
    weights = torch.zeros(circuit.weights_shape, dtype=torch.float64)
    weights[1, 0, 0, 1] = theta  # the first layer is CNOTs on |00>, which stay
    psi = state(circuit, weights, torch.zeros(2, dtype=torch.float64)).view(2, 2)
    # the ring goes on with a CNOT back; undone, what is left is the first one's
    psi = torch.stack([psi[:, 0], psi[:, 1].flip(0)], 1)
    rho = psi.mT @ psi.conj()  # (2, 2), of the second qubit
    length = [2 * rho[0, 1].real, 2 * rho[1, 0].imag, (rho[0, 0] - rho[1, 1]).real]
    assert scenes()[scene].end == pytest.approx([float(part) for part in length], abs=1e-9)


def test_heights_are_said_and_drawn():
    picture = bloch_pictures()
    assert "4 RY(60°): height 0.5" in picture.text and picture.text.count(";") == 10
    assert picture._repr_png_().startswith(b"\x89PNG")


def test_gray_pictures_keep_one_scale_and_say_their_sizes():
    dark, light = torch.full((4, 6), -0.5), torch.tensor([[0.0, 1.0]])
    picture = pictures({"dark": dark, "light": light}, columns=2)
    assert repr(picture) == ("dark: 4 x 6, mean -0.5, from -0.5 to -0.5; light: 1 x 2, mean 0.5, from 0 to 1")
    assert [ax.images[0].get_clim() for ax in picture.figure.axes] == [(-1, 1)] * 2
    assert [ax.images[0].get_array().shape for ax in picture.figure.axes] == [(4, 6), (1, 2)]
    assert picture._repr_png_().startswith(b"\x89PNG")


def test_rows_are_as_many_as_the_pictures_need():
    picture = pictures({str(i): torch.zeros(2, 2) for i in range(7)}, columns=3)
    lefts = [round(ax.get_position().x0, 6) for ax in picture.figure.axes]
    heights = [round(ax.get_position().y0, 6) for ax in picture.figure.axes]
    assert len(set(lefts)) == 3 and len(set(heights)) == 3 and heights == sorted(heights, reverse=True)


def test_what_is_no_picture_is_refused():
    with pytest.raises(ValueError, match=r"give \{name: \(rows, columns\)\}, not \[\(3,\)\]"):
        pictures({"line": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"not \[\]"):
        pictures({})
