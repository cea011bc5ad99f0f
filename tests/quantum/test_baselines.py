"""The classical networks: their initial spread, their frequencies, and their size."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightlib.quantum.baselines import MLP, RFF, SIREN, Fourier, count, sized


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def points(n, inputs, seed=1):
    return 2 * torch.rand(n, inputs, generator=drawn(seed)) - 1


@pytest.mark.parametrize("omega", [1.0, 30.0])
def test_a_siren_starts_with_its_papers_weights_and_the_same_spread_in_every_layer(omega):
    model = SIREN(2, 1, width=256, layers=4, omega=omega, first_omega=30.0, generator=drawn())
    first, *rest = (part for part in model.layers if isinstance(part, nn.Linear))
    assert first.weight.abs().max().item() == pytest.approx(1 / 2, rel=0.02)
    for later in rest:
        assert later.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 256) / omega, rel=0.02)
    h = points(500, 2)
    for part in model.layers[:-1]:
        h = part(h)
        if not isinstance(part, nn.Linear):
            # the sine of a normal variable of deviation 1 or more: sqrt((1 - exp(-2)) / 2) to sqrt(1/2)
            assert 0.6 < h.std() < 0.75


def test_a_siren_of_one_layer_is_a_sum_of_sines():
    model, x = SIREN(1, 1, width=3, layers=1, omega=7.0, generator=drawn()), points(9, 1)
    first, _, last = model.layers
    by_hand = torch.sin(7 * (x @ first.weight.T + first.bias)) @ last.weight.T + last.bias
    assert_close(model(x), by_hand)


def test_fourier_features_come_again_after_one_cycle_and_do_not_learn():
    features = Fourier(1, 4, 2.0, drawn())
    assert count(features) == 0 and "B" in features.state_dict()
    x = points(6, 1)
    for i, cycles in enumerate(features.B[:, 0]):
        again = features(x + 1 / cycles)
        assert_close(again[:, [i, i + 4]], features(x)[:, [i, i + 4]], atol=1e-4, rtol=0)


def test_sigma_zero_makes_random_features_blind():
    model = RFF(2, 1, width=8, sigma=0.0, generator=drawn()).eval()
    assert_close(model(points(5, 2)), model(torch.zeros(5, 2)))


def test_the_deviation_of_the_frequencies_is_sigma():
    assert Fourier(2, 5000, 4.0, drawn()).B.std().item() == pytest.approx(4.0, rel=0.03)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_an_mlp_has_a_batch_norm_before_every_activation(activation):
    model = MLP(2, 1, width=5, layers=2, activation=activation)
    parts = [type(part).__name__ for part in model.layers]
    name = {"relu": "ReLU", "tanh": "Tanh"}[activation]
    assert parts == ["Linear", "BatchNorm1d", name] * 2 + ["Linear"]


@pytest.mark.parametrize("kind", ["siren", "rff", "relu", "tanh"])
@pytest.mark.parametrize("size", [100, 469, 5000])
def test_no_other_width_comes_nearer_to_the_size_that_is_asked_for(kind, size):
    model = sized(kind, 2, 1, size, generator=drawn())
    width = next(part for part in model.layers if isinstance(part, nn.Linear)).out_features
    make = {"siren": SIREN, "rff": RFF}.get(kind, MLP)
    others = [count(make(2, 1, width=width + step)) for step in (-1, 1)]
    assert abs(count(model) - size) <= min(abs(other - size) for other in others)
    assert model(points(5, 2)).shape == (5, 1)


def test_counting_widths_draws_no_number():
    chosen, made = sized("siren", 2, 1, 469, omega=10.0, generator=drawn()), drawn()
    by_hand = SIREN(2, 1, width=chosen.layers[0].out_features, omega=10.0, generator=made)
    for one, other in zip(chosen.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: sized("siren", 2, 1, 2), "narrowest siren"),
        (lambda: sized("wavelet", 2, 1, 100), "kind='wavelet'"),
        (lambda: SIREN(2, 1, width=0), "width=0"),
        (lambda: SIREN(2, 1, width=4, omega=0.0), "omega=0.0"),
        (lambda: RFF(2, 1, width=4, layers=1), "layers=1"),
        (lambda: RFF(2, 1, width=4, features=0), "features=0"),
        (lambda: MLP(2, 1, width=4, activation="sin"), "activation='sin'"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
