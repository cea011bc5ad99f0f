"""What the scans share: their model, texts and settings, and a file that is written after every point."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from lightlib.measure import perplexity, size
from lightlib.zoo import batches, load_model, load_text

SETTINGS = {
    "model": "smollm2-135m",
    "dtype": "float32",
    "text": "prose",
    "calibration": {"split": "calibration", "n": 16, "length": 512},
    "test": {"split": "test", "n": 6, "length": 512},
}


def windows(tokenizer, split: str, n: int, length: int) -> list:
    return batches(tokenizer, load_text(SETTINGS["text"], split=split), n=n, length=length)


def scan(about: str, script: Path, points: list[dict], measure: Callable[..., dict]) -> None:
    """Keep measure(model, calibration, tests, point) of each of `points` in the script's file.

    `scan_x.py` writes `x.json`. A scan that was stopped goes on where it ended.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    file = script.with_name(script.stem.removeprefix("scan_") + ".json")
    parser.add_argument("--file", type=Path, default=file)
    parser.add_argument("--most", type=int, help="stop after so many new points")
    flags = parser.parse_args()

    model, tokenizer = load_model(SETTINGS["model"])
    calibration, tests = (windows(tokenizer, **SETTINGS[part]) for part in ("calibration", "test"))
    if flags.file.is_file():
        found = json.loads(flags.file.read_text())
        if found["settings"] != SETTINGS:
            raise SystemExit(f"{flags.file} was made with other settings; move it away to begin anew")
    else:
        found = {
            "command": f"python data/{script.name}",
            "settings": SETTINGS,
            "torch": torch.__version__.partition("+")[0],
            "threads": torch.get_num_threads(),
            "dense": {"perplexity": perplexity(model, tests), "stored_bytes": size(model).stored_bytes},
            "points": [],
        }
    done = [{key: point.get(key) for key in points[0]} for point in found["points"]]
    for one in [point for point in points if point not in done][: flags.most]:
        found["points"].append(measure(model, calibration, tests, one))
        lines = ",\n".join(f"  {json.dumps(point)}" for point in found["points"])
        head = json.dumps({key: part for key, part in found.items() if key != "points"}, indent=1)[:-2]
        flags.file.write_text(f'{head},\n "points": [\n{lines}\n ]\n}}\n')
        print(found["points"][-1], flush=True)
