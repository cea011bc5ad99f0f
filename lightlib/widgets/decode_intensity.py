"""Decode intensity: a step of decoding under a roofline, the linear layers apart from the attention.

The weights serve every sequence of a batch, a cache serves its own: the batch moves one point, G the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import ipywidgets as W
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightlib.report import tidy
from lightlib.widgets.anatomy import (
    MODELS,
    Shape,
    attention_flop,
    flop_per_token,
    kv_cache_bytes,
    parameters,
    read_bytes,
)  # fmt: skip
from lightlib.widgets.devices import Device, known_devices
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.head_sharing import BATCHES, CONTEXTS, model_controls, named, own_kv_heads
from lightlib.widgets.logarithm import exponents, powers_of_ten
from lightlib.widgets.numbers import say, scaled
from lightlib.widgets.style import BLACK, BLUE, GREY, ORANGE, PALE, VERMILION, bar_rows, panels
from lightlib.widgets.tensor_diagram import magnitudes

LINEAR, ATTENTION, STEP = "linear layers", "attention", "whole step"
LOOKS = {LINEAR: (BLUE, "o"), ATTENTION: (ORANGE, "s"), STEP: (VERMILION, "D")}
KV_BITS = (2, 3, 4, 8, 16)
BITS = (3, 4, 8, 16)
AXIS = (0.3, 3000)  # FLOP a byte


@dataclass(frozen=True)
class Part:
    """What a part of a step multiplies and reads, and the least time that takes."""

    flop: float
    read_bytes: float
    seconds: float
    bound: str  # "memory" or "compute"

    @property
    def intensity(self) -> float:
        """FLOP a byte."""
        return self.flop / self.read_bytes

    @property
    def rate(self) -> float:
        """FLOP/s."""
        return self.flop / self.seconds


def step_parts(
    shape: Shape, context: int, batch: int, device: Device, *, bits: float = 16, kv_bits: float = 16
) -> dict[str, Part]:
    """A decode step of `batch` sequences: its linear layers, its attention, and both, one after the other.

    Only weights and cache are counted as read; products run at the 16-bit rate whatever the bits.
    """
    attending = batch * attention_flop(shape, context)
    multiplying = batch * flop_per_token(shape, context)[1] - attending
    work = {
        LINEAR: (multiplying, read_bytes(shape, bits)),
        ATTENTION: (attending, kv_cache_bytes(shape, context, batch, kv_bits)),
    }
    parts = {name: Part(flop, read, *device.seconds(read, flop)) for name, (flop, read) in work.items()}
    flop, read, seconds = (
        sum(getattr(p, k) for p in parts.values()) for k in ("flop", "read_bytes", "seconds")
    )
    longer = max(parts.values(), key=lambda part: part.seconds)
    return {**parts, STEP: Part(flop, read, seconds, longer.bound)}


def draw(fig: Figure, result: dict) -> None:
    """The roof with the three points, then what takes how long."""
    left, right = panels(fig, (1.75, 1), (0.85, 1.15), right=0.1, top=0.42, bottom=0.62)
    roof(left, result["device"], result["parts"])
    parts = result["parts"]
    values = [1e3 * parts[name].seconds for name in LOOKS]
    texts = [f"{say('step_ms', v)}\n{parts[name].bound}" for name, v in zip(LOOKS, values, strict=True)]
    bar_rows(right, list(LOOKS), values, texts, [c for c, _ in LOOKS.values()], bold=2, room=1.85)
    right.set_title("least time of a step, and what bounds it", x=-0.55, fontsize=10)


def roof(ax: Axes, device: Device, parts: dict[str, Part]) -> None:
    bandwidth, rate = 1e9 * device.gb_per_s, 1e9 * device.gflop_per_s
    ridge, (low, high) = rate / bandwidth, AXIS
    x = exponents([low, ridge, high])
    ax.axvspan(x[0], x[1], color=PALE, alpha=0.35, lw=0)
    ax.plot(x, exponents([bandwidth * low, rate, rate]), color=BLACK)
    for name, (color, mark) in LOOKS.items():
        part, size = parts[name], 8 if name == STEP else 12
        ax.plot(*exponents([part.intensity, part.rate]), mark, ms=size, color=color, mec="white", label=name)
    magnitudes(ax, bandwidth * low / 2, rate * 4)
    powers_of_ten(ax.xaxis, low, high)
    ax.set(xlabel="arithmetic intensity (FLOP a byte)", ylabel="attainable FLOP/s")
    ax.grid(True)
    ax.legend(loc="lower right")
    ax.set_title(f"{device.name}: {scaled(bandwidth, 'B/s')}, {scaled(rate, 'FLOP/s')}", fontsize=10)
    top = np.log10(rate) + 0.12
    ax.text(x[1] - 0.05, top, "bound by memory", ha="right", va="bottom", fontsize=10, color=GREY)


def judge(shape: Shape, parts: dict[str, Part], device: Device, batch: int, kv_bits: float) -> str:
    """Where both points lie, why, and what to change."""
    ridge = device.gflop_per_s / device.gb_per_s
    linear, attention, step = (parts[name] for name in LOOKS)
    share, kind = attention.seconds / step.seconds, named(shape.heads, shape.kv_heads)
    sequences = f"{batch} sequences" if batch > 1 else "one sequence"
    moved = (
        f"{sequences} put{'' if batch > 1 else 's'} the linear layers at {tidy(linear.intensity)} FLOP a byte"
    )
    stays = (
        f"attention stays at {tidy(attention.intensity)} whatever the batch: {kind} in {kv_bits:g} bits "
        f"reads a cache for each sequence"
    )
    if linear.bound == "memory" and share < 0.5:
        advice = "most of the step reads weights: a larger batch comes almost free"
    elif share < 0.5:
        advice = "the linear layers compute most of the step: a larger batch is no faster a token"
    elif attention.bound == "memory":
        advice = (
            "most of the step reads the cache: fewer KV heads, fewer bits or fewer tokens help, a batch not"
        )
    else:
        advice = "most of the step multiplies in the attention: of what is here only fewer tokens help"
    return f"The ridge is at {tidy(ridge)} FLOP a byte; {moved}, {stays}. Here {advice}."


def decode_intensity(
    shapes: Mapping[str, Shape] = MODELS, model: str = "LLaMA-3-8B", *, here: Device | None = None, **options
) -> Explorer:
    """Explore `step_parts`. here: this machine, from `devices.this_machine(roofline())`, as one more device.

    >>> decode_intensity().set(kv_heads=8, batch=64).result["attention_flop_a_byte"]
    4.0
    """
    devices, controls = known_devices(here), model_controls(shapes, model, "decode_intensity")

    def compute(model, kv_heads, batch, context, kv_bits, bits, device):
        shape, machine = replace(shapes[model], kv_heads=kv_heads), devices[device]
        parts = step_parts(shape, context, batch, machine, bits=bits, kv_bits=kv_bits)
        linear, attention, step = (parts[name] for name in LOOKS)
        needed = sum(parameters(shape).values()) * bits / 8 + attention.read_bytes
        full = f" But weights and cache, {scaled(needed, 'B')}, do not fit into {machine.memory_gb:g} GB."
        return {
            "linear_flop_a_byte": linear.intensity,
            "attention_flop_a_byte": attention.intensity,
            "step_flop_a_byte": step.intensity,
            "weights_read_bytes": linear.read_bytes,
            "cache_read_bytes": attention.read_bytes,
            "step_ms": 1e3 * step.seconds,
            "linear_ms": 1e3 * linear.seconds,
            "attention_ms": 1e3 * attention.seconds,
            "cache_of_the_step_share": attention.seconds / step.seconds,
            "fastest_tokens_per_s": batch / step.seconds,
            "says": judge(shape, parts, machine, batch, kv_bits) + full * (needed > 1e9 * machine.memory_gb),
            "parts": parts,
            "device": machine,
        }

    return Explorer(
        compute, draw, name="decode_intensity", size=(8.6, 3.6), settle=own_kv_heads(shapes, model),
        **options, **controls,
        batch=W.SelectionSlider(options=BATCHES, value=1),
        context=W.SelectionSlider(options=CONTEXTS, value=4096),
        kv_bits=W.SelectionSlider(options=KV_BITS, value=16),
        bits=W.SelectionSlider(options=BITS, value=16, description="weight bits"),
        device=W.Dropdown(options=list(devices), value="H100"),
    )  # fmt: skip
