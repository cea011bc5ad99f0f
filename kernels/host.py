"""Run a .cu file on the CPU: the kernel itself, unchanged; cuda/host.h plays what it takes from the GPU.

For tests and for reading: a thread of the GPU is a thread of the CPU, so a block of 128 takes milliseconds.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from lightlib.kernels.nvrtc import included

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
    texts = [
        main,
        " ".join(flags),
        source.read_text(),
        *included(source).values(),
        (SHIM / "host.h").read_text(),
    ]
    key = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / "lightlib_host"
    folder.mkdir(exist_ok=True)
    library = folder / f"{name}-{key}.so"
    if not library.exists():
        made = subprocess.run(
            [compiler(), *flags, "-x", "c++", "-", "-o", str(library)],
            input=main, capture_output=True, text=True,
        )  # fmt: skip
        if made.returncode:
            raise RuntimeError(f"{source.name} does not compile:\n{made.stderr}")
    return library


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
    values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a) for a in args]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    if library.launch(*grid, shared_bytes, pointers):
        raise RuntimeError(f"{name} writes beyond the {shared_bytes} bytes of shared memory that it has")
