"""What the scans share: their model, texts and settings, and a file that is written after every point."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightlib.measure import perplexity, size
from lightlib.zoo import batches, load_model, load_text

SETTINGS = {
    "model": "smollm2-135m",
    "dtype": "float32",
    "text": "prose",
    "calibration": {"split": "calibration", "n": 16, "length": 512},
    "test": {"split": "test", "n": 6, "length": 512},
}


def windows(tokenizer, split: str, n: int, length: int, text: str = SETTINGS["text"]) -> list:
    return batches(tokenizer, load_text(text, split=split), n=n, length=length)


def scan(about: str, script: Path, points: list[dict], measure: Callable[..., dict]) -> None:
    """Keep measure(model, calibration, tests, point) of each of `points` in the script's file.

    `scan_x.py` writes `x.json`. A scan that was stopped goes on where it ended.
    """
    flags = arguments(about, script.with_name(script.stem.removeprefix("scan_") + ".json"))
    model, tokenizer = load_model(SETTINGS["model"])
    calibration, tests = (windows(tokenizer, **SETTINGS[part]) for part in ("calibration", "test"))

    def begin() -> dict:
        dense = {"perplexity": perplexity(model, tests), "stored_bytes": size(model).stored_bytes}
        return {**made_by(f"python data/{script.name}", SETTINGS), "dense": dense, "points": []}

    found = go_on(flags.file, SETTINGS, begin)
    done = [{key: point.get(key) for key in points[0]} for point in found["points"]]
    for one in [point for point in points if point not in done][: flags.most]:
        found["points"].append(measure(model, calibration, tests, one))
        write(flags.file, found, "points")
        print(found["points"][-1], flush=True)


# a file of results that is written after each of them
def arguments(about: str, file: Path) -> argparse.Namespace:
    """--file: where results go, `file` unless given; --most: stop after so many new ones."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=file)
    parser.add_argument("--most", type=int, help="stop after so many new results")
    return parser.parse_args()


def made_by(command: str, settings: dict) -> dict:
    """The head of a file: what made it."""
    torch_version = torch.__version__.partition("+")[0]
    return {
        "command": command, "settings": settings, "torch": torch_version, "threads": torch.get_num_threads(),
    }  # fmt: skip


def go_on(file: Path, settings: dict, begin: Callable[[], dict]) -> dict:
    """What the file holds, or what `begin` makes where there is none."""
    if not file.is_file():
        return begin()
    found = json.loads(file.read_text())
    if found["settings"] != settings:
        raise SystemExit(f"{file} was made with other settings; move it away to begin anew")
    return found


def write(file: Path, found: dict, *lists: str) -> None:
    """`found` as JSON, with a line for each row of its `lists`, which come last."""
    head = json.dumps({key: part for key, part in found.items() if key not in lists}, indent=1)[:-2]
    rows = [f' "{key}": [\n  ' + ",\n  ".join(map(json.dumps, found[key])) for key in lists]
    file.write_text(head + ",\n" + "\n ],\n".join(rows) + "\n ]\n}\n")


class Texts:
    """Windows (n, length) of a text: to learn from, to choose the rate on, and to test on."""

    def __init__(self, tokenizer, settings: dict):
        def cut(split: str, n: int | None) -> Tensor:
            text = load_text(settings["text"], split=split)
            return torch.cat(batches(tokenizer, text, n=n, length=settings["length"]))

        learn, held = cut("calibration", None), settings["held_out"]
        self.learn, self.held = learn[:-held], learn[-held:]
        self.test, self.batch = cut("test", settings["test_windows"]), settings["batch"]

    def order(self, seed: int, steps: int) -> list[Tensor]:
        """The batches of one run."""
        places = torch.randperm(len(self.learn), generator=torch.Generator().manual_seed(seed))
        return list(self.learn[places[: steps * self.batch]].split(self.batch))
