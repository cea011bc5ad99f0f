"""Unit map: the importance of every head and neuron in every block, and which of them a fraction takes."""

from __future__ import annotations

from collections.abc import Mapping

import ipywidgets as W
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightlib.structured.llm_pruner import most_important
from lightlib.units import KINDS
from lightlib.widgets.anatomy import FAMILIES, Shape
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.style import HEAT, VERMILION, panels

TILES = 192  # a block's neurons are drawn as so many at most
RANKINGS = {"in each block": "block", "over the model": "model"}

Scores = Mapping[str, Mapping[str, Tensor]]  # {block: {kind: importance (units)}}


def unit_sizes(shape: Shape) -> dict[str, int]:
    """{kind: weights and biases that go with one unit}, as `lightlib.units.unit_weights` counts them.

    >>> unit_sizes(MODELS["SmolLM2-135M"])
    {'heads': 294912, 'neurons': 1728}
    """
    family, shared = FAMILIES[shape.family], shape.heads // shape.kv_heads
    made = (shared + 2) * (shape.width + (family.qkv_biases or family.all_biases))  # rows of a dimension
    return {
        "heads": shape.head_dim * (made + shared * shape.width),
        "neurons": family.mlp_matrices * shape.width + (family.mlp_matrices - 1) * family.all_biases,
    }


def removed(scores: Scores, fraction: float, across: str) -> dict[str, Tensor]:
    """{kind: what `llm_pruner` would take out (blocks, units), bool}; each block keeps one of each kind."""
    kept = most_important(scores, fraction, across, 1)
    found = {}
    for kind in KINDS:
        gone = [torch.ones(len(own[kind]), dtype=torch.bool) for own in scores.values()]
        for mask, own in zip(gone, kept.values(), strict=True):
            mask[own[kind]] = False
        found[kind] = torch.stack(gone)
    return found


def ranks(values: Tensor) -> Tensor:
    """The place of each of `values` among all of them, from 0 to 1, the largest; of equal ones the first."""
    order = values.flatten().argsort(descending=True, stable=True)
    places = torch.empty(order.shape)
    places[order] = 1 - torch.arange(len(order)) / max(len(order) - 1, 1)
    return places.view(values.shape)


def tiles(places: Tensor, most: int = TILES) -> Tensor:
    """Each block's ranks (blocks, units), rising, as the means of at most `most` tiles."""
    rising = places.sort(1).values
    return torch.nn.functional.adaptive_avg_pool1d(rising[None], min(most, rising.shape[1]))[0]


def checked(scores: Mapping, shape: Shape) -> dict[str, dict[str, dict[str, Tensor]]]:
    """{measure: {block: {kind: (units)}}} on the CPU. Raises ValueError for what is not of `shape`."""
    if not scores:
        raise ValueError("unit_map: there is nothing to draw; give {measure: {block: {kind: scores}}}")
    first = next(iter(scores.values()))
    if isinstance(first.get("heads", first.get("neurons")), Tensor):
        scores = {"importance": scores}
    wanted, found = {"heads": shape.kv_heads, "neurons": shape.d_ff}, {}
    blocks = list(next(iter(scores.values())))
    for measure, own in scores.items():
        if list(own) != blocks:
            raise ValueError(f"unit_map: {measure} must score the same {len(blocks)} blocks as the others")
        for block, kinds in own.items():
            for kind, count in wanted.items():
                value = kinds.get(kind)
                if value is None or value.shape != (count,) or not value.isfinite().all():
                    has = "none" if value is None else tuple(value.shape)
                    raise ValueError(
                        f"unit_map: {measure}, {block}: give {count} finite scores of {kind}, not {has}"
                    )
        found[measure] = {b: {k: v.detach().double().cpu() for k, v in own[b].items()} for b in blocks}
    return found


def draw(fig: Figure, result: dict) -> None:
    """Heads as they are numbered, neurons sorted in each block; what goes is crossed, or left of the line."""
    left, right = panels(fig, (1, 2.5), (0.62, 0.4), right=0.32, top=0.68, bottom=0.6)
    gone, blocks, heat = result["gone"], result["blocks"], result["heat"]
    count, step = gone["heads"].shape[1], max(1, len(blocks) // 6)
    show(left, heat["heads"], (-0.5, count - 0.5))
    y, x = gone["heads"].nonzero().T.numpy()
    for color, size, width in (("white", 6.5, 3.2), (VERMILION, 5.5, 1.7)):
        left.plot(x, y, "x", color=color, ms=size, mew=width)
    left.set(xticks=range(0, count, max(1, count // 4)), xlabel="key-value head", ylabel="block")
    left.set_yticks(range(0, len(blocks), step), blocks[::step])
    left.set_title("heads: crossed ones go", pad=5)
    units = gone["neurons"].shape[1]
    show(right, heat["neurons"], (0, units))
    counts, edges = gone["neurons"].sum(1).numpy(), np.arange(len(blocks) + 1) - 0.5
    for color, width in (("white", 4), (VERMILION, 2)):
        right.stairs(counts, edges, orientation="horizontal", color=color, lw=width, baseline=None)
    ticks = [units * i // 4 for i in range(5)]
    right.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    right.set_yticks([])
    right.set(xlabel="neurons of a block, from its least important to its most")
    right.set_title("neurons: those left of the line go", pad=5)
    scale(fig, right)


def show(ax: Axes, heat: Tensor, ends: tuple[float, float]) -> None:
    """Ranks (blocks, columns) as colours; ends: where the first unit begins and the last one ends."""
    extent = (*ends, len(heat) - 0.5, -0.5)
    ax.imshow(heat.numpy(), cmap=HEAT, aspect="auto", vmin=0, vmax=1, extent=extent, interpolation="nearest")


def scale(fig: Figure, ax: Axes) -> None:
    """What the colours mean, at the top right; as an image, which costs less than axes."""
    wide, high = fig.get_size_inches() * fig.dpi
    end, middle = ax.get_position().x1 * wide, high - 19
    fig.figimage(np.tile(np.linspace(0, 1, 110), (14, 1)), end - 148, middle - 7, cmap=HEAT, vmin=0, vmax=1)
    words = "rank in the model: least"
    fig.text((end - 155) / wide, middle / high, words, ha="right", va="center", fontsize=10)
    fig.text(end / wide, middle / high, "most", ha="right", va="center", fontsize=10)


def hit(gone: Tensor, kind: str, blocks: list[str]) -> str:
    """Which blocks lose most and least of their units (blocks, units)."""
    shares = gone.float().mean(1)
    most, least = int(shares.argmax()), int(shares.argmin())
    if shares[most] == shares[least]:
        return f"Every block loses {100 * shares[most]:.3g} % of its {kind}."
    return (
        f"Block {blocks[most]} loses {100 * shares[most]:.3g} % of its {kind}, "
        f"block {blocks[least]} {100 * shares[least]:.3g} %."
    )


def unit_map(scores: Mapping, shape: Shape, **options) -> Explorer:
    """Explore `removed`. scores: {block: {"heads": (units), "neurons": (units)}}, or {measure: such scores}.

    shape: of the model whose blocks these are. Raises ValueError for scores that do not fit it.
    """
    found = checked(scores, shape)
    blocks = [name.rpartition(".")[2] for name in next(iter(found.values()))]
    sizes = unit_sizes(shape)
    heats = {}
    for measure, own in found.items():
        places = {kind: ranks(torch.stack([one[kind] for one in own.values()])) for kind in KINDS}
        heats[measure] = {"heads": places["heads"], "neurons": tiles(places["neurons"])}

    def compute(measure, kind, ranking, fraction, other=None):
        kinds = KINDS if kind == "both" else (kind,)

        def taken(name):
            gone = removed(found[name], fraction / 100, RANKINGS[ranking])
            return {k: mask & (k in kinds) for k, mask in gone.items()}

        gone = taken(measure)
        counts = {k: int(gone[k].sum()) for k in kinds}
        went, weights = sum(counts.values()), sum(counts[k] * sizes[k] for k in kinds)
        says, agreed = " ".join(hit(gone[k], k, blocks) for k in kinds), {}
        if other:
            second = taken(other)
            both = sum(int((gone[k] & second[k]).sum()) for k in kinds)
            agreed = {"both_measures_take": both}
            chance = went / sum(gone[k].numel() for k in kinds)
            if went:
                says += (
                    f" Of the {went:,} that go, {other} would take {100 * both / went:.0f} %; "
                    f"by chance it would be {100 * chance:.0f} %."
                )
        return {
            **{f"{k}_that_go": counts[k] for k in kinds},
            "weights_that_go": weights,
            "of_the_blocks_share": weights / whole,
            **agreed,
            "says": says,
            "gone": gone,
            "heat": heats[measure],
            "blocks": blocks,
        }

    names = list(found)
    whole = len(blocks) * (shape.kv_heads * sizes["heads"] + shape.d_ff * sizes["neurons"])

    def settle(controls):
        if len(names) > 1:
            controls["other"].options = [name for name in names if name != controls["measure"].value]

    beside = {"other": W.Dropdown(options=names[1:], description="compare with")} if len(names) > 1 else {}
    return Explorer(
        compute, draw, name="unit_map", size=(8.6, 4.2), settle=settle, **options,
        measure=W.Dropdown(options=names),
        kind=W.Dropdown(options=["both", *KINDS], description="take out"),
        ranking=W.Dropdown(options=list(RANKINGS), description="ranked"),
        fraction=W.IntSlider(25, 0, 90, 5, description="fraction (%)"),
        **beside,
    )  # fmt: skip
