"""The exercises of lesson 12."""

from __future__ import annotations

import torch
from torch import Tensor

from lightlib.exercise_data.exercise import Exercise


def soften(logits: Tensor, T: float) -> Tensor:
    return (logits / T).softmax(-1)


def soft_gradient(student: Tensor, teacher: Tensor, T: float) -> Tensor:
    return T * (soften(student, T) - soften(teacher, T))


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum()


def returns(rewards: Tensor) -> Tensor:
    """Of each token, the mean of the rewards behind it; 0 for the last."""
    behind = rewards.flip(0).cumsum(0).flip(0) - rewards
    return behind / torch.arange(len(rewards) - 1, -1, -1).clamp(min=1)


def weight(q: float, p: float, alpha: float) -> float:
    return q / (alpha * p + (1 - alpha) * q)


STUDENT, TEACHER = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([4.0, 1.0, -2.0])
HALF, SURE, WIDE = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.9, 0.08, 0.02]), torch.full((3,), 1 / 3)

EXERCISES = {
    "12.soften": Exercise(
        "Write soften(logits, T): the probabilities of a softmax at temperature T. logits is a tensor (V).",
        soften,
        cases=((TEACHER, 2.0), (TEACHER, 1.0), (STUDENT, 8.0)),
        slips=(
            (lambda logits, T: (logits * T).softmax(-1), "that sharpens: the logits are divided by T."),
            (
                lambda logits, T: logits.softmax(-1) / T,
                "divide the logits, in front of the softmax; behind it, nothing sums to 1 any more.",
            ),
            (lambda logits, T: logits / T, "these are logits still; the softmax is missing."),
        ),
        hints=("first divide, then (...).softmax(-1).", "(logits / T).softmax(-1)"),
    ),
    "12.soft_gradient": Exercise(
        "Write soft_gradient(student, teacher, T): the gradient of T^2 * KL(p || q) with respect to the "
        "student's logits (V), where p and q are the two softmaxes at temperature T.",
        soft_gradient,
        cases=((STUDENT, TEACHER, 4.0), (STUDENT, TEACHER, 1.0), (TEACHER, STUDENT, 0.5)),
        slips=(
            (
                lambda student, teacher, T: (soften(student, T) - soften(teacher, T)) / T,
                "that is the gradient of KL alone; T^2 stands in front.",
            ),
            (
                lambda student, teacher, T: T**2 * (soften(student, T) - soften(teacher, T)),
                "the logits are divided by T before the softmax, and the chain rule wants that 1 / T.",
            ),
            (
                lambda student, teacher, T: T * (soften(teacher, T) - soften(student, T)),
                "the other way round: where the student says too much, the gradient is positive.",
            ),
        ),
        hints=(
            "at T = 1 the gradient of a cross entropy with respect to the logits is q - p.",
            "T * (softmax(student / T) - softmax(teacher / T))",
        ),
    ),
    "12.kl": Exercise(
        "Write kl(p, q): KL(p || q) in nats of two tensors of probabilities (V). Where p is 0 nothing is "
        "added; q is 0 nowhere that p is not.",
        kl,
        cases=((SURE, WIDE), (WIDE, SURE), (HALF, WIDE), (SURE, SURE)),
        slips=(
            (lambda p, q: kl(q, p), "that is KL(q || p); the first one is the one that weighs."),
            (lambda p, q: -kl(p, q), "it is never negative: log(p / q), not log(q / p)."),
            (lambda p, q: -torch.xlogy(p, q).sum(), "that is the cross entropy; take off the entropy of p."),
            (lambda p, q: kl(p, q) / torch.tensor(2.0).log(), "these are bits; nats use the natural log."),
        ),
        hints=(
            "sum of p * (log p - log q).",
            "(torch.xlogy(p, p) - torch.xlogy(p, q)).sum()",
        ),
    ),
    "12.returns": Exercise(
        "Write returns(rewards): rewards (T) of the tokens of one text. Of each token, the mean of the "
        "rewards of the tokens behind it, its own not counted; 0 for the last one.",
        returns,
        cases=((torch.tensor([-1.0, -2.0, -4.0]),), (torch.tensor([1.0, 0.0, 3.0, -1.0, 2.0]),)),
        slips=(
            (
                lambda rewards: rewards.flip(0).cumsum(0).flip(0) - rewards,
                "these are sums; divide each by how many rewards there are behind the token.",
            ),
            (
                lambda rewards: (
                    rewards.flip(0).cumsum(0).flip(0) / torch.arange(len(rewards), 0, -1).to(rewards)
                ),
                "that counts the token's own reward too, which the single step has already.",
            ),
            (
                lambda rewards: (
                    (rewards.cumsum(0) - rewards) / torch.arange(len(rewards)).clamp(min=1).to(rewards)
                ),
                "these are the rewards in front of a token; it can only change those behind it.",
            ),
        ),
        hints=(
            "rewards[t + 1 :].mean(), and 0 where nothing is left.",
            "torch.stack([rewards[t + 1 :].mean() if t + 1 < len(rewards) else rewards.new_zeros(()) "
            "for t in range(len(rewards))])",
        ),
    ),
    "12.weight": Exercise(
        "Write weight(q, p, alpha): a token was drawn from alpha * teacher + (1 - alpha) * student. The "
        "student gives it the probability q, the teacher p. By which weight does it count as a draw of the "
        "student's?",
        weight,
        cases=((0.1, 0.6, 0.2), (0.6, 0.1, 0.2), (0.3, 0.3, 0.5), (0.3, 0.9, 0.0)),
        slips=(
            (lambda q, p, alpha: q / p, "the teacher alone did not draw it: divide by the mixture."),
            (
                lambda q, p, alpha: q / (alpha * q + (1 - alpha) * p),
                "alpha is the teacher's part of the mixture.",
            ),
            (
                lambda q, p, alpha: (alpha * p + (1 - alpha) * q) / q,
                "upside down: what the mixture draws too often has to count less.",
            ),
        ),
        hints=(
            "how likely the student was to draw it, over how likely the mixture was.",
            "q / (alpha * p + (1 - alpha) * q)",
        ),
    ),
}
