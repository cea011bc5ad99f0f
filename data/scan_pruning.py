"""Measure pruning methods on the real model: method x sparsity -> perplexity and bytes.

    python data/scan_pruning.py      # most of an hour on two idle CPU cores; writes data/pruning.json

Each point is one whole run of a method on smollm2-135m, all layers alike or by a budget. Lesson 05 draws the
points; its explorer reads them.
"""

import time
from pathlib import Path

from scanning import scan

from lightlib.measure import perplexity, size
from lightlib.sparsity.budget import owl, sensitive
from lightlib.sparsity.magnitude import magnitude
from lightlib.sparsity.sparsegpt import sparsegpt
from lightlib.sparsity.wanda import wanda
from lightlib.sparsity.wrp import wrp

METHODS = {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt, "wrp": wrp}
BUDGETS = {"owl": owl, "sensitive": sensitive}
FEW = {"sensitive": 1}  # window that is enough: it runs the model once a stage


def plan() -> list[dict]:
    """The points, those that a reader asks for first in front."""
    three = ("magnitude", "wanda", "sparsegpt")
    points = [point(method, sparsity=s) for s in (0.5, "2:4", 0.3, 0.7, 0.4, 0.6) for method in three]
    points += [point("wrp", alpha=alpha) for alpha in (0.1, 0.2, 0.25, 0.3, 0.4)]
    points += [point("wanda", budget, sparsity=s) for s in (0.6, 0.5, 0.7) for budget in BUDGETS]
    return points + [point(method, sparsity=s) for s in ("4:8", 0.2, 0.1) for method in three]


def point(method: str, budget: str = "", **knobs) -> dict:
    return {"method": method, "budget": budget, "knobs": knobs}


def measure(model, calibration: list, tests: list, point: dict) -> dict:
    """The point with what was measured there. Bytes: of the blocks' linear layers, and of the whole file."""
    begin, knobs = time.perf_counter(), dict(point["knobs"])
    if point["budget"]:
        windows = [calibration[0][: FEW[point["budget"]]]] if point["budget"] in FEW else calibration
        knobs["sparsity"] = BUDGETS[point["budget"]](model, windows, progress=False, **knobs)
    calibration = None if point["method"] == "magnitude" else calibration
    light, report = METHODS[point["method"]](model, calibration, progress=False, **knobs)
    seconds = time.perf_counter() - begin
    count = sum(row.shape[0] * row.shape[1] for row in report)
    kept = sum(part.kept for row in report for part in light.get_submodule(row.name).parts())
    return {
        **point,
        "perplexity": perplexity(light, tests),
        "sparsity": 1 - kept / count,
        "bits_per_weight": sum(row.bits_after for row in report) / count,
        "linear_bytes": sum(row.bits_after for row in report) // 8,
        "stored_bytes": size(light).stored_bytes,
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    scan(__doc__, Path(__file__), plan(), measure)
