"""The generator: points and codes know nothing of each other, sizes, what learns, and distances by hand."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightlib.quantum.baselines import count
from lightlib.quantum.circuit import run
from lightlib.quantum.eigenfaces import eigenfaces, frechet
from lightlib.quantum.generator import (
    FRONTS,
    CircuitFeatures,
    Decoder,
    Trained,
    behind,
    build,
    draw,
    gaussian,
    generate,
    reconstruct,
    train,
)
from lightlib.quantum.signals import grid


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def small(front="quantum", **knobs):
    return build(front, parameters=500, length=3, generator=drawn(), **knobs)


def codes(n=4, length=3, seed=1):
    return torch.randn(n, length, generator=drawn(seed))


def blobs(n=12, side=8):
    """Pictures of one soft spot each, at a random place."""
    place = torch.rand(n, 1, 2, generator=drawn(5)) - 0.5
    apart = (grid(side, side) - place).square().sum(-1)  # (n, points)
    return (2 * torch.exp(-4 * apart) - 1).view(n, side, side)


# the decoder
@pytest.mark.parametrize("front", FRONTS)
def test_the_same_code_gives_the_same_picture_in_any_company(front):
    decoder, z = small(front), codes()
    assert_close(draw(decoder, z[[2, 2]], 6), draw(decoder, z, 6)[[2, 2]])
    assert (draw(decoder, z, 6)[0] - draw(decoder, z, 6)[1]).abs().max() > 1e-3


@pytest.mark.parametrize("front", FRONTS)
def test_a_point_has_its_value_at_any_side(front):
    decoder, z = small(front), codes()
    # every third centre of a grid three times as fine is a centre of the coarse one
    assert_close(draw(decoder, z, 21)[:, 1::3, 1::3], draw(decoder, z, 7), atol=1e-5, rtol=1e-5)
    assert_close(draw(decoder, z, 7).flatten(1), decoder(grid(7, 7), z))


@pytest.mark.parametrize("front", FRONTS)
def test_a_code_of_zeros_leaves_the_plain_network(front):
    decoder, x = small(front), grid(5, 5)
    plain = nn.Sequential(decoder.front, decoder.layers[0], nn.ReLU(), decoder.layers[1], nn.ReLU())
    assert_close(decoder(x, torch.zeros(1, 3))[0], decoder.last(plain(x))[:, 0])


def test_a_code_scales_and_shifts_either_layer_by_hand():
    decoder = Decoder(nn.Identity(), 2, width=3, length=2, generator=drawn())
    x, z = grid(2, 2), codes(1, 2)
    h = x
    for layer, style in zip(decoder.layers, decoder.styles, strict=True):
        change = z[0, 0] * style[0] + z[0, 1] * style[1]
        h = torch.relu(layer(h) * (1 + change[:3]) + change[3:])
    assert_close(decoder(x, z), decoder.last(h).T)


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize(("size", "length", "off"), [(500, 3, 0.05), (4000, 16, 0.02)])
def test_decoders_are_of_one_size_within_a_few_per_cent(front, size, length, off):
    decoder = build(front, parameters=size, length=length, generator=drawn())
    assert abs(count(decoder) / size - 1) < off
    width, features = decoder.layers[0].weight.shape
    assert count(decoder) == count(decoder.front) + behind(features, width, decoder.length)


# the circuits
def test_circuit_features_are_those_of_the_circuits_one_by_one():
    front, x = CircuitFeatures(circuits=3, generator=drawn()), grid(4, 5)
    angles = front.angles(x)
    alone = [run(front.circuit, w, angles[:, 2 * i : 2 * i + 2])[:, 0] for i, w in enumerate(front.weights)]
    assert_close(front(x), torch.stack(alone, 1))


def test_circuits_of_zero_weights_see_nothing():
    front = CircuitFeatures(generator=drawn())
    nn.init.zeros_(front.weights)
    assert_close(front(grid(3, 3)), torch.ones(9, 8))


@pytest.mark.parametrize("gain", [1.0, 4.0])
def test_the_gain_is_the_deviation_of_the_angles_over_a_square(gain):
    front = CircuitFeatures(circuits=2000, gain=gain, generator=drawn())
    angles = front.angles(grid(50, 50)) - front.angles.bias
    assert angles.std().item() == pytest.approx(gain, rel=0.05)


def test_gradients_reach_the_circuits():
    decoder = small()
    draw(decoder, codes(), 6).square().sum().backward()
    weights = decoder.front.weights.grad.abs()  # (8, uploads + 1, blocks, qubits, 3)
    assert (weights[:, 1] > 0).all()
    # <Z> of the first qubit is behind the last ring what the second's is before it
    assert weights[:, -1, -1, 0].max() < 1e-5 * weights.max() and (weights[:, -1, -1, 1, 1] > 0).all()
    assert all(p.grad.abs().sum() > 0 for p in decoder.parameters())


# learning
@pytest.mark.parametrize("front", FRONTS)
def test_training_learns_and_codes_stay_within_the_unit_ball(front):
    seen, pictures = [], blobs()
    made = train(
        small(front), pictures, steps=150, lr=0.02, generator=drawn(), progress=False,
        watch=lambda step, mse: seen.append((step, mse)),
    )  # fmt: skip
    assert seen == list(enumerate(made.curve)) and len(seen) == 150
    after = (draw(made.decoder, made.codes, 8) - pictures).square().mean().item()
    assert after < 0.5 * pictures.var(0).mean() and after < 0.3 * made.curve[0]
    assert made.codes.shape == (12, 3) and made.codes.norm(dim=1).max() < 1 + 1e-6


def test_no_steps_change_no_weight():
    made = train(small(), blobs(), steps=0, generator=drawn(), progress=False)
    assert made.curve == ()
    for p, was in zip(made.decoder.parameters(), small().parameters(), strict=True):
        assert torch.equal(p, was)


def test_the_same_generator_trains_the_same_and_leaves_torchs_own_alone():
    before = torch.get_rng_state()
    runs = [train(small(), blobs(), steps=3, points=9, generator=drawn(), progress=False) for _ in range(2)]
    assert runs[0].curve == runs[1].curve and torch.equal(runs[0].codes, runs[1].codes)
    pictures = [generate(made, 2, drawn(), side=5) for made in runs]
    assert torch.equal(*pictures) and torch.equal(torch.get_rng_state(), before)


def test_all_pixels_are_what_no_number_of_points_means():
    every, none = (
        train(small(), blobs(), steps=3, points=points, generator=drawn(), progress=False)
        for points in (64, None)
    )
    assert every.curve == none.curve


def test_fitting_a_code_leaves_the_decoder_and_finds_what_it_can_draw():
    decoder = small("fourier")
    before = [p.detach().clone() for p in decoder.parameters()]
    target = draw(decoder, 0.5 * nn.functional.normalize(codes(3)), 8).detach()
    found = reconstruct(decoder, target)
    assert not found.requires_grad and found.norm(dim=1).max() < 1 + 1e-6
    error = (draw(decoder, found, 8) - target).square().mean()
    assert error < 0.02 * (draw(decoder, torch.zeros(3, 3), 8) - target).square().mean()
    for p, was in zip(decoder.parameters(), before, strict=True):
        assert torch.equal(p, was) and p.grad is None and p.requires_grad


def test_a_face_is_fitted_alike_in_any_company():
    decoder, pictures = small(), blobs()
    together = reconstruct(decoder, pictures, steps=20)
    assert_close(reconstruct(decoder, pictures[4:5], steps=20), together[4:5], atol=1e-4, rtol=0)
    assert torch.equal(reconstruct(decoder, pictures, steps=0), torch.zeros(12, 3))


# generating
def test_draws_have_the_mean_and_the_covariance_of_the_codes():
    z = codes(30) @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.3, 0.0], [0.0, 0.0, 0.0]]) + 2
    many = gaussian(z, 40_000, drawn())
    assert_close(many.mean(0), z.mean(0), atol=0.02, rtol=0)
    assert_close(many.T.cov(), z.T.cov(), atol=0.02, rtol=0)


def test_equal_codes_give_one_picture_at_the_side_that_is_asked_for():
    decoder = small("coordinates")
    made = Trained(decoder, 0.4 * codes(1).expand(5, 3), (), 0.0)
    pictures = generate(made, 4, drawn(), side=9)
    assert_close(pictures, draw(decoder, 0.4 * codes(1), 9).detach().expand(4, 9, 9))


# measures
def test_all_components_give_the_training_pictures_back():
    pictures = blobs()
    space = eigenfaces(pictures, 11)
    assert_close(space.decode(space.encode(pictures)), pictures, atol=1e-5, rtol=0)
    assert_close(space.directions @ space.directions.T, torch.eye(11), atol=1e-5, rtol=0)
    shares = space.encode(pictures).var(0)
    assert torch.equal(shares, shares.sort(descending=True).values)


def test_the_distance_of_features_from_themselves_is_zero_and_of_shifted_ones_the_shift():
    a = codes(20)
    assert frechet(a, a.flip(0)) == pytest.approx(0, abs=1e-6)
    assert frechet(a, a + torch.tensor([3.0, 0.0, 4.0])) == pytest.approx(25, rel=1e-5)


def test_the_distance_of_stretched_features_is_that_of_their_deviations():
    a, stretch = codes(50), torch.tensor([1.0, 2.0, 0.5])
    a = torch.linalg.qr(a - a.mean(0)).Q * math.sqrt(49)  # mean 0, covariance 1
    by_hand = (stretch - 1).square().sum().item()
    assert frechet(a, a * stretch) == pytest.approx(by_hand, rel=1e-4)
    turned = torch.linalg.qr(codes(3)).Q
    assert frechet(a @ turned, (a * stretch) @ turned) == pytest.approx(by_hand, rel=1e-4)


def test_the_distance_is_that_of_the_formula_with_matrix_roots():
    a, b = codes(40).double(), 2 * codes(30, seed=2).double() + 1
    A, B = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(A @ B).real.sqrt().sum()
    by_hand = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * root
    assert frechet(a, b) == pytest.approx(by_hand.item(), rel=1e-9)
    assert frechet(b, a) == pytest.approx(by_hand.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: build("wavelet"), "front='wavelet'"),
        (lambda: build(length=0), "length=0"),
        (lambda: build(parameters=100), "parameters=100: the nearest that a quantum decoder has are 4"),
        (lambda: build(gain=0.0), "gain=0.0"),
        (lambda: CircuitFeatures(circuits=0), "circuits=0"),
        (lambda: draw(small(), codes(2, 5), 4), r"\(2, 5\), but the decoder takes \(n, 3\)"),
        (lambda: train(small(), blobs()[0]), r"\(8, 8\)"),
        (lambda: train(small(), blobs(), points=65), "points=65.* 1 to 64 points"),
        (lambda: train(small(), blobs(), steps=-1), "steps=-1"),
        (lambda: train(small(), 1e30 * blobs(), progress=False), "lower lr"),
        (lambda: reconstruct(small(), blobs()[:0]), r"\(0, 8, 8\)"),
        (lambda: gaussian(codes(1), 3), "3 draws from 1 codes|n=3 draws from 1"),
        (lambda: eigenfaces(blobs(), 12), "k=12: 12 pictures have 1 to 11"),
        (lambda: frechet(codes(4), codes(4, 2)), r"\(4, 3\) and \(4, 2\)"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
