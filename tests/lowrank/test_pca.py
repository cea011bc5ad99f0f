"""PCA: exact where all directions are kept, best where some are."""

import pytest
import torch
from torch.testing import assert_close

from lightlib.lowrank.pca import pca


@pytest.fixture
def cloud():
    generator = torch.Generator().manual_seed(0)
    turn = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    return torch.randn(200, 5, generator=generator, dtype=torch.float64) @ turn + 3


def test_with_all_directions_nothing_is_lost(cloud):
    found = pca(cloud)
    assert_close(found.rebuild(found.project(cloud)), cloud)
    assert_close(found.explained[-1].item(), 1.0)


def test_directions_are_orthonormal_and_coordinates_uncorrelated(cloud):
    found = pca(cloud)
    assert_close(found.directions @ found.directions.T, torch.eye(5, dtype=torch.float64))
    covariance = found.project(cloud).T @ found.project(cloud) / len(cloud)
    assert_close(covariance, found.variance.diag(), atol=1e-9, rtol=0)
    assert (found.variance.diff() <= 0).all()


def test_what_is_lost_is_the_variance_left_out_and_no_direction_keeps_more(cloud):
    found = pca(cloud, 2)
    lost = (found.rebuild(found.project(cloud)) - cloud).square().sum(1).mean()
    assert_close(lost.item(), found.total * (1 - found.explained[-1].item()))
    other, _ = torch.linalg.qr(torch.randn(5, 2, generator=torch.Generator().manual_seed(1)).double())
    centred = cloud - cloud.mean(0)
    assert lost < (centred - centred @ other @ other.T).square().sum(1).mean()


def test_points_on_a_line_have_one_direction():
    line = torch.arange(6.0)[:, None] * torch.tensor([3.0, 4.0]) + 1
    found = pca(line)
    assert_close(found.directions[0].abs(), torch.tensor([0.6, 0.8], dtype=torch.float64))
    assert_close(found.explained, torch.ones(2, dtype=torch.float64))


def test_about_zero_the_directions_are_those_of_the_gram(cloud):
    found = pca(cloud, center=False)
    gram = cloud.T @ cloud / len(cloud)
    assert_close(gram @ found.directions[0], found.variance[0] * found.directions[0])
    assert_close(found.mean, torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("points", "k", "says"),
    [(torch.zeros(4), None, r"shape \(4,\)"), (torch.zeros(4, 3), 4, "k=4"), (torch.zeros(4, 3), 0, "k=0")],
)
def test_bad_input_is_named(points, k, says):
    with pytest.raises(ValueError, match=says):
        pca(points, k)
