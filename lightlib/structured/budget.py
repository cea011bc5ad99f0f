"""How many units may stay: by a fraction, by the bytes that are left, or by the time that a prompt takes.

Time is measured, not derived: a table of each block's milliseconds at a few numbers of units says what a cut
would save, and what was really cut is timed in the end.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from lightlib.calibration import Block, stream_blocks
from lightlib.cost import size
from lightlib.decoder import linear_shapes, use_linear_everywhere
from lightlib.machine import seconds
from lightlib.quality import device_of
from lightlib.units import WHOLE, Kept, cut_units, dense_part, layer_name, members, parts_of, unit_weights

MOST = 0.95  # the largest fraction that is tried for a budget
STEPS = 20  # of the bisection: a millionth of the units
ROUNDS = 3  # cuts that are timed for a budget in milliseconds
NEAR = 0.05  # how near such a budget is met
TURNS = 3  # of each forward that is timed


def kept_count(total: int, share: float, round_to: int = 1) -> int:
    """The multiple of `round_to` nearest to share * total, from min(round_to, total) to total.

    >>> kept_count(1536, 0.7, 64)
    1088
    """
    if share >= 1:
        return total  # whole even where it is no multiple
    nearest = math.floor(share * total / round_to + 0.5) * round_to
    return min(max(nearest, round_to), total)


def best(scores: Tensor, count: int) -> Tensor:
    """Rising indices (count) of the largest of `scores` (units); of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def fit(
    model: nn.Module,
    choose: Callable[[float], Kept],
    *,
    fraction: float,
    budget_bytes: int | None,
    budget_ms: float | None,
    tokens: int,
) -> Kept:
    """The units that stay: choose(fraction), or with a budget what the least fraction keeps that meets it.

    budget_bytes: stored bytes of the model. budget_ms: milliseconds of a prompt of `tokens` tokens, batch 1,
    on the model's device; a copy is really cut and timed, and the choice corrected until it is within 5 % or,
    where its steps are larger, below.
    Raises ValueError where both are given, and where no fraction up to 0.95 meets the budget.
    """
    if budget_bytes is not None and budget_ms is not None:
        raise ValueError(f"budget_bytes={budget_bytes} and budget_ms={budget_ms}: give one of them")
    if budget_bytes is not None:
        kept = least(choose, lambda kept: kept_bytes(model, kept) <= budget_bytes)
        if kept is None:
            bytes_left = kept_bytes(model, choose(MOST))
            raise ValueError(f"budget_bytes={budget_bytes}: the least that can be had is {bytes_left} bytes")
        return kept
    if budget_ms is not None:
        return fit_time(model, choose, budget_ms, tokens)
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction}: give a number from 0 to below 1")
    return choose(fraction)


def least(choose: Callable[[float], Kept], meets: Callable[[Kept], bool]) -> Kept | None:
    """What the least fraction keeps that meets the condition, by bisection; None where none does."""
    kept = choose(0.0)
    if meets(kept):
        return kept
    low, high, found = 0.0, MOST, choose(MOST)
    if not meets(found):
        return None
    for _ in range(STEPS):
        middle = (low + high) / 2
        kept = choose(middle)
        if meets(kept):
            high, found = middle, kept
        else:
            low = middle
    return found


def kept_bytes(model: nn.Module, kept: Kept) -> int:
    """Stored bytes of the model once only the units in `kept` stay, by arithmetic."""
    freed = 0
    for place, kinds in kept.items():
        parts, weights = parts_of(model, place), unit_weights(model, place)
        for kind, stay in kinds.items():
            reader = parts[kind][-1]
            item = dense_part(model, layer_name(place, reader.linear)).weight.itemsize
            freed += (len(reader.index) - len(stay)) * weights[kind] * item
    return size(model).stored_bytes - freed


def fit_time(model: nn.Module, choose: Callable[[float], Kept], budget_ms: float, tokens: int) -> Kept:
    """As `fit`, by the table's prediction, rescaled by what its cuts really take."""
    measure = LatencyTable.of_channels if WHOLE in choose(0.0) else LatencyTable.measure
    table, factors, timed = measure(model, tokens), [1.0], []

    def within(factor: float) -> Kept | None:
        return least(choose, lambda kept: factor * table.milliseconds(kept) <= budget_ms)

    for _ in range(ROUNDS):
        kept = within(factors[-1]) or choose(MOST)
        timed.append((kept_ms(model, kept, tokens), kept))
        if abs(timed[-1][0] / budget_ms - 1) <= NEAR:
            return kept
        factors.append(timed[-1][0] / table.milliseconds(kept))
    # no step of the choice comes near: stay below the budget
    kept = within(max(factors[1:]))
    if kept is not None:
        return kept
    fastest, kept = min(timed, key=lambda each: each[0])
    if fastest > budget_ms:
        raise ValueError(
            f"budget_ms={budget_ms}: the least that can be had is {fastest:.3g} ms on this device"
        )
    return kept


def kept_ms(model: nn.Module, kept: Kept, tokens: int) -> float:
    """Milliseconds of a prompt of `tokens` tokens, batch 1, in a copy cut to the units in `kept`."""
    (time,) = prompt_ms([cut_copy(model, kept)], tokens)
    return time


def prompt_ms(models: list[nn.Module], tokens: int) -> list[float]:
    """Milliseconds that each model takes for a prompt of `tokens` tokens, batch 1, all taking turns.

    The head gives the logits of the last token alone, as in generation.
    """
    named = {"use_cache": False, "logits_to_keep": 1}
    return forwards_ms([(model, (some_ids(model, tokens),), named) for model in models])


Series = tuple[tuple[int, ...], tuple[float, ...]]  # numbers of units, rising; milliseconds at each


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of each block at several numbers of units of one kind, the other kind being whole.

    blocks: {block: {kind: (counts, milliseconds)}}, up to all units; of channels, the model's own. rest_ms:
    what the blocks do not take.
    """

    blocks: dict[str, dict[str, Series]]
    rest_ms: float

    @classmethod
    @torch.no_grad()
    def measure(cls, model: nn.Module, tokens: int, points: int = 6) -> LatencyTable:
        """Time a prompt of `tokens` tokens, batch 1, on the model's device; equal blocks once.

        Raises ValueError where the tokens exceed the model's context.
        """
        light, ids = cut_copy(model, {}), some_ids(model, tokens)
        found, seen = {}, {}
        for block in stream_blocks(light, [ids], progress=False):
            alike = (*linear_shapes(block.module).items(), shapes_in(block.arguments))
            if alike not in seen:
                seen[alike] = block_series(light, block, points)
            found[block.name] = seen[alike]
        parts = cls(found, 0.0).of_counts({})
        return cls(found, max(kept_ms(light, {}, tokens) - parts, 0.0))

    @classmethod
    def of_channels(cls, model: nn.Module, tokens: int, points: int = 6) -> LatencyTable:
        """Time the whole model at several numbers of channels instead."""
        counts = spaced(model.config.hidden_size, points)
        cuts = ({WHOLE: {"channels": torch.arange(count)}} for count in counts)
        times = tuple(kept_ms(model, kept, tokens) for kept in cuts)
        return cls({WHOLE: {"channels": (counts, times)}}, 0.0)

    def milliseconds(self, kept: Kept) -> float:
        """Predicted time of the model with only the units in `kept`; kinds not named are whole."""
        return self.of_counts({b: {k: len(index) for k, index in kinds.items()} for b, kinds in kept.items()})

    def of_counts(self, counts: dict[str, dict[str, int]]) -> float:
        """As `milliseconds`, of {block: {kind: how many units stay}}."""
        total = self.rest_ms
        for name, kinds in self.blocks.items():
            whole = next(iter(kinds.values()))[1][-1]
            saved = (whole - between(kinds[kind], n) for kind, n in counts.get(name, {}).items())
            total += max(whole - sum(saved), 0.0)
        return total


def block_series(model: nn.Module, block: Block, points: int) -> dict[str, Series]:
    """{kind: milliseconds of `block` at up to `points` numbers of its units}, on its first input."""
    (args, named), works, counts = block.arguments[0], [], {}
    given = ((block.inputs[0], *args), named)
    for kind, parts in members(model, block.module).items():
        total = len(parts[-1].index)
        counts[kind] = spaced(total, points)
        for count in counts[kind][:-1]:
            light = cut_copy(model, {block.name: {kind: torch.arange(count)}})
            works.append((light.get_submodule(block.name), *given))
    whole, *times = forwards_ms([(block.module, *given), *works])
    rest = iter(times)
    return {kind: (each, (*islice(rest, len(each) - 1), whole)) for kind, each in counts.items()}


def spaced(total: int, points: int) -> tuple[int, ...]:
    """Up to `points` numbers of units, evenly up to all of them."""
    return tuple(sorted({math.ceil(total * i / points) for i in range(1, points + 1)}))


def between(series: Series, count: int) -> float:
    """Milliseconds at `count` units, on the line between its neighbours; below the first, on the first's."""
    counts, times = series
    if len(counts) == 1:
        return times[0]
    i = next((i for i in range(1, len(counts) - 1) if count <= counts[i]), len(counts) - 1)
    share = (count - counts[i - 1]) / (counts[i] - counts[i - 1])
    return times[i - 1] + share * (times[i] - times[i - 1])


@torch.no_grad()
def forwards_ms(works: list[tuple[nn.Module, tuple, dict]]) -> list[float]:
    """Milliseconds of each module(*inputs, **named): the least of TURNS medians, all taking turns.

    What else runs on the device can only add, and slows those that take turns alike.
    """
    turns = [
        [seconds(partial(module, *inputs, **named), inputs[0].device, 3) for module, inputs, named in works]
        for _ in range(TURNS)
    ]
    return [1e3 * min(times) for times in zip(*turns, strict=True)]


def cut_copy(model: nn.Module, kept: Kept) -> nn.Module:
    """A copy in which only the units in `kept` stay; what is not cut shares the model's own tensors."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    light = use_linear_everywhere(copy.deepcopy(model, shared)).eval()
    for _ in cut_units(light, kept):
        pass
    return light


def some_ids(model: nn.Module, tokens: int) -> Tensor:
    """Fixed and arbitrary ids (1, tokens) on the model's device."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if tokens < 1 or (limit and tokens > limit):
        raise ValueError(f"tokens={tokens}: give 1 to {limit or 'any number'}, the model's context")
    return torch.arange(tokens, device=device_of(model))[None] % min(model.config.vocab_size, 1000)


def shapes_in(value) -> tuple:
    """The shapes of all tensors in nested containers: blocks with other masks are not alike."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    parts = value.values() if isinstance(value, dict) else value
    return tuple(shapes_in(p) for p in parts) if isinstance(value, (dict, list, tuple)) else ()
