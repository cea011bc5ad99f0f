"""Run a .cu file on the CPU: the kernel itself, unchanged; cuda/host.h plays what it takes from the GPU.

For tests and for reading: a thread of the GPU is a thread of the CPU, so a block of 128 takes milliseconds.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from lightlib.kernels.nvrtc import included, kept, pointers

SHIM = Path(__file__).parent / "cuda"


def compiler() -> str:
    """The C++ compiler, or "" where there is none."""
    return shutil.which("g++") or ""


@lru_cache(maxsize=64)
def build(source: Path, name: str, macros: tuple[tuple[str, int], ...], sanitizer: str = "") -> Path:
    """`source` as a shared library whose `launch` runs the kernel `name`. Raises RuntimeError without g++."""
    if not compiler():
        raise RuntimeError("g++ is needed to run a kernel on the CPU")
    main = (
        f'#include "host.h"\n#include "{source}"\n'
        'extern "C" int launch(int x, int y, int z, int shared_bytes, void** args) '
        f"{{ return run_grid({name}, {{x, y, z}}, THREADS, shared_bytes, args); }}\n"
    )
    flags = [
        "-std=c++20",
        "-O1",
        "-g",
        "-shared",
        "-fPIC",
        "-pthread",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-fno-strict-aliasing",
        f"-I{SHIM}",
        f"-I{source.parent}",
    ]
    flags += [f"-D{key}={value}" for key, value in macros] + (
        [f"-fsanitize={sanitizer}"] if sanitizer else []
    )
    texts = [source.read_text(), *included(source).values(), (SHIM / "host.h").read_text()]

    def compile_library(file: Path) -> None:
        made = subprocess.run(
            [compiler(), *flags, "-x", "c++", "-", "-o", str(file)],
            input=main,
            capture_output=True,
            text=True,
        )
        if made.returncode:
            raise RuntimeError(f"{source.name} does not compile:\n{made.stderr}")

    return kept(name, ".so", [main, " ".join(flags), *texts], compile_library)


def launch(
    source: Path,
    name: str,
    grid: Sequence[int],
    args: Sequence[Tensor | int],
    macros: Mapping[str, int],
    *,
    shared_bytes: int = 0,
    sanitizer: str = "",
) -> None:
    """Run the kernel over `grid` on CPU tensors and whole numbers.

    Raises RuntimeError where a block writes to shared memory that it has not asked for.
    """
    library = ctypes.CDLL(str(build(source, name, tuple(sorted(macros.items())), sanitizer)))
    if library.launch(*grid, shared_bytes, pointers(args)):
        raise RuntimeError(f"{name} writes beyond the {shared_bytes} bytes of shared memory that it has")
