"""Toy worlds: one Gaussian for two humps, and a small student of a language with topics."""

import itertools
import math

import pytest
import torch

from lightlib.distillation.losses import forward_kl, jensen_shannon, reverse_kl
from lightlib.distillation.toy import (
    DIVERGENCES,
    FORWARD,
    JSD,
    REVERSE,
    Humps,
    divergence,
    fit,
    integrand,
    moments,
)
from lightlib.distillation.toy_chains import (
    forward_rate,
    language,
    rate,
    reverse_rate,
    stationary,
    train_chain,
    untrained,
    write,
    writing,
)

UNEVEN = Humps((-2.5, 3.0), (0.6, 1.4), 0.6)


# one Gaussian, two humps
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_two_humps_that_are_one_are_found_as_they_are(kind):
    found = fit(Humps((0.7, 0.7), (1.3, 1.3), 0.3), kind)
    assert (found.mean, found.sd) == (pytest.approx(0.7, abs=0.002), pytest.approx(1.3, abs=0.002))
    assert found.divergence < 1e-5


def test_forward_kl_is_least_where_mean_and_variance_agree():
    mean, sd = moments(UNEVEN)
    draws = [torch.randn(200000, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    x = torch.cat([draws[0][:120000] * 0.6 - 2.5, draws[1][:80000] * 1.4 + 3.0])
    assert mean == pytest.approx(x.mean().item(), abs=0.02) and sd == pytest.approx(x.std().item(), abs=0.02)
    least = fit(UNEVEN).divergence
    for a, b in itertools.product((-0.05, 0, 0.05), (-0.05, 0, 0.05)):
        assert divergence(UNEVEN, torch.tensor(mean + a), torch.tensor(sd + b)) >= least


@pytest.mark.parametrize(("kind", "beta"), [(REVERSE, 0.5), (JSD, 0.1), (JSD, 0.5), (JSD, 0.9)])
def test_what_was_searched_for_is_least_all_around_and_over_the_whole_plane(kind, beta):
    found = fit(UNEVEN, kind, beta)
    means, sds = torch.meshgrid(torch.linspace(-4, 5, 60), torch.linspace(0.3, 4, 60), indexing="ij")
    assert divergence(UNEVEN, means, sds, kind, beta).min() > found.divergence - 1e-6
    for a, b in itertools.product((-0.02, 0, 0.02), (-0.02, 0, 0.02)):
        near = torch.tensor(found.mean + a), torch.tensor(found.sd + b)
        assert divergence(UNEVEN, *near, kind, beta) > found.divergence - 1e-6


def test_apart_forward_covers_both_and_reverse_takes_one():
    far = Humps((-4.0, 4.0))
    cover, seek = fit(far), fit(far, REVERSE)
    assert cover.mean == 0 and cover.sd == pytest.approx(math.sqrt(17))
    assert abs(seek.mean) == pytest.approx(4, abs=0.02) and seek.sd == pytest.approx(1, abs=0.01)
    assert seek.divergence == pytest.approx(math.log(2), abs=1e-3)  # the other half is given up
    assert cover.outside_share > 0.25 and seek.outside_share < 0.01
    assert abs(fit(far, JSD, 0.1).mean) < 0.1 and abs(fit(far, JSD, 0.9).mean) > 3.9


def test_near_each_other_all_agree():
    fits = [fit(Humps((-0.8, 0.8)), kind) for kind in DIVERGENCES]
    assert max(abs(f.mean) for f in fits) < 0.01 and max(f.sd for f in fits) - min(f.sd for f in fits) < 0.01


def test_divergences_are_those_of_the_losses():
    x = torch.linspace(-12, 12, 241, dtype=torch.float64)
    q = -0.5 * ((x - 0.3) / 2.0).square()
    pairs = {
        (FORWARD, 0.5): forward_kl,
        (REVERSE, 0.5): reverse_kl,
        (JSD, 0.2): lambda a, b: jensen_shannon(a, b, beta=0.2),
    }
    for (kind, beta), loss in pairs.items():
        ours = divergence(UNEVEN, torch.tensor(0.3), torch.tensor(2.0), kind, beta)
        assert ours.item() == pytest.approx(loss(q, UNEVEN.log_density(x)).item(), rel=1e-4)


def test_the_ends_of_beta_are_the_two_kls():
    at = torch.tensor(0.3), torch.tensor(2.0)
    low, high = (divergence(UNEVEN, *at, JSD, beta).item() for beta in (1e-5, 1 - 1e-5))
    assert low / 1e-5 == pytest.approx(divergence(UNEVEN, *at, FORWARD).item(), rel=1e-3)
    assert high / 1e-5 == pytest.approx(divergence(UNEVEN, *at, REVERSE).item(), rel=1e-2)
    x = torch.linspace(-12, 12, 241, dtype=torch.float64)
    same = UNEVEN.log_density(x)
    assert all(integrand(same, same, kind).abs().max() < 1e-12 for kind in DIVERGENCES)


@pytest.mark.parametrize(
    ("target", "kind", "beta", "message"),
    [
        (Humps((-11.0, 2.5)), FORWARD, 0.5, "leave the line from -12.0 to 12.0"),
        (Humps(weight=1.0), FORWARD, 0.5, "weight=1.0"),
        (Humps(sds=(0.1, 1.0)), FORWARD, 0.5, "each 0.2 wide"),
        (Humps(), "KL", 0.5, "no divergence 'KL'"),
        (Humps(), JSD, 1.0, "beta=1.0"),
    ],
)
def test_what_cannot_be_fitted_is_refused(target, kind, beta, message):
    with pytest.raises(ValueError, match=message):
        fit(target, kind, beta)


# a language and its student
TEACHER = language()


def test_the_stationary_distribution_stays_and_is_where_long_walks_are():
    P = language(switch=0.2, noise=0.05).log_p.exp()
    pi = stationary(P)
    torch.testing.assert_close(pi @ P, pi)
    torch.testing.assert_close(torch.linalg.matrix_power(P, 400)[0], pi)
    assert pi.sum() == pytest.approx(1)


def test_rates_are_divergences_of_long_strings_a_symbol():
    a, b = (
        torch.randn(4, 4, generator=torch.Generator().manual_seed(s)).double().log_softmax(-1) for s in (0, 1)
    )
    y, pi = torch.cartesian_prod(*[torch.arange(4)] * 5), stationary(a.exp())
    log_a, log_b = (t[y[:, :-1], y[:, 1:]].sum(1) for t in (a, b))
    whole = (pi[y[:, 0]] * log_a.exp() * (log_a - log_b)).sum()
    assert rate(a, b).item() == pytest.approx(whole.item() / 4)
    assert rate(a, a) == 0


def test_every_symbol_is_followed_by_its_own_topic_and_rarely_another():
    P, same = TEACHER.log_p.exp(), TEACHER.topic[:, None] == TEACHER.topic
    torch.testing.assert_close(P.sum(1), torch.ones(30).double())
    assert ((TEACHER.valid & same).sum(1) == 3).all() and ((TEACHER.valid & ~same).sum(1) == 2).all()
    assert (P * ~same).sum(1).max() == pytest.approx(0.02, abs=0.001) and not TEACHER.valid.diag().any()
    said = writing(TEACHER.log_p, TEACHER)
    assert said.topics == pytest.approx(3) and said.invalid_share < 0.001


def test_a_student_of_full_rank_becomes_the_teacher():
    student = train_chain(untrained(TEACHER, 30), TEACHER).log_q
    assert forward_rate(TEACHER.log_p, student) < 0.01 and reverse_rate(TEACHER.log_p, student) < 0.01


def test_rank_zero_learns_how_frequent_symbols_are():
    student = train_chain(untrained(TEACHER, 0), TEACHER).log_q
    torch.testing.assert_close(student[0].exp(), stationary(TEACHER.log_p.exp()), atol=1e-3, rtol=0)


def test_a_student_too_small_covers_with_forward_kl_and_seeks_one_topic_with_reverse():
    first = untrained(TEACHER, 2)
    cover = train_chain(first, TEACHER)
    seek = train_chain(cover, TEACHER, reverse_rate, lr=0.02)  # as MiniLLM, from a student that was tuned
    covered, sought = (writing(s.log_q, TEACHER) for s in (cover, seek))
    assert covered.topics > 2.9 and covered.invalid_share > 0.1
    assert sought.topics < 1.05 and sought.invalid_share < 0.01
    assert sought.entropy_bits < writing(TEACHER.log_p, TEACHER).entropy_bits < covered.entropy_bits
    for loss, better, worse in ((forward_rate, cover, seek), (reverse_rate, seek, cover)):
        assert loss(TEACHER.log_p, better.log_q) < 0.5 * loss(TEACHER.log_p, worse.log_q)


def test_strings_have_the_topics_and_the_mistakes_that_were_measured():
    cover = train_chain(untrained(TEACHER, 2), TEACHER, steps=200).log_q
    text = write(cover, TEACHER, 4000, torch.Generator().manual_seed(0))
    at = torch.tensor([TEACHER.symbols.index(letter) for letter in text])
    wrong = (~TEACHER.valid[at[:-1], at[1:]]).double().mean().item()
    said = writing(cover, TEACHER)
    assert wrong == pytest.approx(said.invalid_share, abs=0.03)
    shares = torch.bincount(TEACHER.topic[at], minlength=3) / len(at)
    assert shares.tolist() == pytest.approx(said.topic_shares, abs=0.15)
    assert text == write(cover, TEACHER, 4000, torch.Generator().manual_seed(0))


def test_no_steps_change_nothing_and_a_rank_that_is_none_is_refused():
    first = untrained(TEACHER, 2)
    assert torch.equal(train_chain(first, TEACHER, steps=0).log_q, first.log_q)
    with pytest.raises(ValueError, match="rank=31"):
        untrained(TEACHER, 31)
    with pytest.raises(ValueError, match="topics=4"):
        language(topics=4)
