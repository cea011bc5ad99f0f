import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lightlib.distillation.losses import (
    LOSSES,
    cross_entropy,
    forward_kl,
    hard_and_soft,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    soft_labels,
    total_variation,
)


def logits(seed, *shape, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


STUDENT, TEACHER = logits(0, 3, 5, 11), logits(1, 3, 5, 11)
MASK = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 0, 1, 1, 1]])


def gradient(loss, student, *others):
    student = student.detach().clone().requires_grad_()
    loss(student, *others).backward()
    return student.grad


# limits
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(loss):
    student = TEACHER.clone().requires_grad_()
    value = loss(student, TEACHER)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert_close(student.grad, torch.zeros_like(TEACHER), atol=1e-7, rtol=0)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_any_other_student_has_more_than_0_and_a_shift_of_all_logits_is_no_difference(loss):
    value = loss(STUDENT, TEACHER)
    assert value > 0.05
    assert_close(loss(STUDENT + 3.0, TEACHER - 4.0), value, atol=1e-5, rtol=1e-5)


def test_the_two_kls_are_torchs_and_each_other_turned_round():
    log_q, log_p = STUDENT.log_softmax(-1), TEACHER.log_softmax(-1)
    known = F.kl_div(log_q.view(-1, 11), log_p.view(-1, 11), reduction="batchmean", log_target=True)
    assert_close(forward_kl(STUDENT, TEACHER), known)
    assert_close(reverse_kl(STUDENT, TEACHER), forward_kl(TEACHER, STUDENT))


def test_cross_entropy_is_forward_kl_from_certain_labels():
    targets = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(2))
    certain = 80.0 * F.one_hot(targets, 11).float()
    assert_close(cross_entropy(STUDENT, targets), F.cross_entropy(STUDENT.flatten(0, 1), targets.flatten()))
    assert_close(forward_kl(STUDENT, certain), cross_entropy(STUDENT, targets))
    assert cross_entropy(certain, targets).item() == 0


def test_at_a_high_temperature_soft_labels_match_the_centred_logits():
    centred = [x - x.mean(-1, keepdim=True) for x in (STUDENT.double(), TEACHER.double())]
    half_square = (centred[0] - centred[1]).square().sum(-1).mean() / (2 * 11)
    # in float32 a KL near 1e-4 keeps four digits
    assert_close(soft_labels(STUDENT, TEACHER, temperature=100.0).double(), half_square, rtol=0.02, atol=0)
    slope = gradient(partial(soft_labels, temperature=1000.0), STUDENT, TEACHER).double()
    assert_close(slope, (centred[0] - centred[1]) / (11 * 15), rtol=0.01, atol=1e-5)


def test_at_temperature_1_soft_labels_are_the_loss_itself():
    for loss in LOSSES:
        assert_close(soft_labels(STUDENT, TEACHER, loss=loss), loss(STUDENT, TEACHER))


def test_alpha_weighs_hard_against_soft():
    targets = TEACHER.argmax(-1)
    hard, soft = cross_entropy(STUDENT, targets), soft_labels(STUDENT, TEACHER, temperature=3.0)
    both = partial(hard_and_soft, STUDENT, TEACHER, targets, temperature=3.0)
    assert torch.equal(both(alpha=0), soft) and torch.equal(both(alpha=1), hard)
    assert_close(both(alpha=0.25), 0.25 * hard + 0.75 * soft)


def test_jensen_shannon_tends_to_either_kl_at_its_ends():
    near = jensen_shannon(STUDENT, TEACHER, beta=2e-4) / 2e-4
    far = jensen_shannon(STUDENT, TEACHER, beta=1 - 2e-4) / 2e-4
    assert_close(near, forward_kl(STUDENT, TEACHER), rtol=0.02, atol=0)
    assert_close(far, reverse_kl(STUDENT, TEACHER), rtol=0.02, atol=0)


def test_jensen_shannon_at_one_half_is_symmetric_and_bounded_by_log_2():
    assert_close(jensen_shannon(STUDENT, TEACHER), jensen_shannon(TEACHER, STUDENT))
    apart = 60.0 * torch.eye(11)
    assert jensen_shannon(apart, apart.roll(1, 0)).item() == pytest.approx(math.log(2), rel=1e-6)
    assert jensen_shannon(STUDENT, TEACHER) < math.log(2)


def test_total_variation_is_1_for_what_never_meets_and_bounds_kl_as_pinsker_says():
    apart = 60.0 * torch.eye(11)
    assert total_variation(apart, apart.roll(1, 0)).item() == pytest.approx(1)
    one = STUDENT[0, :1], TEACHER[0, :1]
    assert 0 < total_variation(*one) <= (forward_kl(*one) / 2).sqrt()


def test_skew_kl_is_forward_kl_at_0_and_has_a_bound_where_that_one_has_none():
    assert torch.equal(skew_kl(STUDENT, TEACHER, alpha=0), forward_kl(STUDENT, TEACHER))
    apart = 60.0 * torch.eye(11)
    assert forward_kl(apart, apart.roll(1, 0)) > 50
    assert skew_kl(apart, apart.roll(1, 0), alpha=0.1).item() == pytest.approx(-math.log(0.1), rel=1e-5)


# gradients
def test_the_gradient_of_soft_labels_is_the_students_probabilities_less_the_teachers():
    T, positions = 3.0, 15
    slope = gradient(partial(soft_labels, temperature=T), STUDENT, TEACHER)
    by_hand = T * ((STUDENT / T).softmax(-1) - (TEACHER / T).softmax(-1)) / positions
    assert_close(slope, by_hand, atol=1e-6, rtol=1e-4)


def test_the_gradient_of_cross_entropy_is_the_probabilities_less_the_hard_label():
    targets = TEACHER.argmax(-1)
    by_hand = (STUDENT.softmax(-1) - F.one_hot(targets, 11)) / 15
    assert_close(gradient(cross_entropy, STUDENT, targets), by_hand, atol=1e-7, rtol=1e-4)


def test_the_gradient_of_reverse_kl_weighs_by_the_student():
    q, p = STUDENT.softmax(-1), TEACHER.softmax(-1)
    apart = (q / p).log()
    by_hand = q * (apart - (q * apart).sum(-1, keepdim=True)) / 15
    assert_close(gradient(reverse_kl, STUDENT, TEACHER), by_hand, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_gradients_are_those_of_finite_differences(loss):
    way = logits(3, *STUDENT.shape, scale=1.0)
    h = 3e-4  # total variation has kinks
    measured = (loss(STUDENT + h * way, TEACHER) - loss(STUDENT - h * way, TEACHER)) / (2 * h)
    assert_close((gradient(loss, STUDENT, TEACHER) * way).sum(), measured, rtol=5e-3, atol=5e-4)


def test_no_gradient_reaches_the_teacher_that_asks_for_none():
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone()
    forward_kl(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


# masks, types, doors
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_a_mask_leaves_the_mean_over_the_positions_that_count(loss):
    kept = MASK.bool()
    assert_close(loss(STUDENT, TEACHER, MASK), loss(STUDENT[kept], TEACHER[kept]))
    slope = gradient(loss, STUDENT, TEACHER, kept)
    assert slope[~kept].abs().max() == 0 and slope[kept].abs().min() > 0
    assert_close(loss(STUDENT, TEACHER, torch.ones(3, 5)), loss(STUDENT, TEACHER))


def test_half_precision_logits_are_read_in_float32():
    student, teacher = STUDENT.bfloat16(), TEACHER.half()
    for loss in LOSSES:
        assert torch.equal(loss(student, teacher), loss(student.float(), teacher.float()))
    assert cross_entropy(student, TEACHER.argmax(-1)).dtype == torch.float32


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"student's logits are \(3, 5, 11\) and the teacher's \(3, 5, 10\)"):
        forward_kl(STUDENT, TEACHER[..., :-1])
    with pytest.raises(ValueError, match="mask leaves no position"):
        forward_kl(STUDENT, TEACHER, torch.zeros(3, 5))
    with pytest.raises(ValueError, match="its ends are forward_kl and reverse_kl"):
        jensen_shannon(STUDENT, TEACHER, beta=0)
    with pytest.raises(ValueError, match="alpha=1 must lie"):
        skew_kl(STUDENT, TEACHER, alpha=1)
    with pytest.raises(ValueError, match="temperature=0 must be above 0"):
        soft_labels(STUDENT, TEACHER, temperature=0)
    with pytest.raises(ValueError, match="alpha=2, the weight of the cross entropy"):
        hard_and_soft(STUDENT, TEACHER, TEACHER.argmax(-1), alpha=2)
