"""Fit a function to points: full-batch Adam, the best weights kept, batch norms settled on the points."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightlib.machine import one_thread

SMALL = 10_000  # parameters, below which a second CPU thread costs more than it brings
KEEP = ("best", "last")


@dataclass(frozen=True)
class Fit:
    """curve[k]: the mean squared error after k steps, of all points at once; curve[0] is the start."""

    curve: tuple[float, ...]
    seconds: float
    lr: float

    @property
    def steps(self) -> int:
        return len(self.curve) - 1

    @property
    def last(self) -> float:
        """The error after the last step; with a large rate it is noisy."""
        return self.curve[-1]

    @property
    def best(self) -> float:
        """The least error of the curve."""
        return min(self.curve)

    @property
    def best_step(self) -> int:
        return self.curve.index(self.best)

    def __repr__(self) -> str:
        found = f"best {self.best:.3g} after {self.best_step}, last {self.last:.3g}"
        return f"Fit({self.steps} steps at lr {self.lr:g}: MSE {found}, {self.seconds:.1f} s)"


@torch.enable_grad()
def fit(
    model: nn.Module, x: Tensor, y: Tensor, *, steps: int = 300, lr: float = 0.01, keep: str = "best",
    watch: Callable[[int, float], None] = lambda step, mse: None, progress: bool = True,
) -> Fit:  # fmt: skip
    """Let the model learn y (points, outputs) at x (points, inputs), in place: Adam on all points each step.

    It ends in evaluation mode with the weights of its best step (keep="last": of the last), its batch norms
    settled on x, so that it gives at x what it gave in training; also where it is interrupted. 0 steps leave
    the weights as they are. watch: called with each step and the error before it. Raises ValueError where the
    error is no longer a number.
    """
    check(model, x, y, steps, keep)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer, curve, kept = torch.optim.Adam(weights, lr=lr), [], Kept(weights)
    model.train()
    bar = tqdm(total=steps, desc="fit", unit="step", disable=not progress)
    begin = time.perf_counter()
    with threads(weights), bar, finished(model, x, kept, keep):
        for step in range(steps + 1):
            mse = F.mse_loss(model(x), y)
            curve.append(mse.item())
            if not math.isfinite(curve[-1]):
                raise ValueError(f"the error is {curve[-1]} after {step} steps at lr={lr}; take a lower lr")
            kept.see(curve[-1])
            watch(step, curve[-1])
            if step < steps:
                optimizer.zero_grad()
                mse.backward()
                optimizer.step()
                bar.set_postfix_str(f"mse {curve[-1]:.3g}", refresh=False)
                bar.update()
    return Fit(tuple(curve), time.perf_counter() - begin, lr)


class Kept:
    """The weights as they were at the least error seen."""

    def __init__(self, weights: list[nn.Parameter]):
        self.weights, self.least, self.values = weights, math.inf, None

    def see(self, error: float) -> None:
        if error < self.least:
            self.least, self.values = error, [p.detach().clone() for p in self.weights]

    @torch.no_grad()
    def restore(self) -> None:
        for p, value in zip(self.weights, self.values or self.weights, strict=True):
            p.copy_(value)


@contextmanager
def finished(model: nn.Module, x: Tensor, kept: Kept, keep: str) -> Iterator[None]:
    """Behind it the model has its weights and statistics, whatever broke the training off."""
    try:
        yield
    finally:
        if keep == "best":
            kept.restore()
        settle(model, x)
        model.eval()


def check(model: nn.Module, x: Tensor, y: Tensor, steps: int, keep: str) -> None:
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or len(x) < 2:
        raise ValueError(
            f"x is {tuple(x.shape)} and y {tuple(y.shape)}: give (points, inputs) and (points, outputs) "
            "of the same 2 or more points"
        )
    if steps < 0 or keep not in KEEP:
        raise ValueError(f"steps={steps}, keep={keep!r}: give 0 or more steps and one of {', '.join(KEEP)}")
    with torch.no_grad():
        given = model(x[:2]).shape[1:]
    if given != y.shape[1:]:
        raise ValueError(f"the model gives {given[0]} values a point, but y has {y.shape[1]}")


def threads(weights: list[nn.Parameter]):
    """One thread for a small model on a CPU."""
    small = sum(p.numel() for p in weights) < SMALL and all(p.device.type == "cpu" for p in weights)
    return one_thread() if small else nullcontext()


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> None:
    """Set the statistics of every batch norm to those of the points x (points, inputs), exactly.

    Afterwards the model gives in evaluation mode at x what it gives in training mode, and a function of one
    point alone elsewhere, as on a finer grid. A model without batch norm stays as it is.
    """
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm1d)]
    if not norms:
        return
    momenta, mode = [norm.momentum for norm in norms], model.training
    for norm in norms:
        norm.momentum = 1.0  # the running statistics become the batch's
    try:
        model.train()(x)
    finally:
        model.train(mode)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    for norm in norms:
        # kept is the unbiased variance, while training divides by the biased one
        norm.running_var.mul_((len(x) - 1) / len(x))


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, *, batch: int = 65_536) -> Tensor:
    """The model's values (points, outputs) in evaluation mode, so many points at a time; its mode stays."""
    mode = model.training
    try:
        return torch.cat([model.eval()(part) for part in x.split(batch)])
    finally:
        model.train(mode)
