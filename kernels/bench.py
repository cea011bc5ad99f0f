"""Check and time the sparse products on this GPU: `python -m lightlib.kernels.bench`.

Writes kernels/results/<device>.json and prints a table; stops at the first kernel that is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch

from lightlib.kernels import harness, nvrtc

SHAPES = {  # (out, in): all but the last weigh 60 MB and more
    "Llama-7B gate+up": (22016, 4096),
    "Llama-13B down": (5120, 13824),
    "OPT-30B fc1": (28672, 7168),
    "Llama-7B o": (4096, 4096),
}
TOKENS = (1, 8, 16, 32, 64)
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
FOLDER = Path(__file__).parent / "results"


def points(quick: bool) -> list[tuple]:
    """(layout, out, in, tokens, sparsity) in the order they are measured."""
    shapes = list(SHAPES.values())[: 1 if quick else None]
    tokens = (1, 16) if quick else TOKENS
    return [
        (layout, *shape, n, sparsity)
        for shape in shapes
        for n in tokens
        for sparsity in SPARSITIES
        for layout in ("csl", "bitmap")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one shape, 1 and 16 tokens")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    flags = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device is here; the kernels are checked on a CPU by `pytest tests/kernels`")
    device = torch.cuda.get_device_name()
    errors = {layout: harness.check(layout) for layout in ("csl", "bitmap")}
    print(f"{device}: right at odd sizes, errors {errors}", flush=True)
    copy_speed, matmul_speed = harness.copy_gb_per_s(), harness.matmul_tflop_per_s()
    print(f"copy {copy_speed:.0f} GB/s, dense product {matmul_speed:.0f} TFLOP/s", flush=True)
    rows = []
    for point in points(flags.quick):
        row = harness.bench(*point, copy_speed, matmul_speed)
        rows.append(asdict(row))
        print(
            f"{row.layout:6} {row.n_out} x {row.n_in} N={row.tokens:<2} {row.sparsity:.0%}: {row.us:.1f} us, "
            f"{row.gb_per_s:5.0f} GB/s, {row.of_roofline:.0%} of roofline, {row.times_cublas:.2f} x cuBLAS "
            f"({row.cublas_us:.1f} us, {row.cublas_gb_per_s:.0f} GB/s)",
            flush=True,
        )
        found = {
            "device": device, "date": date.today().isoformat(), "torch": torch.__version__,
            "nvrtc": nvrtc.version(), "copy_gb_per_s": copy_speed, "matmul_tflop_per_s": matmul_speed,
            "errors": errors, "rows": rows,
        }  # fmt: skip
        flags.folder.mkdir(exist_ok=True)
        name = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
        (flags.folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
