"""Signal fit: QIREN, or a classical network of as many parameters, learns a signal before one's eyes.

QIREN: Zhao et al. 2024, arXiv:2406.03873; SIREN: Sitzmann et al. 2020, arXiv:2006.09661; random Fourier
features: Tancik et al. 2020, arXiv:2006.10739.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import ipywidgets as W
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightlib.machine import one_thread
from lightlib.quantum.baselines import count, sized
from lightlib.quantum.layer import QIREN
from lightlib.quantum.signals import Signal, chirp, sound
from lightlib.report import tidy
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, panels

# what each network calls the scale of the frequencies that it begins with
KNOBS = {"QIREN": "gain", "SIREN": "omega", "RFF": "sigma", "ReLU": "", "Tanh": ""}
# of the runs, in the order they were begun
LINES = ((BLUE, "-"), (VERMILION, "--"), (GREEN, "-."), (PURPLE, ":"), (ORANGE, "--"), (SKY, "-."))
SCALES = (0.5, 1.0, 2.0, 3.0, 4.0, 8.0, 10.0, 30.0)
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
SLICE = 10  # steps between two pictures
TICK_MS = 100  # between two slices at least
LISTED = 4  # earlier runs whose errors are drawn
PRESETS = {
    "QIREN, gain 1": {"model": "QIREN", "scale": 1.0, "lr": 0.01},
    "QIREN, gain 3": {"model": "QIREN", "scale": 3.0, "lr": 0.01},
    "SIREN, omega 1": {"model": "SIREN", "scale": 1.0, "lr": 0.01},
    "SIREN, omega 30": {"model": "SIREN", "scale": 30.0, "lr": 0.003},
    "RFF, sigma 1": {"model": "RFF", "scale": 1.0, "lr": 0.01},
    "RFF, sigma 8": {"model": "RFF", "scale": 8.0, "lr": 0.01},
}


class Choice(NamedTuple):
    """What a run is of; scale is None for a network that has none."""

    signal: str
    model: str
    scale: float | None
    lr: float

    @property
    def name(self) -> str:
        return self.model if self.scale is None else f"{self.model} {KNOBS[self.model]} {self.scale:g}"


def network(choice: Choice, qubits: int, seed: int) -> nn.Module:
    """QIREN (1 -> 1) of so many qubits, or the classical network whose parameters are nearest to its."""
    own = {KNOBS[choice.model]: choice.scale} if KNOBS[choice.model] else {}
    generator = torch.Generator().manual_seed(seed)
    if choice.model == "QIREN":
        return QIREN(1, 1, qubits=qubits, generator=generator, **own)
    with torch.device("meta"):
        size = count(QIREN(1, 1, qubits=qubits))
    return sized(choice.model.lower(), 1, 1, size, generator=generator, **own)


class Run:
    """A network that learns as `fit` does, full-batch Adam, but stops after any step and goes on later.

    errors[k], given[k] (points): the mean squared error, and what the network gives, after k steps.
    """

    def __init__(self, model: nn.Module, signal: Signal, lr: float):
        self.model, self.signal, self.lr = model.train(), signal, lr
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        self.errors: list[float] = []
        self.given: list[Tensor] = []
        self.look()

    @property
    def steps(self) -> int:
        return len(self.errors) - 1

    @torch.enable_grad()
    def look(self) -> None:
        given = self.model(self.signal.x)
        self.error = F.mse_loss(given, self.signal.y)
        if not math.isfinite(self.error.item()):
            raise ValueError(f"the error is no longer a number at a rate of {self.lr:g}; take a lower one")
        self.errors.append(self.error.item())
        self.given.append(given.detach().flatten())

    def reach(self, steps: int) -> None:
        """Learn until so many steps are done; nothing where they are."""
        with one_thread():
            while self.steps < steps:
                self.optimizer.zero_grad()
                self.error.backward()
                self.optimizer.step()
                self.look()


class SignalFit(Explorer):
    """What `signal_fit` gives. A run that was begun goes on from where it was left."""

    def __init__(
        self, signals: Mapping[str, Signal], qubits: int, steps: int, most: int, seed: int, **options
    ):
        self.signals, self.qubits, self.seed = signals, qubits, seed
        self.runs: dict[Choice, Run] = {}
        self._current: Choice | None = None
        controls = {
            "model": W.Dropdown(options=list(KNOBS)),
            "scale": W.SelectionSlider(options=SCALES, value=1.0, description="gain, omega, sigma"),
            "lr": W.SelectionSlider(options=RATES, value=0.01, description="learning rate"),
            "signal": W.Dropdown(options=list(signals)),
            "steps": W.IntSlider(steps, 0, most, SLICE),
        }
        # a picture also shows earlier runs, so that none is kept
        options = {"cache": 0, "presets": PRESETS, **options}
        super().__init__(
            self._learnt, draw, name="signal_fit", size=(8.6, 3.6), settle=self._went_on,
            **options, **controls,
        )  # fmt: skip
        # the browser asks for slices, one after the other: so the kernel is free to hear the stop
        self.clock = W.Play(0, 0, 10**6, interval=TICK_MS, layout=W.Layout(display="none"))
        self.clock.observe(self._on_tick, names="value")
        self.button = W.Button(layout=W.Layout(width="110px", margin="2px 18px 2px 0"))
        self.button.on_click(lambda _: self.play(not self.clock.playing))
        self.play(False)
        row = self.children[0]
        row.children = (*row.children, self.button, self.clock)

    def advance(self, steps: int = SLICE) -> SignalFit:
        """Learn for so many more steps, and redraw once."""
        return self.set(steps=self.values["steps"] + steps)

    def play(self, on: bool) -> None:
        """Begin or stop to learn slice by slice; a browser must show the widget for it to go on."""
        self.clock.playing = on
        self.button.description, self.button.icon = ("stop", "stop") if on else ("fit", "play")
        self.button.button_style = "warning" if on else "primary"

    def _on_tick(self, _change) -> None:
        steps = self.controls["steps"]
        if self.clock.playing:
            steps.value = min(steps.value + SLICE, steps.max)
            failed = len(self.result["errors"]) <= steps.value  # what is shown is of an earlier step
            if failed or steps.value == steps.max:
                self.play(False)

    def _went_on(self, controls: Mapping[str, W.ValueWidget]) -> None:
        """Another network stands where it was left."""
        choice = self.choice(**{name: control.value for name, control in controls.items()})
        if choice != self._current:
            self._current = choice
            controls["steps"].value = min(
                self.runs[choice].steps if choice in self.runs else 0, controls["steps"].max
            )

    def choice(self, model: str, scale: float, lr: float, signal: str, steps: int) -> Choice:
        return Choice(signal, model, scale if KNOBS[model] else None, lr)

    def _learnt(self, **controls) -> dict:
        """What is shown of one setting."""
        choice, steps = self.choice(**controls), controls["steps"]
        self._current = choice
        if choice not in self.runs:
            model = network(choice, self.qubits, self.seed)
            self.runs[choice] = Run(model, self.signals[choice.signal], choice.lr)
        run = self.runs[choice]
        run.reach(steps)
        others = {
            one: other.errors for one, other in self.runs.items()
            if one != choice and one.signal == choice.signal and other.steps
        }  # fmt: skip
        others = dict([*others.items()][-LISTED:])
        flat = run.signal.y.square().mean().item()
        return {
            "mse": run.errors[steps],
            "untrained_mse": run.errors[0],
            "flat_line_mse": flat,
            "parameters": count(run.model),
            "says": verdict(choice, steps, run.errors[steps], flat, others),
            "errors": run.errors[: steps + 1],
            "given": run.given[steps],
            "untrained": run.given[0],
            "data": run.signal,
            "drawn": (choice, others, {one: LINES[i % len(LINES)] for i, one in enumerate(self.runs)}),
        }


def verdict(
    choice: Choice, steps: int, error: float, flat: float, others: Mapping[Choice, list[float]]
) -> str:
    """How much of the signal is not yet fitted, and how far earlier runs have come."""
    none = f" {choice.model} has no scale to set." if choice.scale is None else ""
    when = f"after {steps} steps" if steps else "untrained"
    said = (
        f"{choice.name} {when}: the error is {100 * error / flat:.3g} % of what a flat line at 0 has.{none}"
    )
    if others:
        before = "; ".join(
            f"{named(one, choice)}: {tidy(errors[-1])} after {len(errors) - 1}"
            for one, errors in others.items()
        )
        said += f" Earlier runs: {before}."
    return said


def named(one: Choice, beside: Choice) -> str:
    return one.name if one.lr == beside.lr else f"{one.name}, rate {one.lr:g}"


# the picture
def draw(fig: Figure, result: dict) -> None:
    """The signal and what the network makes of it; the errors of this run and of earlier ones."""
    left, right = panels(fig, (1.7, 1), (0.75, 0.95), right=0.2, top=0.4, bottom=0.6)
    data, (choice, _, lines), steps = result["data"], result["drawn"], len(result["errors"]) - 1
    x, color = data.x.flatten(), lines[choice][0]
    left.plot(x, data.y.flatten(), color=GREY, lw=4, alpha=0.45, label="signal")
    left.plot(x, result["untrained"], color=BLACK, lw=1, ls=":", label="untrained")
    if steps:
        left.plot(x, result["given"], color=color, lw=1.5, label=f"{steps} steps")
    left.set(xlim=(-1, 1), ylim=(-1.15, 1.4), xlabel="x", ylabel="value")
    left.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    left.legend(loc="upper left", ncols=3, columnspacing=1.2, handlelength=1.6, borderaxespad=0)
    left.set_title(f"{choice.name}: {result['parameters']:,} parameters")
    errors(right, result)


def errors(ax: Axes, result: dict) -> None:
    """Mean squared errors over the steps, logarithms on a plain axis; dotted a flat line's."""
    choice, others, lines = result["drawn"]
    own = result["errors"]
    for one, curve in others.items():
        color, style = lines[one]
        ax.plot(np.log10(curve), color=color, ls=style, lw=1.3, label=named(one, choice))
    ax.plot(np.log10(own), color=lines[choice][0], lw=2.5, label=choice.name)
    ax.plot(len(own) - 1, np.log10(own[-1]), "o", color=lines[choice][0], ms=7, mec="white", clip_on=False)
    ax.axhline(np.log10(result["flat_line_mse"]), color=BLACK, ls=":", lw=1)
    longest = max(SLICE, *(len(curve) - 1 for curve in (own, *others.values())))
    low = math.floor(np.log10(min(map(min, (own, *others.values())))))
    ax.set_yticks(range(low, 1), [f"{10.0**e:g}" for e in range(low, 1)])
    names = 0.04 + 0.075 * (1 + len(others))  # of the height, below the curves
    ax.set(xlim=(0, longest), ylim=(low + (low - 0.5) * names / (1 - names), 0.5))
    ax.set(xticks=[0, longest // 2, longest], xlabel="steps", ylabel="mean squared error")
    ax.set_title("error (dotted: a flat line)")
    ax.legend(loc="lower left", handlelength=1.8, borderaxespad=0.2, labelspacing=0.25)


def signal_fit(
    signals: Mapping[str, Signal] | None = None, *, qubits: int = 5, steps: int = 0, most: int = 300,
    seed: int = 0, **options,
) -> SignalFit:  # fmt: skip
    """Fit {name: signal of one coordinate}, by default `chirp` and `sound` of 256 points, live.

    QIREN has so many qubits, the others as many parameters as it; `steps` are done at the start, at most
    `most`. Raises ValueError for signals of more than one coordinate or value.

    >>> signal_fit().advance(20).result["mse"] < signal_fit().result["mse"]
    True
    """
    signals = {"chirp": chirp(256), "sound": sound(256)} if signals is None else dict(signals)
    check(signals, steps, most)
    return SignalFit(signals, qubits, steps, most, seed, **options)


def check(signals: Mapping[str, Signal], steps: int, most: int) -> None:
    if not signals:
        raise ValueError("signal_fit: give {name: Signal(x, y)}")
    for name, signal in signals.items():
        shapes = tuple(signal.x.shape), tuple(signal.y.shape)
        if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][1] != 1:
            raise ValueError(
                f"signal_fit: {name} has x {shapes[0]} and y {shapes[1]}; give (points, 1) of both"
            )
        if not signal.y.any():
            raise ValueError(f"signal_fit: {name} is 0 everywhere, so there is nothing to fit")
    if not 0 <= steps <= most:
        raise ValueError(f"signal_fit: steps={steps} is not from 0 to most={most}")
