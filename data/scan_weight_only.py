"""Measure weight-only methods on the real model: bits x group size x method -> perplexity and bytes.

    python data/scan_weight_only.py      # an hour on one idle CPU core; writes data/weight_only.json

Each point is one whole run of a method on smollm2-135m. The file is written after every point, and a scan
that was stopped goes on where it ended. Lesson 03 draws the points; its explorer reads them.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from lightlib.measure import perplexity, size
from lightlib.quantization.awq import awq
from lightlib.quantization.float_grids import FP8, NF4
from lightlib.quantization.gptq import gptq
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from lightlib.zoo import batches, load_model, load_text

FILE = Path(__file__).with_name("weight_only.json")
GRIDS = {"Int": Int, "NF4": NF4, "FP8": FP8}
METHODS = {"rtn": rtn, "gptq": gptq, "awq": awq}
GROUPS = (64, None, 192, 32)  # None: one scale a row; 576 inputs are no multiple of 128
ORDERED = {"act_order": True, "static_groups": True}
SETTINGS = {
    "model": "smollm2-135m",
    "dtype": "float32",
    "text": "prose",
    "calibration": {"split": "calibration", "n": 16, "length": 512},
    "test": {"split": "test", "n": 6, "length": 512},
}


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


def windows(tokenizer, split: str, n: int, length: int) -> list:
    return batches(tokenizer, load_text(SETTINGS["text"], split=split), n=n, length=length)


def settings_of(point: dict) -> dict:
    return {key: point[key] for key in ("method", "grid", "bits", "group_size", "knobs")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--most", type=int, help="stop after so many new points")
    flags = parser.parse_args()

    model, tokenizer = load_model(SETTINGS["model"])
    calibration, tests = (windows(tokenizer, **SETTINGS[part]) for part in ("calibration", "test"))
    if flags.file.is_file():
        scan = json.loads(flags.file.read_text())
        if scan["settings"] != SETTINGS:
            raise SystemExit(f"{flags.file} was made with other settings; move it away to begin anew")
    else:
        dense = {"perplexity": perplexity(model, tests), "stored_bytes": size(model).stored_bytes}
        scan = {
            "command": "python data/scan_weight_only.py",
            "settings": SETTINGS,
            "torch": torch.__version__.partition("+")[0],
            "threads": torch.get_num_threads(),
            "dense": dense,
            "points": [],
        }
    done = [settings_of(point) for point in scan["points"]]
    for one in [point for point in plan() if point not in done][: flags.most]:
        scan["points"].append(measure(model, calibration, tests, one))
        lines = ",\n".join(f"  {json.dumps(point)}" for point in scan["points"])
        head = json.dumps({key: part for key, part in scan.items() if key != "points"}, indent=1)[:-2]
        flags.file.write_text(f'{head},\n "points": [\n{lines}\n ]\n}}\n')
        print(scan["points"][-1], flush=True)


if __name__ == "__main__":
    main()
