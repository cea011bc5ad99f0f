"""A small generator of pictures whose decoder is a function of the place: QIREN's third task on a CPU.

Zhao et al. 2024 (QIREN), arXiv:2406.03873, give an INR-GAN the values of eight circuits of two qubits for
features of the coordinates, where others have random Fourier features. Here such features go into a small
ReLU network that a code modulates. It learns by generative latent optimisation (GLO, Bojanowski et al. 2017,
arXiv:1707.05776): every training picture has a code of its own, which learns with the decoder by the mean
squared error; new codes come from a Gaussian fitted to those learnt. Theirs is a GAN: its discriminator would
know a hundred faces by heart, while GLO has one error that falls, the same for every front end, and gives
codes to faces that it has not seen. The price is blur. What is compared is the front end alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightlib.quantum.baselines import Fourier, count
from lightlib.quantum.circuit import Circuit, run
from lightlib.quantum.fitting import threads
from lightlib.quantum.layer import linear
from lightlib.quantum.signals import grid

FRONTS = ("quantum", "fourier", "coordinates")
CIRCUITS, FREQUENCIES = 8, 6  # the paper's


class CircuitFeatures(nn.Module):
    """<Z> of the first qubit of `circuits` circuits of two qubits: (points, 2) -> (points, circuits).

    A linear layer gives each circuit its two angles; gain is about their deviation over a square at the
    start. It needs no batch norm, as the coordinates are centred, so that a point's features are its own.
    CNOTs, because the CZs of a ring of two cancel each other.
    """

    def __init__(self, circuits: int = CIRCUITS, gain: float = 1.0, generator: torch.Generator | None = None):
        super().__init__()
        if circuits < 1 or not gain > 0:
            raise ValueError(f"circuits={circuits}, gain={gain}: at least 1 circuit and a gain above 0")
        self.circuit = Circuit(2, uploads=2, blocks=2, entangler="CNOT")
        # coordinates uniform in [-1, 1] and weights within 3 / sqrt(2): the angles' variance is 1
        self.angles = linear(2, 2 * circuits, generator, gain * 3 / math.sqrt(2))
        shape = circuits, *self.circuit.weights_shape
        self.weights = nn.Parameter(2 * math.pi * torch.rand(shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        angles = self.angles(x).unflatten(-1, (-1, 2)).movedim(-2, 0)  # (circuits, points, 2)
        return torch.vmap(partial(run, self.circuit))(self.weights, angles)[..., 0].T


class Decoder(nn.Module):
    """Points (points, 2) and codes (n, length) to gray values (n, points); no point knows of another.

    Features of the point, two layers of ReLU, a linear layer. The code scales and shifts what either layer
    computes before its ReLU, as styles do in a StyleGAN; a code of zeros leaves it as it is.
    """

    def __init__(
        self, front: nn.Module, features: int, width: int, length: int,
        generator: torch.Generator | None = None,
    ):  # fmt: skip
        super().__init__()
        self.front, self.length, bound = front, length, 1 / math.sqrt(length)
        self.layers = nn.ModuleList([linear(features, width, generator), linear(width, width, generator)])
        styles = bound * (2 * torch.rand(2, length, 2 * width, generator=generator) - 1)
        self.styles = nn.Parameter(styles)
        self.last = linear(width, 1, generator)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        return self.shade(self.front(x), codes)

    def shade(self, h: Tensor, codes: Tensor) -> Tensor:
        """Gray values (n, points) from features (points, features), which are the same for all codes."""
        for layer, style in zip(self.layers, self.styles, strict=True):
            scale, shift = (codes @ style)[:, None].chunk(2, -1)  # (n, 1, width) each
            h = torch.relu(layer(h) * (1 + scale) + shift)  # (n, points, width)
        return self.last(h)[..., 0]


def build(
    front: str = "quantum", *, parameters: int = 4000, length: int = 16, gain: float = 1.0,
    sigma: float = 1.0, generator: torch.Generator | None = None,
) -> Decoder:  # fmt: skip
    """A decoder of the width that comes nearest to so many parameters, with codes of this length.

    front: "quantum", eight features; "fourier", cosines and sines of six frequencies that never learn; or
    "coordinates", the two of them. gain is the circuits' and sigma the frequencies'. Raises ValueError where
    no width comes within 5 %.
    """
    if front not in FRONTS or length < 1:
        raise ValueError(f"front={front!r}, length={length}: give one of {', '.join(FRONTS)} and at least 1")
    made, features = front_end(front, gain, sigma, generator)
    sizes = [count(made) + behind(features, width, length) for width in range(1, 500)]
    size = min(sizes, key=lambda size: abs(size - parameters))
    if abs(size - parameters) > 0.05 * parameters:
        raise ValueError(f"parameters={parameters}: the nearest that a {front} decoder has are {size}")
    return Decoder(made, features, sizes.index(size) + 1, length, generator)


def front_end(
    front: str, gain: float, sigma: float, generator: torch.Generator | None
) -> tuple[nn.Module, int]:
    """The front end, and how many features it gives."""
    if front == "quantum":
        return CircuitFeatures(CIRCUITS, gain, generator), CIRCUITS
    if front == "fourier":
        return Fourier(2, FREQUENCIES, sigma, generator), 2 * FREQUENCIES
    return nn.Identity(), 2


def behind(features: int, width: int, length: int) -> int:
    """How many parameters a decoder has behind its front end."""
    return (features + 1) * width + (width + 1) * width + 4 * length * width + width + 1


def draw(decoder: Decoder, codes: Tensor, side: int) -> Tensor:
    """The pictures (n, side, side) of codes (n, length); gradients pass."""
    if codes.dim() != 2 or codes.shape[1] != decoder.length:
        raise ValueError(f"codes are {tuple(codes.shape)}, but the decoder takes (n, {decoder.length})")
    return decoder(grid(side, side).to(codes), codes).unflatten(1, (side, side))


# learning
@dataclass(frozen=True)
class Trained:
    """A decoder with the codes (n, length) of its training pictures; curve: the error before each step."""

    decoder: Decoder
    codes: Tensor
    curve: tuple[float, ...]
    seconds: float


@torch.enable_grad()
def train(
    decoder: Decoder, pictures: Tensor, *, steps: int = 1000, lr: float = 0.01, points: int | None = None,
    generator: torch.Generator | None = None, watch: Callable[[int, float], None] = lambda step, mse: None,
    progress: bool = True,
) -> Trained:  # fmt: skip
    """Let the decoder learn pictures (n, side, side) in place, and a code within the unit ball for each.

    Adam with a rate that falls to 0 in a line. A step sees all pictures at `points` random pixels, the same
    in each; None: at all. The generator draws the first codes and the pixels. watch: called with each step
    and the error before it. 0 steps leave the weights as they are.
    """
    pixels = check(pictures, steps, points).flatten(1)
    x = grid(*pictures.shape[1:]).to(pixels)
    codes = torch.randn(len(pixels), decoder.length, generator=generator) / math.sqrt(decoder.length)
    codes = within_ball(codes.to(pixels)).requires_grad_()
    optimizer = torch.optim.Adam([*decoder.parameters(), codes], lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(steps, 1))
    curve, begin = [], time.perf_counter()
    with threads(list(decoder.parameters())):
        for step in tqdm(range(steps), desc="train", unit="step", disable=not progress):
            some = torch.randperm(len(x), generator=generator)[:points].to(x.device)
            mse = F.mse_loss(decoder(x[some], codes), pixels[:, some])
            curve.append(mse.item())
            if not math.isfinite(curve[-1]):
                raise ValueError(f"the error is {curve[-1]} after {step} steps at lr={lr}; take a lower lr")
            watch(step, curve[-1])
            optimizer.zero_grad()
            mse.backward()
            optimizer.step()
            schedule.step()
            codes.data = within_ball(codes.data)
    return Trained(decoder, codes.detach(), tuple(curve), time.perf_counter() - begin)


def within_ball(codes: Tensor) -> Tensor:
    """Codes (n, length) longer than 1 brought to length 1."""
    return codes / codes.norm(dim=1, keepdim=True).clamp_min(1)


def check(pictures: Tensor, steps: int, points: int | None = None) -> Tensor:
    """The pictures, or ValueError."""
    if pictures.dim() != 3 or not len(pictures):
        raise ValueError(f"pictures are {tuple(pictures.shape)}: give (n, rows, columns), at least one")
    if steps < 0 or (points is not None and not 1 <= points <= pictures[0].numel()):
        raise ValueError(
            f"steps={steps}, points={points}: give 0 or more steps and 1 to {pictures[0].numel()} points"
        )
    return pictures


@torch.no_grad()
def generate(made: Trained, n: int, generator: torch.Generator | None = None, side: int = 25) -> Tensor:
    """New pictures (n, side, side), of codes from a Gaussian fitted to the training pictures' codes.

    Codes that fall out of the unit ball are brought back to it: the decoder has learnt of none out there.
    """
    return draw(made.decoder, within_ball(gaussian(made.codes, n, generator)), side)


def gaussian(codes: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    """n draws (n, length) from the Gaussian that has the mean and the covariance of codes (m, length).

    As sums of the codes' own deviations with normal weights, so a covariance without full rank is no matter.
    """
    if n < 1 or len(codes) < 2:
        raise ValueError(f"n={n} draws from {len(codes)} codes: give at least 1 and 2")
    mean = codes.mean(0)
    weights = torch.randn(n, len(codes), generator=generator).to(codes) / math.sqrt(len(codes) - 1)
    return mean + weights @ (codes - mean)


@torch.enable_grad()
def reconstruct(decoder: Decoder, pictures: Tensor, *, steps: int = 300, lr: float = 0.05) -> Tensor:
    """Codes (n, length) for pictures (n, rows, columns) that the decoder has not seen; it stays as it is.

    Adam on the codes alone, from zeros, its rate falling to 0 in a line; each picture learns for itself. 0
    steps leave zeros.
    """
    pixels = check(pictures, steps).flatten(1)
    features = decoder.front(grid(*pictures.shape[1:]).to(pixels)).detach()
    codes = pixels.new_zeros(len(pixels), decoder.length, requires_grad=True)
    optimizer = torch.optim.Adam([codes], lr=lr)
    with threads(list(decoder.parameters())):
        for step in range(steps):
            # a sum over pictures, so that none weighs on another
            error = (decoder.shade(features, codes) - pixels).square().mean(1).sum()
            (codes.grad,) = torch.autograd.grad(error, codes)
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            optimizer.step()
            codes.data = within_ball(codes.data)
    return codes.detach()
