"""Dependency map: what leaves a block together with a head, a neuron, a row, a column, or a channel.

Which rows and columns depend on each other is what `lightlib.units.members` says of a block without storage.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

import ipywidgets as W
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from lightlib.decoder import find_blocks
from lightlib.report import tidy
from lightlib.units import Member, members
from lightlib.widgets.anatomy import FAMILIES, MODELS, Shape, parameters
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.style import BLACK, BLUE, GREY, PALE, VERMILION, boxes

# blocks of seven matrices, as in Llama
SHAPES = {name: shape for name, shape in MODELS.items() if not FAMILIES[shape.family].all_biases}
ATTENTION, MLP = ("W_q", "W_k", "W_v", "W_o"), ("W_gate", "W_up", "W_down")  # in the order of `members`
TITLES = ATTENTION + MLP
READERS = ("W_o", "W_down")  # they read heads and neurons: a unit has columns of them
HEAD, NEURON, CHANNEL, BLOCK = "query head", "neuron", "channel of the stream", "whole block"
LINES = {f"{'column' if title in READERS else 'row'} of {title}": title for title in TITLES}
TAKES = (HEAD, NEURON, *LINES, CHANNEL, BLOCK)

SIZE = (8.6, 4.3)  # inches
TOP, HIGH, WIDE = 1.22, 2.5, 7.0  # inches: above the matrices, the tallest, all side by side
THIN = 0.03  # inches that a single line is drawn wide
STRIPS = 12  # places of a matrix that can be clicked
CELL = 0.05  # inches: how finely these places lie


@functools.cache
def block_of(shape: Shape) -> tuple[nn.Module, nn.Module]:
    """(model, block): a model of `shape` with a single block, without storage."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        shape.family.lower(), num_hidden_layers=1, hidden_size=shape.width, intermediate_size=shape.d_ff,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    (block,) = find_blocks(model).values()
    return model, block


class Coupled(NamedTuple):
    """What was picked and all that goes with it: {matrix: a Member of one unit, its rows or columns}."""

    picked: dict[str, Member]
    gone: dict[str, Member]


def coupled(shape: Shape, take: str, which: int) -> Coupled:
    """What must go when one of TAKES does; which: its number, from 0. Of the block alone."""
    parts = members(*block_of(shape))
    places = dict(zip(TITLES, [*parts["heads"], *parts["neurons"]], strict=True))
    if take == BLOCK:
        gone = {title: replace(m, index=m.index.reshape(1, -1)) for title, m in places.items()}
        return Coupled(gone, gone)
    if take == CHANNEL:
        line = torch.tensor([[which]])
        gone = {title: Member(m.linear, 1 - m.dim, line) for title, m in places.items()}
        return Coupled(gone, gone)
    if take == NEURON:
        gone = of_unit(places, MLP, which)
        return Coupled(gone, gone)
    if take == HEAD:
        shared = shape.heads // shape.kv_heads
        gone = of_unit(places, ATTENTION, which // shared)
        own = {t: gone[t].index.view(shared, -1)[which % shared, None] for t in ("W_q", "W_o")}
        return Coupled({t: replace(gone[t], index=index) for t, index in own.items()}, gone)
    title = LINES[take]
    unit = (places[title].index == which).any(1).nonzero().item()
    gone = of_unit(places, ATTENTION if title in ATTENTION else MLP, unit)
    return Coupled({title: replace(gone[title], index=torch.tensor([[which]]))}, gone)


def of_unit(places: dict[str, Member], titles: tuple[str, ...], unit: int) -> dict[str, Member]:
    return {t: replace(places[t], index=places[t].index[unit, None]) for t in titles}


def weights_in(shape: Shape, pieces: dict[str, Member]) -> int:
    """Weights and biases of these rows and columns."""
    _, block = block_of(shape)
    found = 0
    for member in pieces.values():
        part = block.get_submodule(member.linear)
        a_line = part.weight.shape[1 - member.dim] + (member.dim == 0 and part.bias is not None)
        found += member.index.numel() * a_line
    return found


def how_many(shape: Shape, take: str) -> int:
    """How many of one of TAKES there are, in a block or, of blocks, in the model."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    counts = {HEAD: shape.heads, NEURON: shape.d_ff, CHANNEL: shape.width, BLOCK: shape.layers}
    lines = {"W_q": q, "W_k": kv, "W_v": kv, "W_o": q}
    return counts[take] if take in counts else lines.get(LINES[take], shape.d_ff)


# why they go together, in words
def a_line(title: str) -> str:
    """What of a matrix a unit has."""
    return "column" if title in READERS else "row"


def why(shape: Shape, take: str, which: int) -> str:
    """What the picked part is, what it would break on its own, and so what goes with it."""
    if take == BLOCK:
        return (
            f"Block {which} only adds to the stream, so no row or column of another block depends on it: its "
            "seven matrices and its norms go, and the stream passes by."
        )
    if take == CHANNEL:
        return (
            f"All blocks share one stream: channel {which} is a column of all that read it and a row of all "
            f"that write it, in {shape.layers} blocks, the norms, the embedding and the head. "
            "It is no unit of a block; only all blocks together can let it go."
        )
    if take == NEURON:
        return (
            f"Neuron {which} is a product: row {which} of W_gate, activated, times row {which} of W_up; only "
            f"column {which} of W_down reads it. Without one of the three, the other two are of no use."
        )
    if take == HEAD:
        return why_head(shape, which)
    title = LINES[take]
    return why_attention_line(shape, title, which) if title in ATTENTION else why_mlp_line(title, which)


def why_head(shape: Shape, head: int) -> str:
    group, mates = head // (shape.heads // shape.kv_heads), others(shape, head)
    if not mates:
        return (
            f"Head {head} has keys and values of its own: its {shape.head_dim} rows of W_q, W_k and W_v, and "
            f"the {shape.head_dim} columns of W_o that read it, go together. No other head notices."
        )
    return (
        f"Head {head} shares keys and values with {heads(mates)}: they go with key-value head {group}, or "
        "none does. Taken alone, it would leave the key-value heads with unequal numbers of query heads, "
        "which the code cannot run, and no key or value would be saved."
    )


def why_attention_line(shape: Shape, title: str, line: int) -> str:
    shared, D = shape.heads // shape.kv_heads, shape.head_dim
    head, d = divmod(line, D)
    of_keys = title in ("W_k", "W_v")
    group = head if of_keys else head // shared
    sharing = heads([*range(group * shared, (group + 1) * shared)])
    owner = f"key-value head {head}" if of_keys and shared > 1 else f"head {head}"
    turned = f"rotary positions turn it together with dimension {(d + D // 2) % D}"
    what = {
        "W_q": f"makes dimension {d} of the queries of {owner}. Scores multiply it with dimension {d} of the "
        f"keys, and {turned}",
        "W_k": f"makes dimension {d} of the keys of {owner}. Scores multiply it with dimension {d} of the "
        f"queries of {sharing}, and {turned}",
        "W_v": f"makes dimension {d} of the values of {owner}. A column of W_o reads it in {sharing}",
        "W_o": f"reads dimension {d} of {owner}, a mix of what row {group * D + d} of W_v makes",
    }[title]
    whole = f"key-value head {group} goes whole, with {sharing}" if shared > 1 else f"head {head} goes whole"
    return (
        f"{a_line(title).capitalize()} {line} of {title} {what}. Taken alone, it would leave one head "
        f"narrower than the others, which the code cannot run; so {whole}."
    )


def why_mlp_line(title: str, line: int) -> str:
    rest = " and ".join(f"{a_line(t)} {line} of {t}" for t in MLP if t != title)
    return (
        f"{a_line(title).capitalize()} {line} of {title} belongs to neuron {line}. Taken alone, it would "
        f"leave {rest} without a partner, and the layers would no longer fit; so all three go."
    )


def others(shape: Shape, head: int) -> list[int]:
    """The heads that share keys and values with this one."""
    shared = shape.heads // shape.kv_heads
    first = head // shared * shared
    return [h for h in range(first, first + shared) if h != head]


def heads(numbers: list[int]) -> str:
    """heads 3, 4 and 5; heads 8 to 15"""
    first, last = numbers[:-1], numbers[-1]
    if len(first) > 2 and last - first[0] == len(first):
        return f"heads {first[0]} to {last}"
    return f"heads {', '.join(map(str, first))} and {last}" if first else f"head {last}"


# the picture
def layout(shape: Shape) -> dict[str, tuple[float, float, float, float]]:
    """{matrix: (left, top, width, height)} in inches from the figure's top left, all to one scale."""
    sizes = dict.fromkeys(MLP[:2], (shape.d_ff, shape.width))  # (out, in)
    for title in ATTENTION[:3]:
        sizes[title] = (how_many(shape, f"row of {title}"), shape.width)
    sizes["W_o"], sizes["W_down"] = (shape.width, sizes["W_q"][0]), (shape.width, shape.d_ff)
    unit = min(WIDE / sum(sizes[t][1] for t in TITLES), HIGH / max(high for high, _ in sizes.values()))
    gap = (SIZE[0] - 0.5 - unit * sum(sizes[t][1] for t in TITLES)) / 7
    x, found = 0.25, {}
    for title in TITLES:
        high, wide = sizes[title]
        found[title] = (x, TOP, wide * unit, high * unit)
        x += wide * unit + gap * (2 if title == "W_o" else 1)
    return found


def draw(fig: Figure, result: dict) -> None:
    """The stream above, the seven matrices that read it and write to it below."""
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, SIZE[0]), ylim=(SIZE[1], 0))
    ax.axis("off")
    shape, spots = result["shape"], layout(result["shape"])
    stream(ax, shape, spots)
    pieces = []
    for title, spot in spots.items():
        x, y, wide, high = spot
        rows, columns = result["sizes"][title]
        pieces.append(((x, x + wide, y, y + high), PALE))
        for part, color in ((result["coupled"].gone, BLUE), (result["coupled"].picked, VERMILION)):
            if title in part:
                pieces += [(box, color) for box in bands(part[title], spot, (rows, columns))]
        ax.text(x + wide / 2, y - 0.07, title, ha="center", va="bottom", fontsize=11)
        ax.text(
            x + wide / 2, y + high + 0.05, f"{rows:,}\nx {columns:,}", ha="center", va="top", fontsize=9.5
        )
    boxes(ax, *zip(*pieces, strict=True))
    legend(ax, spots["W_down"], result["coupled"])
    sharing(ax, shape, result["coupled"], spots["W_o"])


def stream(ax: Axes, shape: Shape, spots: dict) -> None:
    """A line from left to right; arrows into what reads it and out of what adds to it."""
    high, low = 0.5, TOP - 0.3
    ax.plot([0.25, SIZE[0] - 0.25], [high, high], color=GREY, lw=5, solid_capstyle="butt")
    ax.plot(SIZE[0] - 0.25, high, ">", color=GREY, ms=11)
    ax.text(0.25, high - 0.12, f"the stream, {shape.width:,} channels", va="bottom", fontsize=10)
    note = "matrices to scale, rows x columns; a single line is drawn wider"
    ax.text(SIZE[0] - 0.25, high - 0.12, note, ha="right", va="bottom", fontsize=10)
    for title, (x, _, wide, _) in spots.items():
        middle, writes = x + wide / 2, title in READERS
        ax.plot([middle, middle], [high, low], color=GREY, lw=1.5)
        ax.plot(middle, high + 0.1 if writes else low, "^" if writes else "v", color=GREY, ms=7)


def bands(member: Member, spot: tuple, size: tuple[int, int]) -> list[tuple[float, float, float, float]]:
    """Boxes (left, right, top, bottom) over the rows or columns of a matrix, none thinner than THIN."""
    x, y, wide, high = spot
    lines = np.sort(member.index.flatten().numpy())
    long = (high, wide)[member.dim]
    found = []
    for run in np.split(lines, np.flatnonzero(np.diff(lines) > 1) + 1):
        low, up = run[0] / size[member.dim] * long, (run[-1] + 1) / size[member.dim] * long
        spare = max(THIN - (up - low), 0) / 2
        low, up = max(low - spare, 0), min(up + spare, long)
        found.append((x, x + wide, y + low, y + up) if member.dim == 0 else (x + low, x + up, y, y + high))
    return found


def legend(ax: Axes, spot: tuple, found: Coupled) -> None:
    """Below W_down, which is as low as the stream is wide."""
    x, y = spot[0], TOP + 1.72
    lines = [(VERMILION, "picked"), (BLUE, "must go with it"), (PALE, "may stay")]
    if found.picked == found.gone:
        lines = [(VERMILION, "go together"), lines[2]]
    boxes(
        ax,
        [(x, x + 0.2, y + 0.26 * i, y + 0.26 * i + 0.17) for i in range(len(lines))],
        [c for c, _ in lines],
    )
    for i, (_, words) in enumerate(lines):
        ax.text(x + 0.3, y + 0.26 * i + 0.09, words, va="center", fontsize=10)


def sharing(ax: Axes, shape: Shape, found: Coupled, spot: tuple) -> None:
    """The query heads in a row, and below them the key-value heads, as wide as the heads that share them."""
    x, y, tall = 0.25, 3.53, 0.24
    wide, pieces = (spot[0] + spot[2] - x) / shape.heads, []
    for row, (titles, count) in enumerate(((("W_q", "W_o"), shape.heads), (("W_k", "W_v"), shape.kv_heads))):
        gone, picked = (owners(part, titles, shape.head_dim) for part in (found.gone, found.picked))
        each, top = wide * shape.heads / count, y + row * (tall + 0.04)
        for i in range(count):
            color = VERMILION if i in picked else BLUE if i in gone else PALE
            pieces.append(((x + i * each, x + (i + 1) * each - 0.02, top, top + tall), color))
            if each > 0.2:
                ink = BLACK if color == PALE else "white"
                place = x + (i + 0.5) * each - 0.01, top + tall / 2
                ax.text(*place, str(i), color=ink, ha="center", va="center", fontsize=9.5)
    boxes(ax, *zip(*pieces, strict=True))
    ax.text(x, y - 0.05, "query heads, over the key-value heads they share", va="bottom", fontsize=10)


def owners(pieces: dict[str, Member], titles: tuple[str, ...], size: int) -> set[int]:
    """The heads whose rows, or columns that read them, are among `pieces`."""
    lines = [m.index.flatten() for t, m in pieces.items() if t in titles and m.dim == (t in READERS)]
    return set((torch.cat(lines) // size).tolist()) if lines else set()


# clicks
def make_clickable(ex: Explorer) -> Explorer:
    """Lay buttons that are not seen over the matrices: a click picks the row or column that lies there."""
    columns, rows = (round(inches / CELL) for inches in SIZE)
    thin = W.Layout(
        flex="1 1 0",
        width="auto",
        height="auto",
        min_width="0",
        min_height="0",
        margin="0",
        padding="0",
        border="none",
    )
    clear = W.ButtonStyle(button_color="transparent")
    nets = {}
    for take, title in LINES.items():
        strips = [
            W.Button(tooltip=f"pick a {take}", tabbable=False, layout=thin, style=clear)
            for _ in range(STRIPS)
        ]
        for i, strip in enumerate(strips):
            strip.on_click(functools.partial(pick, ex, take, i))
        flow = "row nowrap" if title in READERS else "column nowrap"
        nets[title] = W.Box(strips, layout=W.Layout(flex_flow=flow, margin="0", overflow="hidden"))

    def place(_change=None):
        for title, (x, y, wide, high) in layout(SHAPES[ex.controls["model"].value]).items():
            left, top = round(x / CELL) + 1, round(y / CELL) + 1
            right, low = max(round((x + wide) / CELL), left) + 1, max(round((y + high) / CELL), top) + 1
            nets[title].layout.grid_area = f"{top} / {left} / {low} / {right}"

    place()
    ex.controls["model"].observe(place, names="value")
    controls, numbers, picture = ex.children
    numbers.layout.min_height = "94px"  # the picture must not move under the pointer with a longer sentence
    picture.layout.grid_area, picture.layout.margin = f"1 / 1 / {rows + 1} / {columns + 1}", "0"
    over = W.GridBox(
        [picture, *nets.values()],
        layout=W.Layout(
            grid_template_columns=f"repeat({columns}, minmax(0, 1fr))",
            grid_template_rows=f"repeat({rows}, minmax(0, 1fr))",
            width="100%", max_width=f"{100 * SIZE[0]:.0f}px",
        ),
    )  # fmt: skip
    ex.children = [controls, numbers, over]
    return ex


def pick(ex: Explorer, take: str, strip: int, _button=None) -> None:
    """Set the controls to the line in the middle of a matrix's strip."""
    lines = how_many(SHAPES[ex.controls["model"].value], take)
    ex.set(take=take, which=int((strip + 0.5) / STRIPS * lines))


def settle(controls: dict) -> None:
    """As many to choose from as the model has."""
    controls["which"].max = how_many(SHAPES[controls["model"].value], controls["take"].value) - 1


def dependency_map(**options) -> Explorer:
    """Explore what goes together in a block; a click on a matrix picks a row or a column of it.

    >>> dependency_map().set(take="query head", which=4).result["weights_that_go"]
    294912
    """

    def compute(model, take, which):
        shape = SHAPES[model]
        found = coupled(shape, take, which)
        _, block = block_of(shape)
        gone, whole = weights_in(shape, found.gone), weights_in(shape, coupled(shape, BLOCK, 0).gone)
        matrices = {t: block.get_submodule(m.linear) for t, m in coupled(shape, BLOCK, 0).gone.items()}
        one_less = replace(shape, width=shape.width - 1)
        return {
            "weights_picked": weights_in(shape, found.picked),
            "weights_that_go": gone,
            "of_the_block": f"{tidy(round(100 * gone / whole, 4))} %",
            "matrices": len(found.gone),
            **({"weights_in_the_model": total(shape) - total(one_less)} if take == CHANNEL else {}),
            "says": why(shape, take, which),
            "shape": shape,
            "sizes": {title: tuple(part.weight.shape) for title, part in matrices.items()},
            "coupled": found,
        }

    return make_clickable(
        Explorer(
            compute, draw, name="dependency_map", size=SIZE, settle=settle, **options,
            model=W.Dropdown(options=list(SHAPES)),
            take=W.Dropdown(options=TAKES, description="take out a"),
            which=W.IntSlider(4, 0, 8, description="number"),
        )
    )  # fmt: skip


def total(shape: Shape) -> int:
    """Parameters of the whole model."""
    return sum(parameters(shape).values())
