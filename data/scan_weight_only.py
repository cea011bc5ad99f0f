"""Measure weight-only methods on the real model: bits x group size x method -> perplexity and bytes.

    python data/scan_weight_only.py      # an hour on one idle CPU core; writes data/weight_only.json

Each point is one whole run of a method on smollm2-135m. Lesson 03 draws the points; its explorer reads them.
"""

import time
from pathlib import Path

from scanning import scan

from lightlib.measure import perplexity, size
from lightlib.quantization.awq import awq
from lightlib.quantization.float_grids import FP8, NF4
from lightlib.quantization.gptq import gptq
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn

GRIDS = {"Int": Int, "NF4": NF4, "FP8": FP8}
METHODS = {"rtn": rtn, "gptq": gptq, "awq": awq}
GROUPS = (64, None, 192, 32)  # None: one scale a row; 576 inputs are no multiple of 128
ORDERED = {"act_order": True, "static_groups": True}


def plan() -> list[dict]:
    """The points, those that a reader asks for first in front."""
    points = [point("rtn", bits, group) for bits in (4, 3, 2, 8) for group in GROUPS]
    points += [point("rtn", 4, group, "NF4") for group in (32, 64, 192)]
    points += [point("rtn", 8, group, "FP8") for group in (64, None)]
    points += [point(method, bits, 64) for method in ("gptq", "awq") for bits in (4, 3)]
    points += [point("gptq", bits, 64, act_order=True) for bits in (3, 4)]
    points += [point("gptq", bits, 64, **ORDERED) for bits in (4, 3)]
    points += [point("gptq", 4, group) for group in (None, 32)]
    for bits, group in ((4, 32), (3, 32), (4, None), (2, 64), (3, None)):
        points += [point("gptq", bits, group, **ORDERED), point("awq", bits, group)]
    return points


def point(method: str, bits: int, group_size: int | None, grid: str = "Int", **knobs) -> dict:
    return {"method": method, "grid": grid, "bits": bits, "group_size": group_size, "knobs": knobs}


def grid_of(point: dict):
    """The grid that a point names."""
    make, given = GRIDS[point["grid"]], {"group_size": point["group_size"]}
    return make(bits=point["bits"], **given) if make is Int else make(**given)


def measure(model, calibration: list, tests: list, point: dict) -> dict:
    """The point with what was measured there. Bytes: of the blocks' linear layers, and of the whole file."""
    begin = time.perf_counter()
    calibration = None if point["method"] == "rtn" else calibration
    method = METHODS[point["method"]]
    light, report = method(model, calibration, grid=grid_of(point), progress=False, **point["knobs"])
    seconds = time.perf_counter() - begin
    weights = sum(row.shape[0] * row.shape[1] for row in report)
    bits = sum(row.bits_after for row in report)
    return {
        **point,
        "perplexity": perplexity(light, tests),
        "bits_per_weight": bits / weights,
        "linear_bytes": bits // 8,
        "stored_bytes": size(light).stored_bytes,
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    scan(__doc__, Path(__file__), plan(), measure)
