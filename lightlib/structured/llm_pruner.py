"""LLM-Pruner: take out the heads, neurons or channels with which the loss would move least, by its gradients.

Ma et al. 2023, arXiv:2305.11627. What depends on each other goes together: lightlib/units.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightlib.change import changing
from lightlib.decoder import check_linears, find_blocks, linear_shapes
from lightlib.report import Compressed, Report
from lightlib.structured.budget import best, fit, kept_count
from lightlib.structured.taylor import (
    AGGREGATES,
    WEIGHT_SCORES,
    aggregate_members,
    gradients,
    sum_of_units,
    weight_importance,
)
from lightlib.units import KINDS, WHOLE, Kept, Member, dense_part, keep_units, layer_name, parts_of

IMPORTANCES = (*WEIGHT_SCORES, "random")
WITHOUT_DATA = ("magnitude", "random")
CHANNELS = ("channels",)
CHOICES = {"importance": IMPORTANCES, "aggregate": AGGREGATES, "across": ("block", "model")}

Units = dict[str, dict[str, list[Member]]]  # {block or WHOLE: {kind: what its units have in each layer}}
Scores = dict[str, dict[str, Tensor]]  # {block or WHOLE: {kind: importance (units)}}


def llm_pruner(
    model: nn.Module,
    batches: list[Tensor] | None,
    *,
    fraction: float = 0.25,
    importance: str = "first",
    aggregate: str = "sum",
    kinds: tuple[str, ...] = KINDS,
    protect: tuple[int, int] | None = None,
    across: str = "block",
    round_to: int = 1,
    budget_bytes: int | None = None,
    budget_ms: float | None = None,
    budget_tokens: int = 256,
    seed: int = 0,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """Take the least important share of the units out of each block; fraction 0 changes nothing.

    importance, aggregate, kinds, seed: see `unit_importance`. protect: so many blocks stay whole at either
    end; by default an eighth of all at the first and a sixteenth at the last. across: units compete within
    their "block", or with those of the same kind in the whole "model", where each block keeps at least one.
    round_to: the units that stay are a multiple of it. With few heads the share may round to none.
    budget_bytes, budget_ms: instead of `fraction`, the least share with which the model takes so many bytes,
    or a prompt of `budget_tokens` tokens so many milliseconds on this device.
    Raises ValueError for settings that do not fit, and where nothing may go.
    """
    check(batches, importance=importance, aggregate=aggregate, across=across)
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction}: give the share of the units that go, from 0 to below 1")
    if round_to < 1:
        raise ValueError(f"round_to={round_to}: the units that stay are a multiple of it; take 1 or more")
    with changing(model, inplace) as light:
        units = units_of(light, kinds, protect)
        scores = scored(light, units, batches, importance, aggregate, seed, progress, "llm_pruner")
        kept = fit(
            light,
            lambda share: most_important(scores, share, across, round_to),
            fraction=fraction,
            budget_bytes=budget_bytes,
            budget_ms=budget_ms,
            tokens=budget_tokens,
        )
        report = Report(tuple(keep_units(light, kept, "llm_pruner")))
    return Compressed(light, report)


def unit_importance(
    model: nn.Module,
    batches: list[Tensor] | None,
    *,
    importance: str = "first",
    aggregate: str = "sum",
    kinds: tuple[str, ...] = KINDS,
    protect: tuple[int, int] | None = (0, 0),
    seed: int = 0,
    progress: bool = True,
) -> Scores:
    """{block: {kind: importance (units), float64}}; nothing is cut.

    importance: of a weight, see `weight_importance`, summed over what a unit has in a linear; "random" draws
    a number for each unit from `seed`. aggregate: "sum", "max" or "product" over the linears of a unit, or
    "last", the layer alone that reads it. Queries, keys and values, or gate and up, count as one linear where
    the model has one. kinds: "heads" and "neurons" of the blocks between those that `protect` spares, or
    alone ("channels",) of the stream, {WHOLE: {"channels": importance}}, of models with RMSNorm: a channel is
    made and read in every block, and nothing is spared. Raises ValueError for settings that do not fit.
    """
    check(batches, importance=importance, aggregate=aggregate)
    with changing(model, inplace=False) as copy:
        units = units_of(copy, kinds, protect)
        return scored(copy, units, batches, importance, aggregate, seed, progress, "importance")


def check(batches: list[Tensor] | None, **settings: str) -> None:
    """Raises ValueError for settings that are not among CHOICES, and for batches that give no gradient."""
    for name, value in settings.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(CHOICES[name])}")
    if settings["importance"] in WITHOUT_DATA:
        return
    if not batches:
        raise ValueError("llm_pruner needs batches for the loss's gradients; magnitude and random do not")
    if any(ids.shape[1] < 2 for ids in batches):
        raise ValueError("a window of one token predicts nothing: take length >= 2")


def pruned_blocks(model: nn.Module, protect: tuple[int, int] | None) -> list[str]:
    """The blocks between those that stay whole. Raises ValueError where there are none."""
    names = list(find_blocks(model))
    first, last = (round(len(names) / 8), round(len(names) / 16)) if protect is None else protect
    if min(first, last) < 0:
        raise ValueError(f"protect={(first, last)}: how many blocks stay whole is 0 or more at either end")
    if first + last >= len(names):
        raise ValueError(
            f"protect={(first, last)} leaves nothing to prune in {len(names)} blocks; protect fewer"
        )
    return names[first : len(names) - last]


def units_of(model: nn.Module, kinds: tuple[str, ...], protect: tuple[int, int] | None) -> Units:
    """The units of these kinds in the blocks that may be pruned. Raises ValueError for unknown kinds."""
    channels = tuple(kinds) == CHANNELS
    if not channels and (not kinds or not set(kinds) <= set(KINDS)):
        raise ValueError(f"kinds={kinds!r}: give a tuple of some of {', '.join(KINDS)}, or {CHANNELS} alone")
    check_linears(model, whole=True)
    places = [WHOLE] if channels else pruned_blocks(model, protect)
    found = {place: parts_of(model, place) for place in places}
    return {name: {kind: parts[kind] for kind in kinds} for name, parts in found.items()}


def scored(
    model: nn.Module,
    units: Units,
    batches: list[Tensor] | None,
    importance: str,
    aggregate: str,
    seed: int,
    progress: bool,
    title: str,
) -> Scores:
    """The importance of these units, float64 on the CPU."""
    if importance == "random":
        return random_scores(units, seed)
    # a packed layer passes no gradient back, in whichever block it is
    for name in linear_shapes(model):
        dense_part(model, name)
    named = [(place, m) for place, kinds in units.items() for own in kinds.values() for m in own]
    names = [layer_name(place, member.linear) for place, member in named]
    slopes = dict.fromkeys(names, (None, None))
    if importance not in WITHOUT_DATA:
        squares = importance in ("second", "mixed")
        slopes = gradients(model, names, batches, squares=squares, progress=progress, title=title)

    def score(place: str, own: list[Member]) -> Tensor:
        sums = []
        for member in own:
            name = layer_name(place, member.linear)
            scores = weight_importance(dense_part(model, name).weight, *slopes[name], importance)
            sums.append(sum_of_units(scores, member))
        return aggregate_members(torch.stack(sums), aggregate)

    return {name: {kind: score(name, own) for kind, own in kinds.items()} for name, kinds in units.items()}


def random_scores(units: Units, seed: int) -> Scores:
    """A number from 0 to 1 for each unit."""
    generator = torch.Generator().manual_seed(seed)

    def draw(own: list[Member]) -> Tensor:
        return torch.rand(len(own[-1].index), generator=generator, dtype=torch.float64)

    return {name: {kind: draw(own) for kind, own in kinds.items()} for name, kinds in units.items()}


def most_important(scores: Scores, fraction: float, across: str, round_to: int) -> Kept:
    """The units that stay when this share goes, of each block or of all together."""
    kept = {name: {} for name in scores}
    for kind in next(iter(scores.values())):
        values = [own[kind] for own in scores.values()]
        shares = [1 - fraction] * len(values)
        if across == "model":
            together = torch.cat(values)
            stays = torch.zeros(len(together), dtype=torch.float64)
            stays[best(together, kept_count(len(together), 1 - fraction))] = 1
            shares = [part.mean().item() for part in stays.split([len(own) for own in values])]
        for name, own, share in zip(scores, values, shares, strict=True):
            kept[name][kind] = best(own, kept_count(len(own), share, round_to))
    return kept
