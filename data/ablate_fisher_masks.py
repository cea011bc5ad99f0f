"""Measure the three steps of Fisher masks on the real model: fraction x steps -> perplexity, size, seconds.

    python data/ablate_fisher_masks.py      # writes data/fisher_masks.json

Every point prunes smollm2-135m with the gradients of the same windows; their seconds stand beside those of
the steps.
"""

import functools
import sys
import time
from pathlib import Path

from scanning import scan

from lightlib.measure import perplexity, size
from lightlib.structured.fisher_masks import fisher_masks, mask_gradients

STEPS = ((False, False), (True, False), (False, True), (True, True))


def plan() -> list[dict]:
    """The points, those that a reader asks for first in front."""
    return [
        {"fraction": fraction, "rearrange": rearrange, "tune": tune, "shrinkage": shrinkage}
        for fraction in (0.2, 0.4)
        for shrinkage in (None, 0.0)
        for rearrange, tune in STEPS
        if shrinkage is None or (rearrange and not tune)
    ]


@functools.cache
def gradients_once() -> dict:
    """Where the gradients of this run are kept: one model, one set of windows."""
    return {}


def measure(model, calibration: list, tests: list, point: dict) -> dict:
    """The point with what was measured there."""
    kept = gradients_once()
    if not kept:
        begin = time.perf_counter()
        kept["gradients"] = mask_gradients(model, calibration, progress=False)
        kept["seconds"] = round(time.perf_counter() - begin, 1)
    begin = time.perf_counter()
    light, _ = fisher_masks(model, calibration, gradients=kept["gradients"], progress=False, **point)
    seconds = time.perf_counter() - begin
    return {
        **point,
        "perplexity": perplexity(light, tests),
        "parameters": size(light).parameters,
        "stored_bytes": size(light).stored_bytes,
        "gradient_seconds": kept["seconds"],
        "step_seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    # named after the method, not the script; a --file that is given comes later and wins
    sys.argv[1:1] = ["--file", str(Path(__file__).with_name("fisher_masks.json"))]
    scan(__doc__, Path(__file__), plan(), measure)
