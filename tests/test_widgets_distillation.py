"""The explorers of distillation: equal to direct sums, to autograd, and to what the toy world computes."""

import itertools
import math

import pytest
import torch

from lightlib.distillation.losses import forward_kl, soft_labels
from lightlib.distillation.toy import DIVERGENCES, FORWARD, JSD, REVERSE, Humps, fit
from lightlib.widgets.kl_fit import OVER_MEAN, POINTWISE, kl_fit, within
from lightlib.widgets.temperature import TEMPERATURES, entropy_bits, gradient_size, shorter, temperature
from tests.explorers import is_the_same_twice, redraws_within_200_ms

V = 500
TEXTS = ("The cat sat on the", "To be, or not to")


def some_logits(seed):
    return 3 * torch.randn(V, generator=torch.Generator().manual_seed(seed))


def some_positions():
    return {text: (some_logits(i), 0.7 * some_logits(i) + some_logits(i + 9)) for i, text in enumerate(TEXTS)}


def on_logits(**options):
    return temperature(some_positions(), lambda i: f" word{i}", **options)


every_explorer = pytest.mark.parametrize("make", [kl_fit, on_logits])


@every_explorer
def test_two_of_a_kind_are_equal_and_every_description_is_wide_enough(make):
    is_the_same_twice(make)


@pytest.mark.alone
@every_explorer
def test_every_control_redraws_within_200_ms(make):
    redraws_within_200_ms(make)


# one Gaussian for two humps
def test_the_numbers_are_those_of_the_fit():
    ex = kl_fit().set(distance=6.0, left_weight=0.7, left_width=0.6, right_width=1.2, beta=0.3)
    target = Humps((-3.0, 3.0), (0.6, 1.2), 0.7)
    for kind in DIVERGENCES:
        found, shown = fit(target, kind, 0.3), ex.set(divergence=kind).result
        assert (shown["mean"], shown["sd"]) == (found.mean, found.sd)
        assert shown["nats"] == found.divergence
        assert shown["outside_share"] == found.outside_share
        assert shown["target_within_two_sd_share"] == within(target, found)


def test_the_target_within_two_deviations_is_a_normal_table():
    one = Humps((0.5, 0.5), (1.0, 1.0))
    assert within(one, fit(one)) == pytest.approx(0.9545, abs=0.01)


def test_it_says_which_humps_are_taken():
    ex = kl_fit().set(distance=7.0)
    assert "forward KL covers both humps" in ex.set(divergence=FORWARD).result["says"]
    assert "takes the left hump and leaves the right one" in ex.set(divergence=REVERSE).result["says"]
    assert "takes the right hump" in ex.set(left_weight=0.3).result["says"]
    assert "covers both" in ex.set(distance=1.0).result["says"]


def test_beta_moves_jsd_from_covering_to_seeking():
    ex = kl_fit().set(distance=8.0, divergence=JSD, beta=0.1)
    assert abs(ex.result["mean"]) < 0.1
    assert abs(ex.set(beta=0.9).result["mean"]) == pytest.approx(4, abs=0.05)


def test_the_least_of_the_curve_is_where_the_fit_is():
    ex = kl_fit().set(view=OVER_MEAN, distance=5.0, left_weight=0.6)
    for kind in DIVERGENCES:
        shown = ex.set(divergence=kind).result
        assert shown["over_mean"].min().item() == pytest.approx(shown["nats"], abs=0.01)
    assert ex.set(view=POINTWISE).result["over_mean"] is None


def test_every_end_of_every_slider_can_be_drawn():
    ex = kl_fit()
    for distance, weight, wide in itertools.product((0.0, 9.0), (0.05, 0.95), (0.4, 1.6)):
        for view in (POINTWISE, OVER_MEAN):
            ex.set(distance=distance, left_weight=weight, left_width=wide, right_width=1.6, view=view)
            assert len(ex._png) > 5000 and math.isfinite(ex.result["nats"])


# the temperature
@pytest.mark.parametrize("T", [0.5, 1.0, 4.0])
def test_the_gradient_is_autograds_and_with_the_factor_that_of_soft_labels(T):
    teacher, student = (x.double() for x in some_positions()[TEXTS[0]])
    logits = student.float()[None].requires_grad_(True)
    (plain,) = torch.autograd.grad(forward_kl(logits / T, teacher.float()[None] / T), logits)
    assert gradient_size(student, teacher, T) == pytest.approx(plain.norm().item(), rel=1e-4)
    (scaled,) = torch.autograd.grad(soft_labels(logits, teacher.float()[None], temperature=T), logits)
    shown = on_logits().set(T=T).result
    assert shown["gradient_times_T2"] == pytest.approx(scaled.norm().item(), rel=1e-4)


def test_hot_the_factor_leaves_a_gradient_of_centred_logits_and_nothing_without():
    teacher, student = (0.1 * x for x in some_positions()[TEXTS[0]])
    gap = (student - student.mean()) - (teacher - teacher.mean())
    T = 32.0
    assert gradient_size(student, teacher, T) * T**2 == pytest.approx(gap.norm().item() / V, rel=0.02)
    assert gradient_size(student, teacher, T) < gap.norm().item() / V / 1000


def test_entropy_goes_from_certainty_to_all_words():
    logits = some_logits(0)
    bits = [entropy_bits(logits, T) for T in (1e-3, 0.5, 1.0, 4.0, 1e4)]
    assert bits == sorted(bits) and bits[0] < 1e-6 and bits[-1] == pytest.approx(math.log2(V), abs=1e-4)


def test_ratios_and_bars_are_those_of_the_softmax():
    ex, (teacher, _) = on_logits(), some_positions()[TEXTS[0]]
    for T in (1.0, 3.0):
        shown, p = ex.set(T=T).result, (teacher.double() / T).softmax(-1).sort(descending=True)
        assert shown["second_over_tenth"] == pytest.approx((p.values[1] / p.values[9]).item())
        torch.testing.assert_close(shown["teacher"], p.values[:10])
        assert shown["first_ten_words_share"] == pytest.approx(p.values[:10].sum().item())
        assert shown["words"][0] == f"␣word{p.indices[0]}" and f"'␣word{p.indices[1]}'" in shown["says"]
    assert ex.set(T=1.0).result["second_over_tenth"] > ex.set(T=TEMPERATURES[-1]).result["second_over_tenth"]


def test_two_that_are_certain_of_one_word_have_no_gradient_when_cold_and_are_drawn():
    teacher, student = torch.zeros(2, V)
    teacher[3], student[3] = 400.0, 500.0
    ex = temperature({"a": (teacher, student)}, str).set(T=0.25)
    assert ex.result["gradient"] == 0 and len(ex._png) > 5000 and ex.set(T=32.0).result["gradient"] > 0


def test_words_read_on_one_line():
    assert shorter(" the") == "␣the" and shorter("\n") == "↵" and shorter("x" * 40) == "x" * 13 + "…"


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ({}, "give {text"),
        ({"a": (some_logits(0), some_logits(1)[:-1])}, r"logits \(500,\) and \(499,\)"),
        ({"a": (some_logits(0)[:5], some_logits(1)[:5])}, "10 words or more"),
        ({"a": (some_logits(0), some_logits(0))}, "twice the same logits"),
    ],
)
def test_logits_that_do_not_fit_are_refused(positions, message):
    with pytest.raises(ValueError, match=message):
        temperature(positions, str)
