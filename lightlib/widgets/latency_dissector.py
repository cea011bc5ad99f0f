"""Latency dissector: where the milliseconds of one request go, and which limit each of them is bound by."""

from __future__ import annotations

import ipywidgets as W
from matplotlib.figure import Figure

from lightlib.widgets.anatomy import MODELS, Shape, attention_flop, kv_cache_bytes
from lightlib.widgets.devices import Device, known_devices
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.style import BLACK, BLUE, ORANGE, PURPLE, boxes, panels

REASONS = {"overhead": PURPLE, "memory": BLUE, "compute": ORANGE}
ADVICE = {
    "overhead": "starting operations takes longest: fewer, larger operations help; fewer bytes hardly do",
    "memory": "reading weights and cache takes longest: fewer bytes, or a larger batch, help",
    "compute": "multiplying takes longest: fewer FLOPs help; fewer bytes do not",
}


def forward_ms(
    shape: Shape,
    device: Device,
    tokens: int,
    context: float,
    batch: int,
    bytes_per_weight: float,
    overhead_us,
) -> dict[str, float]:
    """Milliseconds of one forward pass of `tokens` new tokens a sequence by what binds them: {reason: ms}.

    Linear layers and attention each take max(bytes / bandwidth, FLOPs / rate); every layer adds its overhead.
    """
    weights, head = (
        sum(shape.block_weights.values()),
        shape.head_weights,
    )  # the head works on one token a sequence
    pieces = (
        ((weights + head) * bytes_per_weight, 2 * batch * (weights * tokens + head)),
        (kv_cache_bytes(shape, context, batch), attention_flop(shape, context) * tokens * batch),
    )
    spent = dict.fromkeys(REASONS, 0.0)
    for n_bytes, n_flop in pieces:
        seconds, reason = device.seconds(n_bytes, n_flop)
        spent[reason] += seconds * 1e3
    spent["overhead"] += shape.layers * overhead_us / 1e3
    return spent


def dissect(
    shape: Shape,
    device: Device,
    *,
    prompt: int,
    new: int,
    batch: int,
    bytes_per_weight: float,
    overhead_us: float,
) -> dict:
    """Time to first token, time per output token (at the middle of the output), and their sum by reason.

    total = TTFT + TPOT x new, as in `lightlib.measure.latency`. Tokens a second count the whole batch.
    """
    options = (batch, bytes_per_weight, overhead_us)
    first = forward_ms(shape, device, prompt, prompt, *options)
    step = forward_ms(shape, device, 1, prompt + new / 2, *options)
    ttft, tpot = sum(first.values()), sum(step.values())
    total = ttft + tpot * new
    shares = {reason: (first[reason] + step[reason] * new) / total for reason in REASONS}
    worst = max(shares, key=shares.get)
    return {
        "ttft_ms": ttft,
        "tpot_ms": tpot,
        "total_ms": total,
        "speed_tokens_per_s": batch * new / total * 1e3,
        **{f"{reason}_share": share for reason, share in shares.items()},
        "says": f"{worst.capitalize()} dominates, {100 * shares[worst]:.0f} % of the time: {ADVICE[worst]}.",
        "first": first,
        "step": step,
        "steps": range(new),
    }


def draw(fig: Figure, result: dict) -> None:
    """Above, the request along time: the prompt, then token after token. Below, what each part is made of."""
    (ax,) = panels(fig, (1,), (1.3,), right=0.3, top=0.35, bottom=3.2)
    timeline(ax, result)
    (ax,) = panels(fig, (1,), (1.3,), right=0.3, top=2.0, bottom=0.55)
    rows = {
        f"first token\n{result['ttft_ms']:,.4g} ms": result["first"],
        f"each next one\n{result['tpot_ms']:,.4g} ms": result["step"],
        f"whole request\n{result['total_ms']:,.4g} ms": {r: result[f"{r}_share"] for r in REASONS},
    }
    for row, (name, spent) in enumerate(rows.items()):
        ax.text(-1, row, name, ha="right", va="center", fontsize=10)
        left = 0.0
        for reason, color in REASONS.items():
            share = 100 * spent[reason] / sum(spent.values())
            boxes(ax, [(left, left + share, row - 0.36, row + 0.36)], color)
            if share > 14:
                ink = "white" if reason == "memory" else "black"
                ax.text(left + share / 2, row, f"{reason} {share:.0f} %", ha="center", va="center", color=ink)
            left += share
    ax.set(xlim=(0, 100), ylim=(2.5, -0.5), xticks=[0, 50, 100], xlabel="share of its time (%)")
    ax.yaxis.set_visible(False)


def timeline(ax, result: dict) -> None:
    """The prompt's block and up to 400 tokens' blocks as coloured stretches of one line, in ms."""
    blocks = [result["first"]] + [result["step"]] * min(len(result["steps"]), 400)
    now, stretches, colors, starts = 0.0, [], [], []
    for spent in blocks:
        starts.append(now)
        for reason, ms in spent.items():
            stretches.append((now, now + ms, 0, 1))
            colors.append(REASONS[reason])
            now += ms
    boxes(ax, stretches, colors)
    if len(blocks) <= 130:
        ax.vlines(starts[1:], 0, 1, color="white", lw=0.7)
    ax.vlines(result["ttft_ms"], -0.12, 1.12, color=BLACK, lw=1.5)
    ax.set(ylim=(0, 1.12), xlim=(0, now), xlabel="time since the request (ms)")
    ax.set_title(f"prompt, then {len(blocks) - 1} output tokens (line: the first)")
    for x, (reason, color) in zip((0.62, 0.77, 0.9), REASONS.items(), strict=True):
        ax.text(x, 1.02, "\u25a0", color=color, transform=ax.transAxes, fontsize=13)
        ax.text(x + 0.025, 1.03, reason, transform=ax.transAxes, fontsize=10)
    ax.yaxis.set_visible(False)
    ax.spines["left"].set_visible(False)


OVERHEADS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
BYTES = (
    ("4 (float32)", 4.0),
    ("2 (bfloat16)", 2.0),
    ("1 (int8)", 1.0),
    ("0.53 (int4, groups of 64)", 0.53125),
)
LAPTOP = {"bytes_per_weight": 2.0, "overhead_us": 1000}
PRESETS = {
    "135M eager, laptop": {"model": "SmolLM2-135M", "device": "laptop", **LAPTOP},
    "135M compiled, laptop": {"model": "SmolLM2-135M", "device": "laptop", **LAPTOP, "overhead_us": 20},
    "8B 4-bit, RTX 4090": {
        "model": "LLaMA-3-8B", "device": "RTX 4090", "bytes_per_weight": 0.53125, "overhead_us": 5,
    },
    "8B eager, H100": {
        "model": "LLaMA-3-8B", "device": "H100", "bytes_per_weight": 2.0, "overhead_us": 500,
    },
}  # fmt: skip


def latency_dissector(here: Device | None = None, **options) -> Explorer:
    """Explore `dissect`, at first with a 135M model on a laptop under eager PyTorch.

    Overhead: eager transformers takes about 1 ms a layer on two CPU cores to start its operations.
    here: this machine, from `devices.this_machine(roofline())`, as one more device.
    """
    devices = known_devices(here)

    def compute(model, device, **knobs):
        return dissect(MODELS[model], devices[device], **knobs)

    controls = {
        "model": W.Dropdown(options=list(MODELS), value="SmolLM2-135M"),
        "device": W.Dropdown(options=list(devices), value="laptop"),
        "prompt": W.SelectionSlider(
            options=[2**k for k in range(4, 16)], value=256, description="prompt (tokens)"
        ),
        "new": W.SelectionSlider(options=[2**k for k in range(11)], value=64, description="new tokens"),
        "batch": W.SelectionSlider(
            options=[2**k for k in range(9)], value=1, description="batch (sequences)"
        ),
        "bytes_per_weight": W.Dropdown(options=BYTES, value=2.0, description="bytes per weight"),
        "overhead_us": W.SelectionSlider(
            options=OVERHEADS,
            value=1000,
            description="overhead (µs/layer)",
        ),
    }
    return Explorer(
        compute, draw, name="latency_dissector", size=(8.6, 4.6), presets=PRESETS, **options, **controls
    )
