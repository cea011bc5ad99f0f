"""What was measured on GPUs: kernels/results/<device>.json, written by `python -m lightlib.kernels.bench`."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent / "results"


def file_for(device: str, folder: Path = FOLDER) -> Path:
    """Where the results of a device, such as "NVIDIA H100 80GB HBM3", are kept."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '_', device.lower()).strip('_')}.json"


@lru_cache(maxsize=8)
def rows(device: str, folder: Path = FOLDER) -> tuple[dict, ...]:
    """The sparse products measured on `device`, as `harness.Row` has them; none if it was not measured."""
    file = file_for(device, folder)
    return tuple(json.loads(file.read_text())["rows"]) if file.exists() else ()


def devices(folder: Path = FOLDER) -> list[str]:
    """The devices that were measured."""
    return sorted(json.loads(file.read_text())["device"] for file in folder.glob("*.json"))
