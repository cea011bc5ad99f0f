"""Coordinates at centres, signals by their formulas, pictures as means of areas, measures of copies."""

import hashlib
import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lightlib.fetch import FetchError
from lightlib.quantum.signals import (
    MEMBERS,
    PICTURES,
    as_signal,
    averages,
    bicubic,
    chirp,
    faces,
    gray,
    grid,
    member,
    picture,
    psnr,
    sound,
    ssim,
)


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


# coordinates
def test_a_grid_twice_as_fine_has_its_points_around_those_of_the_coarse():
    assert_close(grid(2).flatten(), torch.tensor([-0.5, 0.5]))
    assert_close(grid(64).view(32, 2).mean(1), grid(32).flatten())


def test_a_grid_goes_row_by_row():
    x = grid(2, 3).view(2, 3, 2)
    assert_close(x[:, 0, 0], torch.tensor([-0.5, 0.5]))
    assert_close(x[0, :, 1], torch.tensor([-2 / 3, 0, 2 / 3]))


# of one coordinate
@pytest.mark.parametrize(("make", "points"), [(chirp, 512), (sound, 1000)])
def test_a_signal_is_drawn_from_its_seed_and_as_loud_as_one(make, points):
    one, again, other = make(), make(), make(seed=1)
    assert one.x.shape == one.y.shape == (points, 1)
    assert one.y.abs().max() == 1
    assert torch.equal(one.y, again.y) and not torch.equal(one.y, other.y)


def test_the_chirp_holds_its_three_sines():
    power = torch.fft.rfft(chirp(4096).y.flatten()).abs()
    # the chirp spreads over all from 2 to 40 cycles; the sines stand out
    assert set(power.topk(3).indices.tolist()) == {3, 8, 17}


def test_the_sound_dies_away_and_its_formant_is_the_loudest():
    y = sound().y.flatten()
    # 0.04 s at -25/s: the last quarter is exp(-0.75) of the first
    assert (y[750:].norm() / y[:250].norm()).item() == pytest.approx(math.exp(-0.75), rel=0.2)
    loudest = torch.fft.rfft(y).abs().argmax().item() / 0.04
    assert 600 < loudest < 800


# pictures
@pytest.mark.parametrize("name", PICTURES)
def test_a_pixel_is_the_mean_of_the_finer_pixels_that_it_covers(name):
    fine, coarse = picture(name, 64), picture(name, 32)
    assert coarse.shape == (32, 32) and coarse.min() >= -1 and coarse.max() <= 1
    assert_close(F.avg_pool2d(fine[None], 2)[0], coarse, atol=1e-6, rtol=0)


def test_cells_that_are_partly_covered_count_by_their_share():
    assert_close(averages(3, 2) * 3, torch.tensor([[2.0, 1, 0], [0, 1, 2]], dtype=torch.float64))
    assert_close(averages(5, 5), torch.eye(5, dtype=torch.float64))


def test_as_many_pixels_as_there_are_give_the_picture_itself():
    whole = picture("camera", 512) * 127.5 + 127.5
    assert_close(whole, whole.round(), atol=1e-4, rtol=0)


def test_a_picture_is_a_function_of_its_pixels_places():
    image = picture("coffee", 8)
    signal = as_signal(image)
    assert torch.equal(signal.y.view(8, 8), image)
    top_right = signal.x.view(8, 8, 2)[0, -1]
    assert_close(top_right, torch.tensor([-7 / 8, 7 / 8]))


def test_faces_are_a_hundred_and_as_many_that_are_none():
    found = faces()
    assert found.shape == (200, 25, 25) and found.min() >= -1 and found.max() <= 1
    typical = found[:100].mean(0).flatten()
    alike = [torch.corrcoef(torch.stack([typical, one.flatten()]))[0, 1].item() for one in found]
    assert statistics.median(alike[:100]) > 0.5 > 0.2 > abs(statistics.median(alike[100:]))


def test_a_file_of_ones_own_is_taken_if_it_is_the_right_one(tmp_path, monkeypatch):
    known = picture("camera", 32)
    (tmp_path / "camera.png").write_bytes(member("camera.png"))
    monkeypatch.setenv("LIGHTLIB_DATA", str(tmp_path))
    gray.cache_clear()
    assert_close(picture("camera", 32), known)
    (tmp_path / "camera.png").write_bytes(b"other")
    gray.cache_clear()
    with pytest.raises(FetchError, match=r"camera\.png: its sha256 is not b0793d2a.*damaged or another file"):
        picture("camera", 32)
    gray.cache_clear()


def test_members_are_those_of_the_wheel():
    for name, digest in MEMBERS.items():
        assert hashlib.sha256(member(name)).hexdigest() == digest


# measures
def test_a_perfect_copy():
    image = torch.rand(16, 16, generator=drawn())
    assert psnr(image, image) == math.inf and ssim(image, image) == pytest.approx(1)


def test_psnr_of_an_error_of_a_tenth_of_the_range_is_20_db():
    assert psnr(torch.zeros(4, 4), torch.full((4, 4), 0.2)) == pytest.approx(20)


def test_ssim_of_flat_images_compares_their_light_alone():
    a, b, C1 = 0.5, 0.25, (0.01 * 2) ** 2
    flat = [torch.full((12, 12), v, dtype=torch.float64) for v in (a, b)]
    assert ssim(*flat) == pytest.approx((2 * a * b + C1) / (a * a + b * b + C1))


def test_ssim_falls_with_noise():
    image = torch.randn(20, 20, generator=drawn()).clamp(-1, 1)
    noise = torch.randn(20, 20, generator=drawn(1))
    falling = [ssim(image, image + s * noise) for s in (0.0, 0.1, 0.3, 1.0)]
    assert falling == sorted(falling, reverse=True)


def test_bicubic_keeps_a_ramp_where_it_is():
    ramp = grid(16, 16)[:, 0].view(16, 16)
    # exact only on the whole; half a fine pixel would be 0.03
    inner = bicubic(ramp, 32)[6:-6] - grid(32, 32)[:, 0].view(32, 32)[6:-6]
    assert inner.abs().max() < 0.01 and inner.mean().abs() < 1e-6


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: picture("lenna"), "no picture 'lenna'"),
        (lambda: picture("coffee", 401), "401"),
        (lambda: grid(3, 0), "sides"),
        (lambda: ssim(torch.zeros(8, 8), torch.zeros(8, 8)), "11 x 11"),
        (lambda: psnr(torch.zeros(8, 8), torch.zeros(8, 9)), "copy"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
