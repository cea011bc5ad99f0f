"""Pipeline timeline: a sparse product tile by tile, and when memory, cores and tensor cores wait.

One block that has a multiprocessor for itself: words travel from memory to registers, cores store them into
a tile of shared memory, tensor cores multiply the tile (kernels/sparse_matmul/csl_pipeline.h). Where several
blocks share a multiprocessor, each fills gaps that another one leaves.
"""

from __future__ import annotations

import ipywidgets as W
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightlib.kernels.sparse_matmul.csl import ROWS
from lightlib.kernels.sparse_matmul.launch import tokens_at_once
from lightlib.widgets.devices import GPUS, Device
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.sparse_roofline import CSL_WORK, REACHED, instructions_per_s
from lightlib.widgets.style import BLACK, BLUE, GREY, ORANGE, PALE, PURPLE, SKY, bar_rows, boxes, panels

Span = tuple[str, int, float, float]  # stage, tile, begin, end

UNITS = {"load": "memory", "extract": "cores", "multiply": "tensor cores"}  # what works in each stage
DOING = {"load": "loads", "extract": "extract", "multiply": "multiply"}
TILES, WIDTHS = 6, (32, 64, 128)  # tiles that are drawn; columns of a tile
COLORS = (SKY, ORANGE, PURPLE)  # of tiles, in turn
WAYS = {
    "one buffer": (1, 1),
    "two, words of 1 tile": (2, 1),
    "two, words of 2 tiles": (2, 2),
}  # buffers, held
ROOM = [("1 tile, as csl_v4", 1), ("2 tiles", 2)]
# What a tile takes is a model. Instructions: CSL_WORK, counted in csl_v4 as compiled for sm_90; clearing the
# tile and reading it back are part of them. What each tile adds, however small, is assumed: two barriers, and
# waiting for the last warp
STEP_CLOCKS = 100
MMA = 0.6  # share of the tensor cores' peak that `mma.sync` comes to on an H100, taken for all devices


def stage_us(device: Device, sparsity: float, columns: int, tokens: int) -> dict[str, float]:
    """Microseconds of each stage of a tile of 128 x `columns` on one multiprocessor: {stage: us}.

    load: 4 bytes a stored value at its share of the bandwidth; inputs lie in the L2 cache and do not count.
    dense: 2 bytes of every weight, or the product if that takes longer.
    """
    count, kept, share = ROWS * columns, 1 - sparsity, 1e-6 / device.multiprocessors
    bytes_a_us = device.gb_per_s * 1e9 * REACHED * share
    multiply = 2 * count * tokens_at_once(tokens) / (device.gflop_per_s * 1e9 * MMA * share)
    work = (CSL_WORK[0] + CSL_WORK[1] * kept) * count
    return {
        "load": 4 * count * kept / bytes_a_us,
        "extract": work / (instructions_per_s(device) * share) + STEP_CLOCKS / device.ghz / 1e3,
        "multiply": multiply,
        "dense": max(2 * count / bytes_a_us, multiply),
    }


def schedule(
    load: float, extract: float, multiply: float, buffers: int, tiles: int, held: int = 2
) -> list[Span]:
    """When each stage of each tile begins and ends: [(stage, tile, begin, end)].

    With one buffer one thing happens at a time. With two, the next tile's load begins with this one's
    extraction, so a tile takes max(load, extract + multiply); but where there is room for the packed words of
    one tile only (held=1, csl_v4's registers), it waits for its end: extract + max(load, multiply).
    """
    loaded, multiplied = load, 0.0
    spans = [("load", 0, 0.0, load)] if tiles else []
    for tile in range(tiles):
        begin = max(loaded, multiplied)
        extracted = begin + extract
        multiplied = extracted + multiply
        spans += [("extract", tile, begin, extracted), ("multiply", tile, extracted, multiplied)]
        if tile + 1 < tiles:
            free = multiplied if buffers == 1 else extracted if held == 1 else begin
            loaded = free + load
            spans.append(("load", tile + 1, free, loaded))
    return spans


def tile_us(stages: dict[str, float], buffers: int, held: int) -> float:
    """Microseconds from one tile to the next, once the first is through."""
    three = (stages["load"], stages["extract"], stages["multiply"])
    first, second = (
        span for span in schedule(*three, buffers, 3, held) if span[0] == "extract" and span[1] > 0
    )
    return second[2] - first[2]


def at(spans: list[Span], moment: float) -> str:
    """What happens at `moment`, in words."""
    busy = {stage: tile + 1 for stage, tile, begin, end in spans if begin <= moment < end}
    said = [
        f"{unit} {DOING[stage]} tile {busy[stage]}" if stage in busy else f"{unit} idle"
        for stage, unit in UNITS.items()
    ]
    return ", ".join(said)


def verdict(stages: dict[str, float], buffers: int, held: int, idle: float) -> str:
    """Why memory waits, if it does."""
    if idle < 0.005:
        return "Memory never waits: only fewer bytes would help."
    said = f"Memory waits {100 * idle:.0f} % of the time"
    if buffers == 1:
        return f"{said}: there is one buffer, so one thing happens at a time."
    if held == 1 and stages["load"] > stages["multiply"]:
        return f"{said}: the next words have no room until this tile's are extracted."
    return f"{said}: extracting and multiplying take longer than loading."


def draw(fig: Figure, result: dict) -> None:
    """Above, what each unit does along time; below, what a tile takes in each way."""
    (ax,) = panels(fig, (1,), (1.9,), right=0.2, top=0.4, bottom=2.4)
    timeline(ax, result)
    (ax,) = panels(fig, (1,), (1.9,), right=0.2, top=2.55, bottom=0.1)
    stages, ways = result["stages"], result["ways"]
    names, values = ["dense", *ways], [stages["dense"], *ways.values()]
    texts = [f"{us:.3g} µs, {stages['dense'] / us:.3g} x dense" for us in values]
    colors = [BLUE if name == result["way"][0] else PALE for name in names]
    bar_rows(ax, names, values, texts, colors, bold=names.index(result["way"][0]))
    ax.set_title("from one tile to the next, and speed over dense", fontsize=10)


def timeline(ax: Axes, result: dict) -> None:
    """A row for each unit with a box for each tile; hatched where memory waits; a line at the moment."""
    spans, end, (moment,) = result["spans"], result["spans"][-1][3], result["moment"]
    rows = {stage: row for row, stage in enumerate(UNITS)}
    boxes(
        ax,
        [(begin, stop, rows[stage] - 0.38, rows[stage] + 0.38) for stage, _, begin, stop in spans],
        [COLORS[tile % len(COLORS)] for _, tile, _, _ in spans],
    )
    for stage, tile, begin, stop in spans:
        if stop - begin > 0.03 * end:
            ax.text((begin + stop) / 2, rows[stage], str(tile + 1), ha="center", va="center", fontsize=10)
    loads = [(begin, stop) for stage, _, begin, stop in spans if stage == "load"]
    after = [begin for begin, _ in loads[1:]] + [end]
    gaps = [(stop, later - stop) for (_, stop), later in zip(loads, after, strict=True)]
    ax.broken_barh(gaps, (-0.38, 0.76), facecolor="white", edgecolor=GREY, hatch="////", lw=0)
    ax.vlines(moment, -0.5, 2.5, color=BLACK, lw=2)
    ax.set(xlim=(0, end), ylim=(2.5, -0.5), xlabel="time (µs); hatched: memory waits", yticks=range(3))
    ax.set_yticklabels(UNITS.values())
    ax.tick_params(axis="y", length=0)
    ax.set_title(f"at {moment:.3g} µs: {at(spans, moment)}", fontsize=10)


def pipeline_timeline(**options) -> Explorer:
    """Explore `schedule` by zeros, columns of a tile, tokens, GPU and buffers; `moment` walks along, or play.

    >>> pipeline_timeline().set(sparsity=0, buffers=2).result["times_dense"]
    0.5
    """

    def compute(sparsity, columns, tokens, device, buffers, held, moment):
        stages = stage_us(GPUS[device], sparsity / 100, columns, tokens)
        three = (stages["load"], stages["extract"], stages["multiply"])
        spans = schedule(*three, buffers, TILES, held)
        now = spans[-1][3] * moment / 100
        each = tile_us(stages, buffers, held)
        idle = max(0.0, 1 - stages["load"] / each)
        chosen = (buffers, 1 if buffers == 1 else held)
        return {
            **{f"{stage}_us": us for stage, us in stages.items()},
            "tile_us": each,
            "times_dense": stages["dense"] / each,
            "memory_waits_share": idle,
            "shared_memory_bytes": buffers * 2 * columns * (ROWS + tokens_at_once(tokens)),
            "says": f"At {now:.3g} µs: {at(spans, now)}. {verdict(stages, buffers, held, idle)}",
            "stages": stages,
            "spans": spans,
            "moment": [now],
            "ways": {name: tile_us(stages, *way) for name, way in WAYS.items()},
            "way": [next(name for name, way in WAYS.items() if way == chosen)],
        }

    explorer = Explorer(
        compute, draw, name="pipeline_timeline", size=(8.6, 4.1), **options,
        sparsity=W.IntSlider(70, 0, 95, 5, description="zeros (%)"),
        columns=W.SelectionSlider(options=WIDTHS, value=64, description="columns of a tile"),
        tokens=W.SelectionSlider(options=(1, 8, 16, 32, 64), value=16),
        device=W.Dropdown(options=list(GPUS), value="H100"),
        buffers=W.Dropdown(options=(1, 2), value=2),
        held=W.Dropdown(options=ROOM, value=2, description="room for words of"),
        moment=W.IntSlider(40, 0, 100, description="moment (%)"),
    )  # fmt: skip
    # the browser moves the slider, which then asks for its picture
    play = W.Play(40, 0, 100, 2, interval=200, layout=W.Layout(margin="2px 18px 2px 0"))
    W.jslink((play, "value"), (explorer.controls["moment"], "value"))
    row = explorer.children[0]
    row.children = (*row.children, play)
    return explorer
