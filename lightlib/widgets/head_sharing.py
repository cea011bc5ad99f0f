"""Head sharing: which query heads read which keys and values, and what that leaves of the cache.

GQA, groups of heads: Ainslie et al. 2023, arXiv:2305.13245. MQA, one group: Shazeer 2019, arXiv:1911.02150
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import ipywidgets as W
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lightlib.report import tidy
from lightlib.widgets.anatomy import MODELS, Shape, kv_cache_bytes
from lightlib.widgets.devices import DEVICES
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.model_calculator import divisors
from lightlib.widgets.numbers import scaled
from lightlib.widgets.style import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, bar_rows, boxes, panels

OWN = "our own 8 heads"
SHAPES = {OWN: Shape(4, 128, 8, 8, 16, 352, 2048, True), **MODELS}
CONTEXTS = [2**k for k in range(8, 18)]
BATCHES = [2**k for k in range(9)]
COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION)
NAMED = 16  # heads at most whose boxes have a name
ROWS = 7  # bars at most


def named(heads: int, kv_heads: int) -> str:
    """What attention with so many key-value heads is called.

    >>> named(32, 32), named(32, 8), named(32, 1)
    ('MHA', 'GQA-8', 'MQA')
    """
    return "MHA" if kv_heads == heads else "MQA" if kv_heads == 1 else f"GQA-{kv_heads}"


def reads(heads: int, kv_heads: int) -> list[int]:
    """The key-value head that each query head reads: neighbours share one.

    >>> reads(6, 2)
    [0, 0, 0, 1, 1, 1]
    """
    return [q // (heads // kv_heads) for q in range(heads)]


def own_kv_heads(shapes: Mapping[str, Shape], start: str) -> Callable:
    """For `Explorer(settle=...)`: a model that is chosen brings its own number of key-value heads."""
    chosen = [start]

    def settle(controls) -> None:
        name = controls["model"].value
        if name != chosen[0]:
            chosen[0] = name
            controls["kv_heads"].options = divisors(shapes[name].heads)
            controls["kv_heads"].value = shapes[name].kv_heads

    return settle


def model_controls(shapes: Mapping[str, Shape], start: str, who: str) -> dict[str, W.ValueWidget]:
    """Which model, and how many key-value heads it is to have."""
    if start not in shapes:
        raise ValueError(f"{who}: no model {start!r}; choose one of {', '.join(shapes)}")
    return {
        "model": W.Dropdown(options=list(shapes), value=start),
        "kv_heads": W.SelectionSlider(
            options=divisors(shapes[start].heads), value=shapes[start].kv_heads, description="KV heads, G"
        ),
    }


def draw(fig: Figure, result: dict) -> None:
    """Each query head with the key-value head that it reads; the cache for other numbers of them."""
    left, right = panels(fig, (2.3, 1), (0.75, 0.85), right=0.1, top=0.4, bottom=0.2)
    heads, kv_heads, read = result["heads"]
    diagram(left, heads, kv_heads, read)
    sharing = f"{heads} query heads, {heads // kv_heads} to each KV head"
    left.set_title(
        f"{result['kind']}: {sharing}" if kv_heads < heads else f"MHA: {heads} heads, nothing shared"
    )
    cache = result["by_kv_heads"]
    texts = [scaled(n, "B") for n in cache.values()]
    colors = [VERMILION if g == kv_heads else SKY for g in cache]
    places = list(cache)
    bar_rows(
        right, [named(heads, g) for g in cache], list(cache.values()), texts, colors,
        bold=places.index(kv_heads), room=1.75,
    )  # fmt: skip
    right.set_title("KV cache")


def diagram(ax: Axes, heads: int, kv_heads: int, read: list[int]) -> None:
    """Query heads above, keys and values below, a line from each query head to what it reads; all 1 wide."""
    slot = 1 / heads
    own = (np.arange(heads) + 0.5) * slot  # centre of each query head
    centres = np.array([own[[r == g for r in read]].mean() for g in range(kv_heads)])
    wide, half = 0.78 * slot, 0.5 * min(0.92 / kv_heads, 2.4 * max(slot, 1 / 20))
    colors = [COLORS[g % len(COLORS)] for g in range(kv_heads)]
    lines = [((own[q], 0.78), (centres[g], 0.32)) for q, g in enumerate(read)]
    ax.add_collection(LineCollection(lines, colors=[colors[g] for g in read], lw=2 if heads <= NAMED else 1))
    queries = [(x - wide / 2, x + wide / 2, 0.78, 0.95) for x in own]
    keys = [(x - half, x - 0.04 * half, 0.12, 0.32) for x in centres]
    values = [(x + 0.04 * half, x + half, 0.12, 0.32) for x in centres]
    if kv_heads > NAMED:  # too thin for two boxes
        keys, values = [(x - wide / 2, x + wide / 2, 0.12, 0.32) for x in centres], []
    fills = [pale(color) for color in colors] if heads <= NAMED else colors
    boxes(ax, queries + keys + values, [fills[g] for g in read] + fills + fills[: len(values)])
    if heads <= NAMED:
        write(ax, own, 0.865, [f"q{q + 1}" for q in range(heads)])
    if heads <= NAMED and kv_heads <= NAMED / 2:
        write(ax, centres - 0.52 * half, 0.22, [f"k{g + 1}" for g in range(kv_heads)])
        write(ax, centres + 0.52 * half, 0.22, [f"v{g + 1}" for g in range(kv_heads)])
    for y, name in ((0.865, "queries"), (0.22, "keys,\nvalues")):
        ax.text(-0.02, y, name, ha="right", va="center", fontsize=10)
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.axis("off")


def write(ax: Axes, across, y: float, names: list[str]) -> None:
    for x, name in zip(across, names, strict=True):
        ax.text(x, y, name, ha="center", va="center", fontsize=10)


def pale(color: str) -> tuple[float, ...]:
    """A tint that black letters can be read on."""
    return tuple(0.45 * part + 0.55 for part in to_rgb(color))


def judge(shape: Shape, token_bytes: float, cache: float, share: float, where: str, device: str) -> str:
    """What sharing leaves of the cache, and of the device's memory."""
    kind, times = named(shape.heads, shape.kv_heads), shape.heads // shape.kv_heads
    shared = f"{times} query heads read each key and value" if times > 1 else "every head has its own cache"
    less = f", {times} times less than MHA" if times > 1 else ""
    fits = f"{100 * share:.3g} %" if share <= 1 else f"{tidy(share)} times as much as there is"
    return (
        f"{kind}: {shared}; a token leaves {scaled(token_bytes, 'B')} in the cache{less}. "
        f"At {where} the cache takes {scaled(cache, 'B')}; of the memory ({device}) that is {fits}."
    )


def some(numbers: list[int], kept: int, most: int) -> list[int]:
    """At most `most` of `numbers`, spread over them, with `kept` and both ends among them, largest first.

    >>> some([1, 2, 3, 4, 6, 8, 12, 24], 3, 4)
    [24, 8, 3, 1]
    """
    spread = {round(i * (len(numbers) - 1) / (most - 1)) for i in range(most)}
    chosen = {numbers[i] for i in spread} | {kept}
    while len(chosen) > most:
        chosen.remove(min(chosen - {kept, numbers[0], numbers[-1]}, key=lambda n: abs(n - kept)))
    return sorted(chosen, reverse=True)


def head_sharing(shapes: Mapping[str, Shape] = SHAPES, model: str = OWN, **options) -> Explorer:
    """Explore how many key-value heads a model's query heads share, keys and values in 16 bits.

    >>> head_sharing().set(model="LLaMA-3-8B").result["kv_per_token_bytes"]
    131072.0
    """
    controls = model_controls(shapes, model, "head_sharing")

    def compute(model, kv_heads, context, batch, device):
        shape = replace(shapes[model], kv_heads=kv_heads)
        heads, gpu = shape.heads, DEVICES[device]
        token, cache = kv_cache_bytes(shape, 1), kv_cache_bytes(shape, context, batch)
        share = cache / gpu.memory_gb / 1e9
        offered = some(divisors(heads), kv_heads, ROWS)
        where = f"{context:,} tokens" + (f" x {batch} sequences" if batch > 1 else "")
        return {
            "kind": named(heads, kv_heads),
            "queries_per_kv_head": heads // kv_heads,
            "attention_weights_a_layer": shape.block_weights["attention"] // shape.layers,
            "kv_per_token_bytes": token,
            "kv_cache_bytes": cache,
            "of_the_memory_share": share,
            "says": judge(shape, token, cache, share, where, device),
            "heads": (heads, kv_heads, reads(heads, kv_heads)),
            "by_kv_heads": {g: kv_cache_bytes(replace(shape, kv_heads=g), context, batch) for g in offered},
        }

    return Explorer(
        compute, draw, name="head_sharing", size=(8.6, 3.0), settle=own_kv_heads(shapes, model), **options,
        **controls,
        context=W.SelectionSlider(options=CONTEXTS, value=4096),
        batch=W.SelectionSlider(options=BATCHES, value=1),
        device=W.Dropdown(options=list(DEVICES), value="laptop"),
    )  # fmt: skip
