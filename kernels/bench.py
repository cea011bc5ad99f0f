"""Check and time all kernels on this GPU: `python -m lightlib.kernels.bench`.

Writes kernels/results/<device>.json and prints a table; stops at the first kernel that is wrong.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from lightlib.kernels import harness, nvrtc, results
from lightlib.kernels.flash_attention import bench as attention
from lightlib.kernels.harness import Limits
from lightlib.kernels.sparse_matmul import bench as sparse
from lightlib.kernels.sparse_matmul.layouts import LAYOUTS
from lightlib.kernels.w4_matmul import bench as integers

SHAPES = {  # (out, in): all but the last weigh 60 MB and more
    "Llama-7B gate+up": (22016, 4096),
    "Llama-13B down": (5120, 13824),
    "OPT-30B fc1": (28672, 7168),
    "Llama-7B o": (4096, 4096),
}
TOKENS = (1, 2, 8, 16, 32, 64)
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one shape, 1 and 16 tokens")
    parser.add_argument("--folder", type=Path, default=results.FOLDER)
    flags = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device is here; the kernels are checked on a CPU by `pytest tests/kernels`")
    device = torch.cuda.get_device_name()
    found = {
        "device": device, "date": date.today().isoformat(), "torch": torch.__version__,
        "triton": version("triton"), "nvrtc": nvrtc.version(), "errors": checks(),
    }  # fmt: skip
    print(f"{device}: right at odd sizes, relative errors {found['errors']}", flush=True)
    limits = harness.limits()
    print(
        f"copy {limits.copy_gb_per_s:.0f} GB/s, product {limits.matmul_tflop_per_s:.0f} TFLOP/s", flush=True
    )
    found |= asdict(limits) | {"rows": [], "integers": [], "attention": []}
    flags.folder.mkdir(exist_ok=True)
    for kind, row, line in measurements(limits, flags.quick):
        found[kind].append(asdict(row))
        print(line, flush=True)
        results.file_for(device, flags.folder).write_text(json.dumps(found, indent=1) + "\n")


def checks(device: str = "cuda") -> dict[str, float]:
    """The largest relative error of each kernel. Raises AssertionError at the first one that is wrong."""
    errors = {layout: sparse.check(layout, device) for layout in LAYOUTS}
    errors |= {f"int{bits}": integers.check(bits, device) for bits in (4, 8)}
    return errors | {"attention": attention.check(device)}


def points(quick: bool) -> tuple[list[tuple[int, int]], tuple[int, ...]]:
    """(shapes, numbers of tokens) that are measured."""
    return list(SHAPES.values())[: 1 if quick else None], (1, 16) if quick else TOKENS


def measurements(limits: Limits, quick: bool) -> Iterator[tuple[str, object, str]]:
    """(kind, row, the row in words), one after the other."""
    shapes, tokens = points(quick)
    for shape in shapes:
        for sparsity in SPARSITIES:
            for row in sparse.bench(*shape, sparsity, tokens, limits):
                yield "rows", row, f"{row.sparsity:.0%} zeros, {said(row, row.layout)}"
        for row in integers.bench(*shape, tokens, limits):
            yield "integers", row, said(row, row.kernel)
    for row in attention.bench(limits):
        yield (
            "attention", row,
            f"{row.kernel:12} {row.name:22} {row.us:8.1f} us, {row.tflop_per_s:4.0f} TFLOP/s, "
            f"{row.gb_per_s:5.0f} GB/s, {row.of_roofline:4.0%} of roofline, {row.times_sdpa:.2f} x SDPA",
        )  # fmt: skip


def said(row: sparse.Row | integers.Row, name: str) -> str:
    """A product's row in words."""
    return (
        f"{name:12} {row.n_out} x {row.n_in}, {row.tokens:2} tokens: {row.us:7.1f} us, "
        f"{row.gb_per_s:5.0f} GB/s, {row.of_roofline:4.0%} of roofline, {row.times_cublas:.2f} x cuBLAS"
    )


if __name__ == "__main__":
    main()
