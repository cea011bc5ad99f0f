"""Measure SliceGPT on the real model: fraction x rotations x shortcuts -> perplexity, bytes, times.

    python data/scan_slicing.py      # 20 minutes on two idle CPU cores; writes data/slicing.json

Each point slices smollm2-135m and times it beside the dense model, which is timed again for each: other work
on the machine then shows in both. Lesson 08 draws the points.
"""

import time
from pathlib import Path

from scanning import scan

from lightlib.measure import latency, perplexity, size
from lightlib.slicing.slicegpt import slicegpt

PROMPT, NEW = 256, 24


def plan() -> list[dict]:
    """The points, those that a reader asks for first in front."""
    fractions = (0.25, 0.3, 0.2, 0.5, 0.1, 0.4, 0.0)
    points = [point(f, rotations) for f in fractions for rotations in ("sublayer", "block")]
    return [*points, *(point(f, "sublayer", "full") for f in (0.25, 0.3, 0.2))]


def point(fraction: float, rotations: str, shortcuts: str = "low_rank") -> dict:
    return {"slice_fraction": fraction, "rotations": rotations, "shortcuts": shortcuts}


def measure(model, calibration: list, tests: list, point: dict) -> dict:
    """The point with what was measured there. Times: after a prompt of 256 tokens, batch 1."""
    begin = time.perf_counter()
    light, report = slicegpt(model, calibration, progress=False, **point)
    seconds = time.perf_counter() - begin
    dense, sliced = (latency(each, prompt=PROMPT, new=NEW) for each in (model, light))
    return {
        **point,
        "perplexity": perplexity(light, tests),
        "parameters": size(light).parameters,
        "shortcut_parameters": sum(p.numel() for n, p in light.named_parameters() if "shortcut" in n),
        "stored_bytes": size(light).stored_bytes,
        "kept_share": min(1 - row.error**2 for row in report),
        "ttft_ms": sliced.ttft_ms,
        "tpot_ms": sliced.tpot_ms,
        "dense_ttft_ms": dense.ttft_ms,
        "dense_tpot_ms": dense.tpot_ms,
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    scan(__doc__, Path(__file__), plan(), measure)
