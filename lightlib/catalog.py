"""Every method, a row each: what to call, where it comes from, what it compresses, and settings to try."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn


@dataclass(frozen=True)
class Method:
    """`knobs`: for each keyword, values that work on a layer whose inputs are a multiple of 16."""

    name: str
    function: Callable
    paper: str
    compresses: str
    needs_data: bool
    knobs: dict[str, tuple]


METHODS = (
    Method(
        "rtn",
        rtn,
        "Jacob et al. 2018, arXiv:1712.05877",
        "the blocks' linear weights, to integers of 2 to 8 bits",
        needs_data=False,
        knobs={
            "grid": (
                Int(4, group_size=16),
                Int(8),
                Int(3, group_size=16),
                Int(2, symmetric=True),
                Int(8, per_tensor=True, symmetric=True),
                Int(4, group_size=16, float_zero=True),
            )
        },
    ),
)
