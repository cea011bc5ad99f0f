"""What a student is compared by: divergences between its next-token distribution q and a teacher's p.

Soft labels: Hinton, Vinyals and Dean 2015, arXiv:1503.02531. The generalized Jensen-Shannon divergence:
Agarwal et al. 2023 (GKD), arXiv:2306.13649. Skew KL: Ko et al. 2024 (DistiLLM), arXiv:2402.03898.

Logits are (..., vocabulary) and are read in float32; a value is in nats, the mean over positions, or over
those where `mask` (...) is not 0. A student that equals its teacher has 0, and a gradient of 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def cross_entropy(student: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Hard labels: mean of -log q(target), targets (...). A student certain of each target has 0."""
    log_q = student.float().log_softmax(-1)
    return mean(-log_q.gather(-1, targets[..., None]).squeeze(-1), mask)


def forward_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(p || q): q has to cover all that p gives weight."""
    log_q, log_p = logarithms(student, teacher)
    return mean(kl(log_p, log_q), mask)


def reverse_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(q || p): q stays where p gives weight, and may leave some of that out."""
    log_q, log_p = logarithms(student, teacher)
    return mean(kl(log_q, log_p), mask)


def jensen_shannon(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, beta: float = 0.5
) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, as in GKD.

    At 1/2 it is symmetric and at most log 2. Over beta it tends to KL(p || q) as beta goes to 0; over
    1 - beta, to KL(q || p) as beta goes to 1.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta={beta} must lie between 0 and 1; its ends are forward_kl and reverse_kl")
    log_q, log_p = logarithms(student, teacher)
    log_m = mixed(log_p, log_q, beta)
    return mean(beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m), mask)


def skew_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, alpha: float = 0.1) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q), at most -log alpha where q has missed all of p. Forward KL at 0."""
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha={alpha} must lie from 0 to below 1; at 1 nothing of the student is left")
    log_q, log_p = logarithms(student, teacher)
    return mean(kl(log_p, mixed(log_p, log_q, alpha) if alpha else log_q), mask)


def total_variation(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Half the sum of |p - q|: the most by which the two differ on any event; from 0 to 1."""
    log_q, log_p = logarithms(student, teacher)
    return mean(0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1), mask)


LOSSES = (forward_kl, reverse_kl, jensen_shannon, skew_kl, total_variation)


def soft_labels(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    loss: Loss = forward_kl,
) -> Tensor:
    """T^2 times `loss` of both logits over T, so that the gradient keeps its size as T grows.

    At T = 1 it is the loss itself. As T grows, of V tokens, the KLs tend to the squared difference of the
    centred logits, summed over the vocabulary, over 2 V: the student learns the logits themselves.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0; at 1 the logits are as they are")
    return temperature**2 * loss(student.float() / temperature, teacher.float() / temperature, mask)


def hard_and_soft(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    loss: Loss = forward_kl,
) -> Tensor:
    """alpha * cross entropy with the targets + (1 - alpha) * soft labels; at 0 the teacher alone is asked."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}, the weight of the cross entropy, must lie from 0 to 1")
    if alpha == 1:
        return cross_entropy(student, targets, mask)
    soft = soft_labels(student, teacher, mask, temperature=temperature, loss=loss)
    return soft if alpha == 0 else alpha * cross_entropy(student, targets, mask) + (1 - alpha) * soft


def logarithms(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """(log q, log p) in float32, on the student's device. Raises ValueError for logits of two shapes."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's logits are {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}; "
            "they are compared token by token of one vocabulary"
        )
    return student.float().log_softmax(-1), teacher.float().to(student.device).log_softmax(-1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) at each position: (..., vocabulary) -> (...)."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def mixed(log_a: Tensor, log_b: Tensor, part: float) -> Tensor:
    """log(part a + (1 - part) b) with 0 < part < 1."""
    return torch.logaddexp(log_a + math.log(part), log_b + math.log1p(-part))


def mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over all positions, or over those that count."""
    if mask is None:
        return values.mean()
    mask = mask.to(values)
    count = mask.sum()
    if not count > 0:
        raise ValueError("the mask leaves no position to learn from")
    return (values * mask).sum() / count
