"""Measure structured pruning on the real model: method x share -> perplexity, bytes, times.

    python data/scan_structured.py      # 25 minutes on two idle CPU cores; writes data/structured.json

Each point prunes smollm2-135m. Those of CFSP are timed, each beside the dense model, which is timed again for
each: other work on the machine then shows in both. Lesson 07 draws the points.
"""

import time
from pathlib import Path

from scanning import scan

from lightlib.measure import latency, perplexity, size
from lightlib.structured.cfsp import cfsp
from lightlib.structured.depth import drop_blocks
from lightlib.structured.fisher_masks import fisher_masks
from lightlib.structured.llm_pruner import llm_pruner
from lightlib.units import unit_counts

METHODS = {"cfsp": cfsp, "llm_pruner": llm_pruner, "fisher_masks": fisher_masks, "drop_blocks": drop_blocks}
SAMPLES = {"llm_pruner": 10, "fisher_masks": 16}  # windows that gradients are taken on
PROMPT, NEW = 256, 24
NEURONS = ("neurons",)


def plan() -> list[dict]:
    """The points, those that a reader asks for first in front."""
    points = [point("cfsp", fraction) for fraction in (0.2, 0.3, 0.5, 0.1)]
    points += [point("cfsp", 0.2, score="activation"), point("cfsp", 0.2, sharpness=0.0)]
    points += [point("llm_pruner", fraction, kinds=NEURONS) for fraction in (0.2, 0.3, 0.5)]
    points += [point("llm_pruner", 0.2, kinds=NEURONS, importance=kind) for kind in ("second", "mixed")]
    points += [point("fisher_masks", fraction, kinds=NEURONS) for fraction in (0.2, 0.3, 0.5)]
    points += [point("fisher_masks", 0.2)]
    return [*points, *(point("drop_blocks", None, count=count, choose="run") for count in (1, 3, 6, 9))]


def point(method: str, fraction: float | None, **knobs) -> dict:
    return {"method": method, "fraction": fraction, "knobs": knobs}


def measure(model, calibration: list, tests: list, point: dict) -> dict:
    """The point with what was measured there. Times: after a prompt of 256 tokens, batch 1."""
    method, begin = point["method"], time.perf_counter()
    knobs = point["knobs"] if point["fraction"] is None else {"fraction": point["fraction"], **point["knobs"]}
    batches = calibration[: SAMPLES.get(method, len(calibration))]
    light, _ = METHODS[method](model, batches, progress=False, **knobs)
    seconds, counts = time.perf_counter() - begin, unit_counts(light).values()
    found = {
        **point,
        "perplexity": perplexity(light, tests),
        "parameters": size(light).parameters,
        "stored_bytes": size(light).stored_bytes,
        "neurons": [each["neurons"] for each in counts],
        "seconds": round(seconds, 1),
    }
    if method == "cfsp" and not point["knobs"]:
        dense, pruned = (latency(each, prompt=PROMPT, new=NEW) for each in (model, light))
        found |= {
            "ttft_ms": pruned.ttft_ms,
            "tpot_ms": pruned.tpot_ms,
            "dense_ttft_ms": dense.ttft_ms,
            "dense_tpot_ms": dense.tpot_ms,
        }
    return found


if __name__ == "__main__":
    scan(__doc__, Path(__file__), plan(), measure)
