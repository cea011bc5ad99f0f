"""Model calculator: the shape of a model -> its weights, its cache, its FLOPs, its fastest possible speed."""

from __future__ import annotations

import math
from dataclasses import asdict, fields

import ipywidgets as W
from matplotlib.figure import Figure

from lightlib.widgets.anatomy import (
    FAMILIES,
    MODELS,
    Shape,
    flop_per_token,
    kv_cache_bytes,
    parameters,
    read_bytes,
)  # fmt: skip
from lightlib.widgets.devices import DEVICES, Device, known_devices
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.numbers import label, scaled
from lightlib.widgets.style import BLUE, GREEN, GREY, ORANGE, PALE, PURPLE, SKY, VERMILION, bar_rows, panels

BITS = (2, 3, 4, 4.25, 5, 6, 8, 16, 32)
PARTS = {"embedding": SKY, "attention": ORANGE, "mlp": BLUE, "norms": PURPLE, "head": GREEN}


def calculate(
    shape: Shape, *, context: int = 2048, batch: int = 1, bits: float = 16, kv_bits: float = 16,
    device: Device = DEVICES["laptop"], devices: dict[str, Device] = DEVICES,
) -> dict:  # fmt: skip
    """What the model weighs and the roofline's limits: time = max(bytes / bandwidth, FLOPs / rate).

    All weights in `bits`, products at the device's 16-bit rate. A model that does not fit has no speed.
    """
    parts = parameters(shape)
    weights, cache = sum(parts.values()) * bits / 8, kv_cache_bytes(shape, context, batch, kv_bits)
    prefill, decode = flop_per_token(shape, context)
    read = read_bytes(shape, bits) + cache
    steps = {name: d.seconds(read, decode * batch)[0] for name, d in devices.items()}
    seconds, bound = device.seconds(read, decode * batch)
    first, _ = device.seconds(read_bytes(shape, bits), prefill * context * batch)
    room = device.memory_gb * 1e9 - weights - cache
    return {
        "parameters": sum(parts.values()),
        "weights_bytes": weights,
        "kv_cache_bytes": cache,
        "prefill_per_token_flop": prefill,
        "decode_per_token_flop": decode,
        "fits_in_memory": room >= 0,
        "fastest_ttft_ms": first * 1e3 if room >= 0 else None,
        "fastest_tokens_per_s": batch / seconds if room >= 0 else None,
        "bound_by": bound,
        "says": f"{device.name}: {_sentence(room, bound, scaled(read, 'B'), scaled(decode * batch, 'FLOP'))}"
        + _limit(shape, context),
        "parts": parts,
        "speeds": {
            name: (batch / s, weights + cache <= devices[name].memory_gb * 1e9) for name, s in steps.items()
        },
        "device": device,
    }


def _sentence(room: float, bound: str, moved: str, flop: str) -> str:
    if room < 0:
        return f"too big by {scaled(-room, 'B')}; take fewer bits, a shorter context or a smaller batch."
    if bound == "memory":
        return f"a decode step reads {moved}, which takes longer than its {flop}: fewer bytes are faster."
    return f"the {flop} of a decode step take longer than reading {moved}: fewer bytes alone are not faster."


def _limit(shape: Shape, context: int) -> str:
    positions = FAMILIES[shape.family].positions
    return (
        f" But {shape.family} has positions for {positions:,} tokens only." if 0 < positions < context else ""
    )


def draw(fig: Figure, result: dict) -> None:
    """Parameters by part; bytes against the device's memory; the fastest decode on every device."""
    left, middle, right = panels(fig, (1, 0.7, 1), (0.95, 0.8, 1.05), right=0.75, top=0.6, bottom=0.5)
    parts = {label(name): n for name, n in result["parts"].items() if n or name != "head"}
    total = sum(parts.values())
    texts = [f"{scaled(n, '').replace('G', 'B')} ({100 * n / total:.2g} %)" for n in parts.values()]
    bar_rows(left, list(parts), list(parts.values()), texts, list(PARTS.values()), room=2.0)
    left.set_title("parameters by part")

    weights, cache, memory = result["weights_bytes"], result["kv_cache_bytes"], result["device"].memory_gb
    middle.bar([0, 0], [weights / 1e9, cache / 1e9], 0.5, bottom=[0, weights / 1e9], color=[BLUE, ORANGE])
    top = 1.15 * (weights + cache) / 1e9
    if memory <= 3 * top:
        middle.axhline(memory, color=VERMILION, ls="--")
        middle.text(0.62, memory, "memory", color=VERMILION, ha="right", va="bottom", fontsize=10)
        top = max(top, 1.15 * memory)
    middle.set(ylim=(0, top), xlim=(-0.65, 0.65), ylabel="GB", xticks=[])
    middle.locator_params(axis="y", nbins=5)
    middle.set_title(f"KV cache {scaled(cache, 'B')}", color="#9A6700", pad=21)  # orange, dark enough to read
    middle.text(0, 1.04, f"weights {scaled(weights, 'B')}", color=BLUE, transform=middle.transAxes)

    speeds = result["speeds"]
    rates = [rate for rate, _ in speeds.values()]
    chosen = [name == result["device"].name for name in speeds]
    colors = [
        PALE if not fits else BLUE if name == result["device"].name else SKY
        for name, (_, fits) in speeds.items()
    ]
    texts = [
        "does not fit" if not fits else f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
        for rate, fits in speeds.values()
    ]
    lengths = [math.log10(1 + rate) for rate in rates]
    bar_rows(right, list(speeds), lengths, texts, colors, bold=chosen.index(True))
    right.set_title("fastest decode (tokens/s)")
    right.set_xlabel("logarithmic; peaks of the data sheets", color=GREY, fontsize=10)


def model_calculator(here: Device | None = None, model: str = "SmolLM2-135M", **options) -> Explorer:
    """Explore `calculate`. `here`: this machine, from `devices.this_machine(roofline())`, as one more device.

    >>> model_calculator().set(preset="LLaMA-3-8B", bits=16).result["parameters"]
    8030261248
    """
    if model not in MODELS:
        raise ValueError(f"no model {model!r}; choose one of {', '.join(MODELS)}")
    devices, start = known_devices(here), MODELS[model]
    names = [f.name for f in fields(Shape)]

    def compute(context, batch, bits, kv_bits, device, **shape):
        return calculate(
            Shape(**shape), context=context, batch=batch, bits=bits, kv_bits=kv_bits,
            device=devices[device], devices=devices,
        )  # fmt: skip

    controls = {
        "layers": W.IntSlider(start.layers, 1, 128),
        "width": W.IntSlider(start.width, 64, 16384, 64),
        "heads": W.IntSlider(start.heads, 1, 128),
        "kv_heads": W.Dropdown(options=divisors(start.heads), value=start.kv_heads),
        "head_dim": W.IntSlider(start.head_dim, 16, 256, 16),
        "d_ff": W.IntSlider(start.d_ff, 64, 32768, 64),
        "vocabulary": W.IntSlider(start.vocabulary, 256, 262144),
        "family": W.Dropdown(options=list(FAMILIES), value=start.family),
        "tied": W.Checkbox(start.tied, description="tied head", indent=True),
        "bits": W.SelectionSlider(options=BITS, value=16, description="weight bits"),
        "kv_bits": W.SelectionSlider(options=BITS, value=16),
        "context": W.SelectionSlider(options=[2**k for k in range(5, 18)], value=2048),
        "batch": W.SelectionSlider(options=[2**k for k in range(9)], value=1),
        "device": W.Dropdown(options=list(devices), value="laptop"),
    }
    presets = {name: {k: asdict(shape)[k] for k in names} for name, shape in MODELS.items()}
    return Explorer(
        compute,
        draw,
        name="model_calculator",
        size=(8.6, 3.0),
        presets=presets,
        settle=share_heads,
        **options,
        **controls,
    )


def share_heads(controls) -> None:
    """Offer the kv heads that the heads can share; keep the chosen number, or the next smaller that fits."""
    heads, kv_heads = controls["heads"].value, controls["kv_heads"]
    if kv_heads.options != tuple(divisors(heads)):
        kept = max(k for k in divisors(heads) if k <= kv_heads.value)
        kv_heads.options = divisors(heads)
        kv_heads.value = kept


def divisors(n: int) -> list[int]:
    """The numbers that divide `n`, small to large: how many kv heads `n` heads can share."""
    return [k for k in range(1, n + 1) if n % k == 0]
