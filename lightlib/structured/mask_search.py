"""Which units stay: the most important within a budget, then swaps where units matter together.

Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", arXiv:2204.09656.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightlib.structured.budget import LatencyTable, best
from lightlib.units import Kept

FLAT = 0.05  # of what a block's time falls by: below that, fewer units save nothing


def search(
    scores: dict[str, dict[str, Tensor]],
    prices: dict[str, float],
    budget: float,
    floor: dict[str, int] | None = None,
    round_to: int = 1,
) -> Kept:
    """The units whose scores sum to the most within `budget`: {block: {kind: rising indices}}.

    scores: {block: {kind: (units)}}. prices: of one unit of each kind, heads or neurons or both. floor: how
    many of a kind every block keeps, by default one; where they alone exceed the budget, they are what stays.
    round_to: neurons stay in packets of so many. For every number of heads, neurons fill up the rest of the
    budget; as all units of a kind cost the same, this finds the best of all choices.
    """
    whole = sum(price * len(kinds[kind]) for kinds in scores.values() for kind, price in prices.items())
    ranked, left, none = {}, budget, Packets(torch.zeros(0), torch.zeros(0, dtype=torch.long), 0, 1)
    for kind, price in prices.items():
        packet = round_to if kind == "neurons" else 1
        ranked[kind] = rank([kinds[kind] for kinds in scores.values()], packet, (floor or {}).get(kind, 1))
        forced = ranked[kind].forced * packet
        left -= price * sum(min(forced, len(kinds[kind])) for kinds in scores.values())
    heads, neurons = (ranked.get(kind, none) for kind in ("heads", "neurons"))
    # however many heads, all of the rest goes to neurons
    left = max(left, 0.0) * (1 + 1e-12)
    rest = left - torch.arange(len(heads.values) + 1).double() * prices.get("heads", 0.0)
    fill = rest.clamp_min(0) / (prices.get("neurons", 1.0) * round_to)
    fill = fill.floor().clamp(max=len(neurons.values)).long()
    total = sums(heads.values) + sums(neurons.values)[fill]
    count = int(total.masked_fill(rest < 0, -math.inf).argmax())
    taken = {
        "heads": heads.taken(count, len(scores)),
        "neurons": neurons.taken(int(fill[count]), len(scores)),
    }
    return {
        block: {
            kind: best(kinds[kind], len(kinds[kind]) if budget >= whole else int(taken[kind][i]))
            for kind in prices
        }
        for i, (block, kinds) in enumerate(scores.items())
    }


@dataclass(frozen=True)
class Packets:
    """Units of one kind in packets of equal size, those left out that stay anyway.

    values (packets): the sum of each one's scores, falling. blocks (packets): whose it is. forced: packets
    that every block keeps beside them.
    """

    values: Tensor
    blocks: Tensor
    forced: int
    size: int

    def taken(self, count: int, blocks: int) -> Tensor:
        """How many units each of `blocks` keeps when the first `count` packets stay: (blocks)."""
        return (self.blocks[:count].bincount(minlength=blocks) + self.forced) * self.size


def rank(scores: list[Tensor], size: int, floor: int) -> Packets:
    """The packets of all blocks, each block's own from its best units to its least, by their sums."""
    forced, values = math.ceil(floor / size), []
    for units in scores:
        ordered = units.double().sort(descending=True).values
        padded = torch.cat([ordered, ordered.new_zeros(-len(ordered) % size)])
        values.append(padded.view(-1, size).sum(1)[forced:])
    blocks = torch.cat([torch.full((len(v),), i) for i, v in enumerate(values)])
    order = torch.cat(values).argsort(descending=True, stable=True)
    return Packets(torch.cat(values)[order], blocks[order], forced, size)


def sums(values: Tensor) -> Tensor:
    """The sum of the first 0, 1, ... of values (n): (n + 1)."""
    return torch.cat([values.new_zeros(1), values]).double().cumsum(0)


def time_prices(table: LatencyTable, kinds: tuple[str, ...]) -> tuple[dict[str, float], dict[str, int]]:
    """({kind: milliseconds of one unit}, {kind: units in a block that save no time when they go}).

    A block's time is flat up to some number of units and a line from there: a device with idle room.
    """
    prices, floors = {}, {}
    for kind in kinds:
        slopes, knees = zip(*(line(*series[kind]) for series in table.blocks.values()), strict=True)
        prices[kind], floors[kind] = sum(slopes) / len(slopes), min(knees)
    return prices, floors


def line(counts: tuple[int, ...], times: tuple[float, ...]) -> tuple[float, int]:
    """(milliseconds a unit, the number of units where they begin to count) of a block's series."""
    rise = times[-1] - times[0]
    at = max((i for i, t in enumerate(times[:-1]) if t - times[0] <= FLAT * rise), default=0)
    slope = (times[-1] - times[at]) / max(counts[-1] - counts[at], 1)
    return max(slope, 1e-9), counts[at] if at else 1


def rearranged(gradients: Tensor, kept: Tensor, shrinkage: float | None = None) -> Tensor:
    """Swap units until no swap lowers the loss that dropping them together is expected to cost.

    gradients (samples, units): of the loss with respect to the masks. kept: rising indices of units that
    stay. That loss is, to second order, the mean over samples of the squared sum of the dropped units'
    gradients; the search sees its diagonal only, as if units did not matter together. Each swap is the one
    that lowers it most. shrinkage: how far the Fisher information is drawn towards its diagonal, by default
    as far as `noise_share` says; at 1 the most important units stay, as in the search. It takes samples by
    the hundred: in few, what units have in common is mostly chance, and swaps follow it.
    """
    g = gradients.double()
    fisher = g.T @ g / len(g)  # (units, units)
    share = noise_share(gradients) if shrinkage is None else shrinkage
    fisher = (1 - share) * fisher + share * fisher.diagonal().diag()
    stays = torch.zeros(len(fisher), dtype=torch.bool).index_fill(0, kept, True)
    pull = fisher[:, ~stays].sum(1)  # each unit's product with all that are dropped
    own, least = fisher.diagonal(), 1e-9 * fisher.diagonal().sum()
    while stays.any() and not stays.all():
        back, out = (~stays).nonzero()[:, 0], stays.nonzero()[:, 0]
        change = (own - 2 * pull)[back, None] + (own + 2 * pull)[out] - 2 * fisher[back][:, out]
        at = int(change.argmin())
        if change.flatten()[at] >= -least:
            break
        u, v = back[at // len(out)], out[at % len(out)]
        stays[u], stays[v] = True, False
        pull += fisher[:, v] - fisher[:, u]
    return stays.nonzero()[:, 0]


def noise_share(gradients: Tensor) -> float:
    """How much of what the gradients (samples, units) of two units have in common is chance, from 0 to 1.

    The variance of the products' means over their square, summed over all pairs of units, each unit scaled
    to 1: the shrinkage of Schaefer and Strimmer 2005, doi:10.2202/1544-6115.1175. Of one sample it is 1.
    """
    n, g = len(gradients), gradients.double()
    if n < 2:
        return 1.0
    g = g / g.square().mean(0).sqrt().clamp_min(1e-300)
    gram, squares = g @ g.T, g.square()  # the products of samples are fewer than those of units
    mean = gram.square().sum() / n**2 - squares.mean(0).square().sum()
    fourth = (squares.sum(1).square() - squares.square().sum(1)).mean()
    return float(((fourth - mean) / (n - 1) / mean.clamp_min(1e-300)).clamp(0, 1))
