"""Recovery in so many minutes: a compressed model distilled from the dense one it came from.

A learning rate that falls to 0 needs to know its last step; the time of the first steps says which that is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter

from torch import Tensor, nn

from lightlib.change import changing
from lightlib.distillation.distill import distill
from lightlib.distillation.losses import Loss, forward_kl
from lightlib.distillation.matching import Match
from lightlib.report import Compressed

TRIALS = 2, 6  # steps that are timed, the first of which warms up; six more where two were quick
QUICK = 0.1  # of the minutes
MARGIN = 0.1  # of the minutes, kept for steps that turn out slower
WARMUP = 0.05  # of the steps: a compressed model is nearly right, and a kick at the first step would harm it
PLAN = "steps.json"


def recover(
    light: nn.Module,
    teacher: nn.Module,
    batches: list[Tensor],
    *,
    minutes: float = 20.0,
    lr: float = 1e-4,
    loss: Loss = forward_kl,
    hard: float = 0.0,
    temperature: float = 1.0,
    match: Match | None = None,
    accumulate: int = 1,
    precision: str | None = None,
    weights: str | Sequence[str] = "blocks",
    checkpoint: str | Path | None = None,
    watch: Callable[[int, float], None] = lambda step, loss: None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """Distil `light` from its dense `teacher` for about so many `minutes`, and not more on an even machine.

    A few steps that move nothing are timed; `distill` then takes as many as fit, the first of them to warm
    up. What was sparse stays sparse, and sliced, pruned and factorized models keep their shapes. checkpoint:
    the same call goes on with the number of steps that the first one found. The other settings: see
    `distill`.
    Raises ValueError where not one step fits, and what `distill` raises.
    """
    if not minutes > 0:
        raise ValueError(f"minutes={minutes}: recovery takes time; give more than 0")
    begin = perf_counter()
    with changing(light, inplace) as student:
        run = partial(
            distill, student, batches, teacher=teacher, loss=loss, hard=hard, temperature=temperature,
            match=match, accumulate=accumulate, precision=precision, weights=weights, inplace=True,
        )  # fmt: skip
        steps = None if checkpoint is None else planned(checkpoint, minutes)
        if steps is None:
            times = timed(run, 60 * minutes * QUICK)
            left = 60 * minutes * (1 - MARGIN) - (perf_counter() - begin)
            steps = agreed(steps_within(left, times, [ids.numel() for ids in batches], accumulate))
            if not steps:
                raise ValueError(f"minutes={minutes} leave no time for a step; give more, or smaller batches")
            if checkpoint is not None:
                plan(checkpoint, minutes, steps)
        warmup = round(WARMUP * steps)
        return run(steps=steps, lr=lr, warmup=warmup, checkpoint=checkpoint, watch=watch, progress=progress)


def timed(run: Callable, quick: float) -> list[float]:
    """When the steps of a trial that moves nothing ended: of a longer one if two took up to `quick` s."""
    begin = perf_counter()
    for trial in TRIALS:
        times = []
        run(steps=trial, lr=0.0, watch=lambda *_, at=times: at.append(perf_counter()), progress=False)
        if perf_counter() - begin > quick:
            break
    return times


def steps_within(seconds: float, times: list[float], tokens: list[int], accumulate: int = 1) -> int:
    """How many steps fit, by when the first ones ended and by the tokens of each batch, round and round.

    The mean time a token of these steps, the first of which only starts the clock, is that of all others.
    """
    taken = [tokens[i % len(tokens)] for i in range(len(times) * accumulate)]
    a_token = (times[-1] - times[0]) / sum(taken[accumulate:])
    a_step = a_token * accumulate * sum(tokens) / len(tokens)
    return max(int(seconds / a_step), 0)


def agreed(steps: int) -> int:
    """The least of what the processes that train together found."""
    from accelerate.utils import gather_object

    return min(gather_object([steps]))


def planned(folder: str | Path, minutes: float) -> int | None:
    """The number of steps that an earlier call found; None without one."""
    file = Path(folder).expanduser() / PLAN
    if not file.is_file():
        return None
    before = json.loads(file.read_text())
    if before["minutes"] != minutes:
        raise ValueError(
            f"{file} is of a recovery in {before['minutes']} minutes, now {minutes}; take another folder"
        )
    return before["steps"]


def plan(folder: str | Path, minutes: float, steps: int) -> None:
    """Note the number of steps, for calls that go on."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        file = Path(folder).expanduser() / PLAN
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".part")
        draft.write_text(json.dumps({"minutes": minutes, "steps": steps}))
        draft.replace(file)
