"""Sparse roofline: how much faster than dense a product can be at best, by storage and share of zeros.

Every time is the longest of what must happen: the bytes that travel, the multiplications, and if asked for
the instructions that turn stored words back into weights. What was measured on GPUs is drawn beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ipywidgets as W
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from lightlib.kernels import results
from lightlib.widgets.devices import GPUS, Device
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.style import BLUE, GREEN, GREY, ORANGE, PALE, PURPLE, VERMILION, bar_rows, panels

REACHED = 0.9  # share of a data sheet's peaks that large copies and products come to
LANES_A_CLOCK = 4 * 32  # four schedulers of a multiprocessor start one instruction of 32 lanes each
FILLED = 0.7  # share of those starts that real kernels make use of
CSL_WORK = 2.5, 3.5  # instructions a weight and a stored value: 4.3, 3.6, 3.2 a weight at 50, 70, 80 % zeros
FEW = 2  # tokens that row-ELL is made for


@dataclass(frozen=True)
class Storage:
    """Bytes and instructions for each weight, and more for each weight that is stored."""

    name: str
    color: str
    weight_bytes: float
    value_bytes: float
    weight_work: float
    value_work: float


# Instructions: of single lanes, counted in our kernels' loops as compiled for sm_90 and 16 tokens
STORAGES = {
    "csl": Storage("Tiled-CSL", GREEN, 0, 4, *CSL_WORK),
    "compact": Storage("compact CSL", ORANGE, 0, 25 / 8, 3.4, 5.3),
    # 16 + 8 bits, and 16 more for every 32 values
    "ell": Storage("row-ELL", PURPLE, 0, 3 + 2 / 32, 0, 16.1),
    "bitmap": Storage("bitmap", BLUE, 1 / 8, 2, 7.0, 0),
    # all weights kept; a scale of 16 bits for every 128
    "int4": Storage("int4, all kept", VERMILION, 0.5 + 2 / 128, 0, 4.5, 0),
}
SHAPES = {
    "Llama-7B gate+up, 22016 x 4096": (22016, 4096),
    "Llama-13B down, 5120 x 13824": (5120, 13824),
    "OPT-30B fc1, 28672 x 7168": (28672, 7168),
    "Llama-7B o, 4096 x 4096": (4096, 4096),
}
TOKENS = [2**k for k in range(13)]
SPARSITIES = np.linspace(0, 0.95, 96)
LOW, HIGH = 0.4, 12.0  # ends of the axis of speeds
TICKS = (0.5, 1, 2, 3, 5, 10)


def instructions_per_s(device: Device) -> float:
    """Instructions of single lanes that a kernel gets done in a second on the whole device."""
    return LANES_A_CLOCK * FILLED * device.multiprocessors * device.ghz * 1e9


def times_us(
    device: Device, shape: tuple[int, int], tokens: int, weight_bytes: float, work: float = 0.0
) -> dict[str, float]:
    """Microseconds of y = x W^T, W (out, in), by what could bind it: {limit: us}; x and y take 16 bits."""
    n_out, n_in = shape
    count, moved = n_out * n_in, 2 * tokens * (n_out + n_in)
    return {
        "memory": (weight_bytes * count + moved) / (device.gb_per_s * REACHED) / 1e3,
        "tensor cores": 2 * tokens * count / (device.gflop_per_s * REACHED) / 1e3,
        "decoding": work * count / instructions_per_s(device) * 1e6,
    }


def speed(
    storage: Storage, sparsity: float, device: Device, shape: tuple[int, int], tokens: int, decode: bool
) -> tuple[float, str]:
    """(how many times faster than dense bfloat16 it can be, what limits it); decode: instructions count."""
    kept = 1 - sparsity
    stored = storage.weight_bytes + storage.value_bytes * kept
    work = (storage.weight_work + storage.value_work * kept) * decode
    times = times_us(device, shape, tokens, stored, work)
    limit = max(times, key=times.get)
    return max(times_us(device, shape, tokens, 2).values()) / times[limit], limit


def break_even(storage: Storage, *where) -> float:
    """The least sparsity from which on it can be faster than dense; 1 if it cannot. where: as in `speed`."""
    low, high = 0.0, 1.0
    if speed(storage, high, *where)[0] < 1 + 1e-6:
        return 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if speed(storage, middle, *where)[0] > 1 + 1e-6 else (middle, high)
    return high


def measured(folder: Path) -> list[dict]:
    """Every row of the results in `folder`, each with the device that it was measured on."""
    return [{**row, "device": name} for name in results.devices(folder) for row in results.rows(name, folder)]


def judge(now: dict[str, tuple[float, str]], sparsity: int) -> str:
    """The best of the sparse storages, what limits it, and how it compares with four bits."""
    sparse = {STORAGES[name].name: one for name, one in now.items() if name != "int4"}
    times, limit = max(sparse.values())
    four = now["int4"][0]
    if times < 1.005:
        return f"At {sparsity} % zeros no storage beats dense; the limit: {sparse['bitmap'][1]}."
    best = " and ".join(name for name, (other, _) in sparse.items() if other > 0.995 * times)
    versus = "as much as" if abs(times / four - 1) < 0.005 else "more than" if times > four else "less than"
    return (
        f"Best with {sparsity} % zeros: {best}, at most {times:.3g} times dense, limited by {limit}; "
        f"{versus} int4 with all weights ({four:.3g})."
    )


def draw(fig: Figure, result: dict) -> None:
    """Speed over sparsity with each break-even and measured points; all storages at the chosen sparsity."""
    left, right = panels(fig, (1.6, 1), (0.65, 1.3), right=0.2, top=0.62, bottom=0.58)
    here, now = result["sparsity"][0], result["now"]
    left.axvline(100 * here, color=PALE, lw=6, zorder=0)
    left.axhline(1, color=GREY, ls=":", lw=1.5)
    left.text(94, 0.97, "dense", ha="right", va="top", color=GREY, fontsize=10)
    for name, curve in result["curves"].items():
        storage, even = STORAGES[name], result["even"].get(name, 1)
        left.plot(100 * SPARSITIES, curve, color=storage.color, ls="--" if name == "int4" else "-")
        if LOW < now[name][0] < HIGH:
            left.plot(100 * here, now[name][0], "o", ms=8, color=storage.color, mec="white")
        if even < SPARSITIES[-1]:
            left.plot(100 * even, 1, "|", ms=13, mew=2, color=storage.color)
    for row in result["rows"]:
        color = STORAGES[row["layout"]].color
        left.plot(100 * row["sparsity"], row["times_cublas"], "D", ms=6, color=color, mec="black")
    left.set(xlim=(0, 100 * SPARSITIES[-1]), ylim=(LOW, HIGH), yscale="log")
    left.set(xlabel="zeros (%)", ylabel="times dense, at best")
    left.yaxis.set_major_locator(FixedLocator(TICKS))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_locator(NullLocator())
    left.yaxis.set_minor_formatter(NullFormatter())
    left.grid(True)
    left.set_title(f"bars on the dotted line: break-even\n{result['dots'][0]}", fontsize=10)

    names = [STORAGES[name].name for name in now]
    values = [times for times, _ in now.values()]
    texts = [f"{times:.3g} x\n{limit}" for times, limit in now.values()]
    colors = [STORAGES[name].color for name in now]
    bar_rows(right, names, values, texts, colors, bold=values.index(max(values)), room=1.9)
    right.axvline(1, color=GREY, ls=":", lw=1.5)
    right.set_title(f"at {100 * here:.0f} % zeros,\nand what limits it", fontsize=10)


def sparse_roofline(folder: Path = results.FOLDER, **options) -> Explorer:
    """Explore `speed`: sparsity, tokens, layer and GPU, and whether instructions count.

    folder: where `lightlib.kernels.bench` has written what it measured.
    """
    rows = measured(folder)

    def compute(sparsity, tokens, shape, device, limit):
        gpu, size, share = GPUS[device], SHAPES[shape], sparsity / 100
        where = gpu, size, tokens, limit == "decoding too"
        offered = {k: s for k, s in STORAGES.items() if k != "ell" or tokens <= FEW}
        now = {name: speed(storage, share, *where) for name, storage in offered.items()}
        even = {name: break_even(storage, *where) for name, storage in offered.items() if name != "int4"}
        here = [
            row
            for row in rows
            if (row["n_out"], row["n_in"], row["tokens"]) == (*size, tokens)
            and row["layout"] in offered
            and all(word in row["device"] for word in device.split())
        ]
        fits = 2 * size[0] * size[1] <= gpu.l2_mb * 2**20
        cached = f" The dense weight fits the L2 cache ({gpu.l2_mb:g} MB), where memory need not bind."
        dots = f"arithmetic, not yet measured {'at this setting' if rows else 'on a GPU'}"
        if here:
            dots = f"diamonds: measured on {here[0]['device']}"
        return {
            "dense_us": max(times_us(gpu, size, tokens, 2).values()),
            **{f"{name}_times_dense": times for name, (times, _) in now.items()},
            **{f"{name}_pays_from_share": share for name, share in even.items()},
            "says": judge(now, sparsity) + cached * fits + f" {dots[0].upper()}{dots[1:]}.",
            "now": now,
            "even": even,
            "curves": {n: [speed(s, z, *where)[0] for z in SPARSITIES] for n, s in offered.items()},
            "rows": here,
            "dots": [dots],
            "sparsity": [share],
        }

    return Explorer(
        compute, draw, name="sparse_roofline", size=(8.6, 3.7), **options,
        sparsity=W.IntSlider(60, 0, 95, description="zeros (%)"),
        tokens=W.SelectionSlider(options=TOKENS, value=16),
        shape=W.Dropdown(options=list(SHAPES), description="layer", layout=W.Layout(width="330px")),
        device=W.Dropdown(options=list(GPUS), value="H100"),
        limit=W.Dropdown(options=["memory only", "decoding too"], value="memory only"),
    )  # fmt: skip
