"""Several methods in a row, and one method over many settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightlib.change import changing
from lightlib.report import Compressed, Report


def compress(
    model: nn.Module, steps: list[Callable], batches: list[Tensor] | None = None, *, inplace: bool = False
) -> Compressed:
    """Apply `steps`, methods or partials of them, one after the other; one report holds all their rows.

    `compress(model, [partial(rtn, grid=Int(4, 64))], calib)` equals `rtn(model, calib, grid=Int(4, 64))`.
    """
    with changing(model, inplace) as light:
        report = Report(())
        for step in steps:
            light, rows = step(light, batches, inplace=True)
            report += rows
    return Compressed(light, report)


@dataclass(frozen=True)
class Point:
    """One setting of a sweep and what was measured there."""

    knob: str
    value: Any
    measured: Any


def sweep(
    method: Callable[..., Compressed],
    knob: str,
    values: Iterable,
    executor: Executor | None = None,
    *,
    measure: Callable[[Compressed], Any] = tuple,
) -> list[Point]:
    """`measure(method(knob=value))` for each value, in the order of the values.

    method: a partial that holds the model and the batches. executor: any concurrent.futures.Executor (a
    local pool,
    Dask's, MPI's); for processes, `method` and `measure` must be picklable. Without `measure`: (model,
    report).
    """
    values = list(values)
    run = map if executor is None else executor.map
    return [
        Point(knob, value, found)
        for value, found in zip(values, run(partial(_one, method, knob, measure), values), strict=True)
    ]


def _one(method: Callable, knob: str, measure: Callable, value: Any) -> Any:
    return measure(method(**{knob: value}))
