"""Every method, a row each: what to call, where it comes from, what it compresses, and settings to try."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightlib.quantization.awq import awq
from lightlib.quantization.float_grids import FP8, NF4
from lightlib.quantization.gptq import gptq
from lightlib.quantization.grid import Int
from lightlib.quantization.llm_int8 import llm_int8
from lightlib.quantization.rtn import rtn
from lightlib.quantization.smoothquant import smoothquant


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
        "the blocks' linear weights, to integers of 2 to 8 bits, NF4 or FP8",
        needs_data=False,
        knobs={
            "grid": (
                Int(4, group_size=16),
                Int(8),
                Int(3, group_size=16),
                Int(2, symmetric=True),
                Int(8, per_tensor=True, symmetric=True),
                Int(4, group_size=16, float_zero=True),
                NF4(group_size=16),
                FP8("e4m3", group_size=16),
                FP8("e5m2", group_size=None, per_tensor=True),
            )
        },
    ),
    Method(
        "gptq",
        gptq,
        "Frantar et al. 2022, arXiv:2210.17323",
        "the blocks' linear weights, with errors passed on to weights not rounded yet",
        needs_data=True,
        knobs={
            "grid": (
                Int(4, group_size=16),
                Int(3),
                Int(2, group_size=16, symmetric=True),
                Int(8),
                NF4(group_size=16),
            ),
            "act_order": (True,),
            "static_groups": (True,),
            "true_sequential": (True,),
            "damping": (0.1,),
        },
    ),
    Method(
        "awq",
        awq,
        "Lin et al. 2023, arXiv:2306.00978",
        "the blocks' linear weights, with the channels that carry most stretched before rounding",
        needs_data=True,
        knobs={
            "grid": (
                Int(4, group_size=16),
                Int(3),
                Int(4, group_size=16, symmetric=True),
                NF4(group_size=16),
            ),
            "clip": (False,),
            "steps": (5,),
        },
    ),
    Method(
        "llm_int8",
        llm_int8,
        "Dettmers et al. 2022, arXiv:2208.07339",
        "the blocks' linear weights and inputs, to 8 bits, outlier columns apart in 16",
        needs_data=False,
        knobs={"threshold": (6.0, 1.0), "dynamic": (False,)},
    ),
    Method(
        "smoothquant",
        smoothquant,
        "Xiao et al. 2022, arXiv:2211.10438",
        "the blocks' linear weights and inputs, to 8 bits, outliers moved into the weights",
        needs_data=True,
        knobs={
            "alpha": (0.5, "search", None),
            "activations": ("token", "tensor", "static"),
            "per_tensor": (True,),
            "everywhere": (True,),
        },
    ),
)
