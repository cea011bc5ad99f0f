"""One Gaussian for two humps: which it becomes is the divergence's choice, as in Minka 2005, "Divergence
measures and message passing". Jensen-Shannon with a weight: Agarwal et al. 2023 (GKD), arXiv:2306.13649
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD, REVERSE, JSD = "forward KL", "reverse KL", "JSD"
DIVERGENCES = (FORWARD, REVERSE, JSD)
REACH, POINTS = 12.0, 241  # the line, from -REACH to REACH
FAR = 0.01  # of the target's peak: below it is as good as nothing
COARSE, FINE, ROUNDS = (33, 15), 7, 6


@dataclass(frozen=True)
class Humps:
    """A mixture of two Gaussians: their means, standard deviations, and the first one's weight."""

    means: tuple[float, float] = (-2.5, 2.5)
    sds: tuple[float, float] = (1.0, 1.0)
    weight: float = 0.5

    def log_density(self, x: Tensor) -> Tensor:
        parts = [
            gaussian(x, torch.tensor(m), torch.tensor(s)) + math.log(w)
            for m, s, w in zip(self.means, self.sds, (self.weight, 1 - self.weight), strict=True)
        ]
        return torch.logaddexp(*parts)


@dataclass(frozen=True)
class Fit:
    """The Gaussian of least divergence, and how much of it lies where the target is as good as nothing."""

    mean: float
    sd: float
    divergence: float  # nats
    outside_share: float


def line() -> Tensor:
    """The points x at which densities are summed."""
    return torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64)


def gaussian(x: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    """Log-density at x (n) of each of some Gaussians (...): (..., n); of one, (n)."""
    mean, sd = (t.to(x)[..., None] for t in (mean, sd))
    return -0.5 * ((x - mean) / sd).square() - (sd * math.sqrt(2 * math.pi)).log()


def integrand(log_p: Tensor, log_q: Tensor, kind: str = FORWARD, beta: float = 0.5) -> Tensor:
    """What each point adds to the divergence, a density in nats: log-densities (..., n) -> (..., n).

    JSD is beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.
    """
    if kind == FORWARD:
        return log_p.exp() * (log_p - log_q)
    if kind == REVERSE:
        return log_q.exp() * (log_q - log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)


def divergence(target: Humps, mean: Tensor, sd: Tensor, kind: str = FORWARD, beta: float = 0.5) -> Tensor:
    """Of the target and each of some Gaussians: means and sds (...) -> nats (...)."""
    x = line()
    return integrand(target.log_density(x), gaussian(x, mean, sd), kind, beta).sum(-1) * (x[1] - x[0])


def fit(target: Humps, kind: str = FORWARD, beta: float = 0.5) -> Fit:
    """The one Gaussian of least divergence from two humps; two that are one are found as they are.

    Forward KL matches mean and variance, in closed form. The others are searched for: the best of a coarse
    grid over mean and log sd, then of ever finer ones around it. Raises ValueError for a target that leaves
    the line, an unknown divergence, or a beta at an end.
    """
    check(target, kind, beta)
    mean, sd = moments(target) if kind == FORWARD else search(target, kind, beta)
    x = line()
    log_p, log_q = target.log_density(x), gaussian(x, torch.tensor(mean), torch.tensor(sd))
    outside = log_q.exp()[log_p < log_p.max() + math.log(FAR)].sum() * (x[1] - x[0])
    value = divergence(target, torch.tensor(mean), torch.tensor(sd), kind, beta)
    return Fit(mean, sd, max(value.item(), 0.0), outside.item())


def moments(target: Humps) -> tuple[float, float]:
    """Mean and standard deviation of the mixture: what forward KL asks for, whatever the shape."""
    w = (target.weight, 1 - target.weight)
    mean = sum(a * m for a, m in zip(w, target.means, strict=True))
    square = sum(a * (s * s + m * m) for a, m, s in zip(w, target.means, target.sds, strict=True))
    return mean, math.sqrt(square - mean * mean)


def search(target: Humps, kind: str, beta: float) -> tuple[float, float]:
    """(mean, sd) of least divergence, to about 1e-4."""
    low, high = min(target.means), max(target.means)
    widest = max(moments(target)[1], *target.sds)
    ends = [(low, high), (math.log(min(target.sds) / 1.5), math.log(1.2 * widest))]
    sizes = COARSE
    for _ in range(ROUNDS):
        axes = [torch.linspace(a, b, n, dtype=torch.float64) for (a, b), n in zip(ends, sizes, strict=True)]
        means, logs = torch.meshgrid(*axes, indexing="ij")
        best = int(divergence(target, means, logs.exp(), kind, beta).argmin())
        found = means.flatten()[best].item(), logs.flatten()[best].item()
        steps = [(b - a) / (n - 1) for (a, b), n in zip(ends, sizes, strict=True)]
        ends = [(at - 1.2 * step, at + 1.2 * step) for at, step in zip(found, steps, strict=True)]
        sizes = (FINE, FINE)
    return found[0], math.exp(found[1])


def check(target: Humps, kind: str, beta: float) -> None:
    if kind not in DIVERGENCES:
        raise ValueError(f"no divergence {kind!r}; choose one of {', '.join(DIVERGENCES)}")
    if not 0 < beta < 1:
        raise ValueError(f"beta={beta} must lie between 0 and 1; its ends are the two KLs")
    if not 0 < target.weight < 1 or min(target.sds) < 0.2:
        raise ValueError(f"weight={target.weight}, sds={target.sds}: two humps, each 0.2 wide or more")
    if max(abs(m) + 4 * s for m, s in zip(target.means, target.sds, strict=True)) > REACH:
        raise ValueError(f"means={target.means}, sds={target.sds} leave the line from -{REACH} to {REACH}")
