"""What QIREN is measured against: SIREN, random Fourier features, ReLU and Tanh networks of equal size.

SIREN: Sitzmann et al. 2020, arXiv:2006.09661. Random Fourier features: Tancik et al. 2020, arXiv:2006.10739.
All of them take points (points, inputs) to values (points, outputs).
"""

from __future__ import annotations

import itertools
import math
from functools import partial

import torch
from torch import Tensor, nn

from lightlib.quantum.layer import batch_norm, linear

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


class Sine(nn.Module):
    """sin(omega h), elementwise."""

    def __init__(self, omega: float):
        super().__init__()
        self.omega = omega

    def forward(self, h: Tensor) -> Tensor:
        return torch.sin(self.omega * h)

    def extra_repr(self) -> str:
        return f"omega={self.omega}"


class SIREN(nn.Module):
    """`layers` times Linear -> sin(omega h), then a Linear.

    The first layer's weights are uniform within 1/inputs, all later ones' within sqrt(6/width)/omega, so that
    every layer sees inputs of the same spread whatever omega is. first_omega, by default omega, sets which
    frequencies the network begins with.
    """

    def __init__(
        self, inputs: int, outputs: int, *, width: int, layers: int = 3, omega: float = 30.0,
        first_omega: float | None = None, generator: torch.Generator | None = None,
    ):  # fmt: skip
        super().__init__()
        check(width, layers)
        first = omega if first_omega is None else first_omega
        if not min(omega, first) > 0:
            raise ValueError(f"omega={omega}, first_omega={first_omega}: both must be above 0")
        later = math.sqrt(6 / width) / omega
        parts = [linear(inputs, width, generator, 1 / inputs), Sine(first)]
        for _ in range(layers - 1):
            parts += [linear(width, width, generator, later), Sine(omega)]
        self.layers = nn.Sequential(*parts, linear(width, outputs, generator, later))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Fourier(nn.Module):
    """cos and sin of 2 pi B x, (points, inputs) -> (points, 2 features); B is drawn once and never learns.

    B (features, inputs) is normal with deviation sigma: frequencies in cycles a unit of x. It is a buffer:
    saved with the weights, not counted among the parameters.
    """

    def __init__(self, inputs: int, features: int, sigma: float, generator: torch.Generator | None = None):
        super().__init__()
        self.register_buffer("B", sigma * torch.randn(features, inputs, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        angle = 2 * math.pi * x @ self.B.T
        return torch.cat([angle.cos(), angle.sin()], -1)

    def extra_repr(self) -> str:
        return f"inputs={self.B.shape[1]}, features={self.B.shape[0]}"


class MLP(nn.Module):
    """`layers` times Linear -> batch norm -> activation, then a Linear. activation: "relu" or "tanh"."""

    def __init__(
        self, inputs: int, outputs: int, *, width: int, layers: int = 3, activation: str = "relu",
        generator: torch.Generator | None = None,
    ):  # fmt: skip
        super().__init__()
        check(width, layers)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is none of {', '.join(ACTIVATIONS)}")
        parts = []
        for i in range(layers):
            parts += [linear(inputs if i == 0 else width, width, generator), batch_norm(width)]
            parts.append(ACTIVATIONS[activation]())
        self.layers = nn.Sequential(*parts, linear(width, outputs, generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class RFF(nn.Module):
    """Random Fourier features, then an MLP of ReLU with batch norm; the features are the first of `layers`.

    sigma: the frequencies' deviation in cycles a unit of x, which decides what can be fitted. features: how
    many frequencies, by default width / 2, so that their cosines and sines are as many as the width.
    """

    def __init__(
        self, inputs: int, outputs: int, *, width: int, layers: int = 3, sigma: float = 1.0,
        features: int | None = None, generator: torch.Generator | None = None,
    ):  # fmt: skip
        super().__init__()
        check(width, layers, least=2)
        if features is not None and features < 1:
            raise ValueError(f"features={features}: at least 1 frequency is needed")
        features = max(1, width // 2) if features is None else features
        drawn = Fourier(inputs, features, sigma, generator)
        rest = MLP(2 * features, outputs, width=width, layers=layers - 1, generator=generator)
        self.layers = nn.Sequential(drawn, *rest.layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def count(model: nn.Module) -> int:
    """How many numbers the model learns."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


MAKERS = {
    "siren": SIREN,
    "rff": RFF,
    "relu": partial(MLP, activation="relu"),
    "tanh": partial(MLP, activation="tanh"),
}


def sized(kind: str, inputs: int, outputs: int, parameters: int, **knobs) -> nn.Module:
    """The baseline "siren", "rff", "relu" or "tanh" of the width that comes nearest to so many parameters.

    knobs: what its class takes beside the width. Of two as near it is the wider; `count` says how many it
    has. Raises ValueError where even the narrowest has over twice as many.
    """
    if kind not in MAKERS:
        raise ValueError(f"kind={kind!r} is none of {', '.join(MAKERS)}")
    make = MAKERS[kind]
    shape = {key: value for key, value in knobs.items() if key != "generator"}

    def off(width: int) -> int:
        with torch.device("meta"):  # counted without a number drawn
            return count(make(inputs, outputs, width=width, **shape)) - parameters

    width = next(width for width in itertools.count(1) if off(width) >= 0)
    if width > 1 and -off(width - 1) < off(width):
        width -= 1
    if off(width) > parameters:
        raise ValueError(f"the narrowest {kind} has {parameters + off(width)} parameters; ask for as many")
    return make(inputs, outputs, width=width, **knobs)


def check(width: int, layers: int, least: int = 1) -> None:
    if width < 1 or layers < least:
        raise ValueError(f"width={width}, layers={layers}: at least 1 and {least} are needed")
