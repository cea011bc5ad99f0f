"""Measure structured pruning on the real model: method x share -> perplexity, bytes, times.

    python data/scan_structured.py      # 25 minutes on two idle CPU cores; writes data/structured.json

Each point prunes smollm2-135m. Those of CFSP are timed, each beside the dense model, which is timed again for
each: other work on the machine then shows in both. Points with a budget ask for a share of the dense model's
milliseconds, and say how many the cut model takes. Lesson 07 draws the points.
"""

import time
from pathlib import Path

from scanning import scan

from lightlib.measure import latency, perplexity, size
from lightlib.structured.budget import prompt_ms
from lightlib.structured.cfsp import cfsp
from lightlib.structured.depth import drop_blocks
from lightlib.structured.fisher_masks import fisher_masks
from lightlib.structured.llm_pruner import llm_pruner
from lightlib.units import unit_counts

METHODS = {"cfsp": cfsp, "llm_pruner": llm_pruner, "fisher_masks": fisher_masks, "drop_blocks": drop_blocks}
SAMPLES = {"llm_pruner": 10, "fisher_masks": 16}  # windows that gradients are taken on
PROMPT, NEW = 256, 24
NEURONS = ["neurons"]


def plan() -> list[dict]:
    """The points, those that are timed in front."""
    points = [point("cfsp", fraction) for fraction in (0.2, 0.3, 0.5, 0.1)]
    points += [point("cfsp", None, share_of_ms=share, round_to=8) for share in (0.9, 0.8, 0.7)]
    points += [point("fisher_masks", None, share_of_ms=0.8)]
    points += [point("cfsp", 0.2, score="activation"), point("cfsp", 0.2, sharpness=0.0)]
    points += [point("llm_pruner", fraction, kinds=NEURONS) for fraction in (0.2, 0.3, 0.5)]
    points += [point("llm_pruner", 0.2, kinds=NEURONS, importance=kind) for kind in ("second", "mixed")]
    points += [point("llm_pruner", fraction, kinds=["channels"], round_to=8) for fraction in (0.1, 0.2)]
    points += [point("fisher_masks", fraction, kinds=NEURONS) for fraction in (0.2, 0.3, 0.5)]
    points += [point("fisher_masks", 0.2)]
    return [*points, *(point("drop_blocks", None, count=count, choose="run") for count in (1, 3, 6, 9))]


def point(method: str, fraction: float | None, **knobs) -> dict:
    return {"method": method, "fraction": fraction, "knobs": knobs}


def measure(model, calibration: list, tests: list, point: dict) -> dict:
    """The point with what was measured there. Times: of or after a prompt of 256 tokens, batch 1.

    share_of_ms among its knobs: of the dense model's time, as a budget in place of a fraction.
    """
    method, knobs = point["method"], dict(point["knobs"])
    share = knobs.pop("share_of_ms", None)
    if point["fraction"] is not None:
        knobs["fraction"] = point["fraction"]
    if share is not None:
        (dense_ms,) = prompt_ms([model], PROMPT)
        knobs["budget_ms"] = share * dense_ms
    begin = time.perf_counter()
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
    if share is not None:
        again, taken = prompt_ms([model, light], PROMPT)
        found |= {"asked_ms": knobs["budget_ms"], "dense_ms": dense_ms, "dense_ms_after": again, "ms": taken}
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
