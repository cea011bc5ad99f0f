"""Measure low rank on the real model, alone, beside other methods and with them -> perplexity, bytes, times.

    python data/scan_low_rank.py      # 35 minutes on two idle CPU cores; writes data/low_rank.json

Each point is a recipe for smollm2-135m. Bytes are those of a file with all that is not packed in bfloat16.
Points of low rank alone, weighed by the gram, are timed beside the dense model, which is timed again for
each. Lesson 09 draws the points; its explorer reads them.
"""

import time
from functools import partial
from pathlib import Path

import torch
from scanning import scan

from lightlib.decoder import cast
from lightlib.lowrank.budget import sensitive
from lightlib.lowrank.correction import correct
from lightlib.lowrank.svd import svd
from lightlib.measure import flops, latency, perplexity, size
from lightlib.quantization.gptq import gptq
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from lightlib.recipe import compress
from lightlib.sparsity.sparsegpt import sparsegpt

METHODS = {"svd": svd, "rtn": rtn, "gptq": gptq, "sparsegpt": sparsegpt, "correct": correct}
FRACTIONS, PROMPT, NEW = (0.1, 0.2, 0.4), 256, 24


def plan() -> list[dict]:
    """The points, those that a reader asks for first in front."""
    recipes = [[svd_step(f)] for f in (0.2, 0.4, 0.1, 0.3, 0.6)]
    recipes += [[svd_step(f, weighing=w)] for f in FRACTIONS for w in (None, "norm")]
    recipes += [[svd_step(f, pivot=False)] for f in FRACTIONS]
    rounded = {(m, b): [m, {"bits": b, "group_size": g}] for m, b, g in [
        ("rtn", 8, None), ("rtn", 4, 64), ("rtn", 3, 64), ("gptq", 4, 64), ("gptq", 3, 64)]}  # fmt: skip
    pruned = {share: ["sparsegpt", {"sparsity": share}] for share in (0.5, 0.6)}
    recipes += [[step] for step in (*rounded.values(), *pruned.values())]
    recipes += [[svd_step(f), rounded["rtn", 8]] for f in (0.1, 0.2)]
    # groups of 64 are to fit into the ranks
    recipes += [[svd_step(0.1, round_to=64), rounded[method, 4]] for method in ("gptq", "rtn")]
    recipes += [[svd_step(0.1, round_to=64, pivot=False), rounded["gptq", 4]]]
    steps = (rounded["rtn", 3], pruned[0.6])
    recipes += [[step, correcting(rank)] for step in steps for rank in (8, 32)]
    recipes += [[rounded["gptq", 3], correcting(32)], [svd_step(0.2, ranks="sensitive")]]
    return [{"steps": steps} for steps in recipes]


def svd_step(fraction: float, **knobs) -> list:
    return ["svd", {"fraction": fraction} | knobs]


def correcting(rank: int) -> list:
    return ["correct", {"rank": rank}]


def step(model, calibration: list, name: str, knobs: dict) -> partial:
    """The method with these knobs, as `compress` takes it."""
    knobs = dict(knobs)
    if "bits" in knobs:
        knobs = {"grid": Int(knobs["bits"], group_size=knobs["group_size"])}
    if knobs.pop("ranks", None):
        knobs = {"rank": sensitive(model, [calibration[0][:1]], progress=False, **knobs)}
    if name == "correct":
        knobs["dense"] = model
    return partial(METHODS[name], progress=False, **knobs)


def measure(model, calibration: list, tests: list, point: dict) -> dict:
    """The point with what was measured there. Times: after a prompt of 256 tokens, batch 1, float32."""
    begin = time.perf_counter()
    steps = [step(model, calibration, *each) for each in point["steps"]]
    light, report = compress(model, steps, calibration)
    seconds, times = time.perf_counter() - begin, {}
    (name, knobs), *later = point["steps"]
    if name == "svd" and not later and not {"weighing", "ranks"} & set(knobs):
        for name, each in (("dense_", model), ("", light)):
            found = latency(each, prompt=PROMPT, new=NEW)
            times |= {f"{name}ttft_ms": found.ttft_ms, f"{name}tpot_ms": found.tpot_ms}
    return {
        **point,
        "perplexity": perplexity(light, tests),
        "mean_error": report.mean_error,
        "gflops_per_token": flops(light).decode_per_token / 1e9,
        **times,
        "seconds": round(seconds, 1),
        "stored_bytes": size(cast(light, torch.bfloat16)).stored_bytes,
    }


if __name__ == "__main__":
    scan(__doc__, Path(__file__), plan(), measure)
