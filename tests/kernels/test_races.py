"""The kernels under ThreadSanitizer: no race as they are, and one as soon as a barrier is missing."""

import os
import shutil
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

from lightlib.kernels import host
from lightlib.kernels.sparse_matmul import bitmap, compact, csl
from lightlib.kernels.sparse_matmul.launch import HERE, bitmap_matmul, compact_matmul, csl_matmul
from tests.kernels.test_sparse_matmul import weight

RACE = 66


@cache
def sanitizer() -> str:
    """ThreadSanitizer's library, or "" where there is none that Python starts with."""
    if not host.compiler():
        return ""
    command = [host.compiler(), "-print-file-name=libtsan.so"]
    found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    watched = {**os.environ, "LD_PRELOAD": found}
    works = (
        Path(found).is_absolute() and not subprocess.run([sys.executable, "-c", ""], env=watched).returncode
    )
    return found if works else ""


pytestmark = pytest.mark.skipif(not sanitizer(), reason="no g++ with a ThreadSanitizer that works here")


def watched(folder: Path, sources: Path, source, name, grid, args, macros, *, shared_bytes) -> None:
    """`host.launch` of the kernel in `sources`, in a process that ThreadSanitizer watches."""
    library = host.build(sources / source.name, name, tuple(sorted(macros.items())), "thread")
    kinds = [-1 if isinstance(a, torch.Tensor) else a for a in args]
    halves = torch.bfloat16, torch.float16
    arrays = {
        f"array{i}": (a.view(torch.int16) if a.dtype in halves else a).numpy()
        for i, a in enumerate(args)
        if isinstance(a, torch.Tensor)
    }
    np.savez(folder / "args.npz", grid=grid, kinds=kinds, **arrays)
    script = Path(__file__).with_name("run_library.py")
    command = [sys.executable, str(script), str(library), str(folder / "args.npz"), str(shared_bytes)]
    watch = {"LD_PRELOAD": sanitizer(), "TSAN_OPTIONS": f"exitcode={RACE} history_size=7"}
    ended = subprocess.run(command, env={**os.environ, **watch}, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{ended.returncode}: {ended.stderr[:2000]}")


RUNGS = {
    "csl_v1": (csl, partial(csl_matmul, rung="csl_v1")),
    "csl_v2": (csl, partial(csl_matmul, rung="csl_v2")),
    "csl_v4": (csl, partial(csl_matmul, rung="csl_v4", splits=2)),
    "csl_v5": (compact, partial(compact_matmul, splits=2)),
    "bitmap": (bitmap, partial(bitmap_matmul, splits=2)),
}


def run(name: str, sources: Path, folder: Path, times: int = 1) -> None:
    layout, multiply = RUNGS[name]
    W, x = weight((128, 640), 0.7), torch.randn(8, 640).bfloat16()
    for _ in range(times):
        multiply(layout.encode(W), x, partial(watched, folder, sources))


@pytest.mark.parametrize("name", RUNGS)
def test_no_two_threads_are_at_one_place_at_once(name, tmp_path):
    run(name, HERE, tmp_path)


BARRIERS = [
    *[("csl_v1", "csl_v1.cu", i) for i in range(3)],
    *[("csl_v2", "csl_v2.cu", i) for i in range(3)],
    *[("csl_v4", "csl_pipeline.h", i) for i in range(3)],
    ("bitmap", "bitmap.cu", 0),
    ("bitmap", "tile.h", 1),
]
# it orders what blocks write for each other, and here they run one after the other
UNSEEN = {"tile.h": 1}


def test_no_barrier_is_forgotten_here():
    for file in {file for _, file, _ in BARRIERS}:
        there = (HERE / file).read_text().count("__syncthreads();")
        assert there == len({which for _, name, which in BARRIERS if name == file}) + UNSEEN.get(file, 0)


@pytest.mark.parametrize(("name", "file", "which"), BARRIERS)
def test_a_missing_barrier_is_found(name, file, which, tmp_path):
    sources = Path(shutil.copytree(HERE, tmp_path / "sources", ignore=shutil.ignore_patterns("*.py")))
    parts = (sources / file).read_text().split("__syncthreads();")
    parts[which : which + 2] = [parts[which] + parts[which + 1]]
    (sources / file).write_text("__syncthreads();".join(parts))
    with pytest.raises(RuntimeError, match=rf"(?s)^{RACE}: .*data race"):
        run(name, sources, tmp_path, times=4)  # the last few accesses are remembered, so it may need luck
