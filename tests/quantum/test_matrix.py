"""A matrix as a function: exact limits, and that smoothness is what a network makes use of."""

import pytest
import torch
from torch.testing import assert_close

from lightlib.quantum.baselines import count, sized
from lightlib.quantum.matrix import as_function, cosines, represent, shuffled, smooth, truncated


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_values_are_the_matrix_over_its_root_mean_square():
    W = torch.randn(3, 5, generator=drawn())
    signal = as_function(W)
    assert signal.x.shape == (15, 2)
    assert signal.y.square().mean().item() == pytest.approx(1)
    assert_close(signal.y.view(3, 5) / signal.y[0], W / W[0, 0])


def test_a_network_that_gives_nothing_has_the_error_one():
    model = sized("siren", 2, 1, 100, generator=drawn())
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    made = represent(smooth(8, 8, 3, drawn()), model, steps=0, progress=False)
    assert made.error == pytest.approx(1) and made.parameters == count(model)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_the_error_of_what_was_learnt_is_that_of_the_matrix_that_it_gives(scale):
    W = scale * smooth(16, 12, 3, drawn())
    made = represent(W, sized("siren", 2, 1, 200, omega=5.0, generator=drawn()), steps=100, progress=False)
    assert made.error == pytest.approx(((W - made.weight).norm() / W.norm()).item(), rel=1e-5)
    assert made.error < 0.2


def test_at_full_rank_the_svd_is_exact_and_below_it_the_rest_is_lost():
    W = torch.randn(6, 4, generator=drawn())
    assert truncated(W, 1000).error < 1e-6 and truncated(W, 1000).parameters == 40
    S = torch.linalg.svdvals(W)
    made = truncated(W, 25)
    assert made.parameters == 20 and made.error == pytest.approx((S[2:].norm() / S.norm()).item(), rel=1e-5)


def test_a_smooth_matrix_is_of_the_rank_of_its_waves():
    W = smooth(20, 16, 5, drawn())
    assert torch.linalg.matrix_rank(W) == 5
    basis = cosines(20, 20)
    assert_close(basis.T @ basis, torch.diag(torch.tensor([20.0] + [10.0] * 19)), atol=1e-4, rtol=0)


def test_shuffled_entries_are_the_same_in_other_places():
    W = smooth(10, 10, 3, drawn())
    mixed = shuffled(W, drawn())
    assert_close(mixed.flatten().sort().values, W.flatten().sort().values)
    assert not torch.equal(mixed, W)


def test_a_network_beats_the_svd_on_a_smooth_matrix_and_not_on_its_shuffled_entries():
    W, size = smooth(32, 32, 8, drawn()), 300
    errors = {}
    for name, matrix in (("smooth", W), ("shuffled", shuffled(W, drawn()))):
        model = sized("siren", 2, 1, size, omega=10.0, generator=drawn())
        errors[name] = represent(matrix, model, lr=0.01, progress=False).error
    assert errors["smooth"] < 0.5 * truncated(W, size).error
    assert errors["shuffled"] > 0.6


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: truncated(torch.ones(64, 64), 100), "take a block"),
        (lambda: as_function(torch.zeros(3, 3)), "all zeros"),
        (lambda: smooth(4, 4, 5), "waves=5"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
