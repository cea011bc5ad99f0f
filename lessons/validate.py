"""Run every lesson on this device, compare it with what it says, and write lessons/validation/<device>.json.

`python lessons/validate.py` takes every lesson; name some to take only those.
"""

import argparse
import importlib
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

import torch

HERE = Path(__file__).resolve().parent
PACKAGES = ("lightlib", "torch", "transformers", "numpy", "matplotlib")
NBVAL = ("--nbval", "--nbval-current-env", "--nbval-cell-timeout", "300", "-q", "-p", "no:cacheprovider")


def device() -> str:
    """The GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return (names or [platform.processor() or platform.machine()])[0]


def validate(lesson: Path) -> dict:
    """How one lesson did under nbval: did all its cells pass, which did not, and in how many seconds."""
    with tempfile.TemporaryDirectory() as place:
        start, log = time.perf_counter(), Path(place) / "log.xml"
        command = [sys.executable, "-m", "pytest", *NBVAL, f"--junit-xml={log}", lesson.name]
        done = subprocess.run(command, cwd=lesson.parent)
        seconds = round(time.perf_counter() - start, 1)
        cells = list(ElementTree.parse(log).iter("testcase")) if log.exists() else []
    failed = [c.get("name") for c in cells if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c.get("name") for c in cells if c.find("skipped") is not None]
    passed = done.returncode == 0
    return {"passed": passed, "cells": len(cells), "failed": failed, "skipped": skipped, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lessons", nargs="*", type=Path, default=sorted(HERE.glob("[0-9]*.ipynb")))
    parser.add_argument("--folder", type=Path, default=HERE / "validation", help="where to write the result")
    options = parser.parse_args()
    results = {lesson.stem: validate(lesson.resolve()) for lesson in options.lessons}
    facts = {
        "device": device(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: importlib.import_module(name).__version__ for name in PACKAGES},
        "lessons": results,
    }
    path = options.folder / (re.sub(r"\W+", "-", device().lower()).strip("-") + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=1) + "\n")
    for name, result in results.items():
        print(f"{name}: {'passed' if result['passed'] else 'FAILED'} in {result['seconds']} s")
    print(f"written to {path}")
    sys.exit(not all(result["passed"] for result in results.values()))


if __name__ == "__main__":
    main()
