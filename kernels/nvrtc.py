"""Compile a .cu file when it is first needed and launch it on torch tensors: no toolkit, no build step.

The compiler is NVRTC, which torch's CUDA wheels bring; the kernels need no header but cuda/device.h.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import site
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

PRELUDE = Path(__file__).parent / "cuda" / "device.h"
SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Unavailable(RuntimeError):
    """NVRTC or the driver is not here; says which."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """NVRTC, from torch's wheels or the system. Raises Unavailable."""
    folders = [Path(p) / "nvidia" for p in (*site.getsitepackages(), *sys.path) if p]
    names = sorted({file for folder in folders for file in folder.glob("*/lib/libnvrtc.so.*")}, reverse=True)
    for builtins in {file for folder in folders for file in folder.glob("*/lib/libnvrtc-builtins.so.*")}:
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)  # NVRTC looks for it by name only
    for name in (*map(str, names), "libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise Unavailable("NVRTC was not found: torch's CUDA wheels bring it, the package nvidia-cuda-nvrtc too")


def version() -> str:
    """NVRTC's, such as 13.0."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def included(source: Path) -> dict[str, str]:
    """{name: text} of the headers beside `source` that it includes, and those that they include."""
    found, todo = {}, [source]
    while todo:
        for name in re.findall(r'#include "([^"]+)"', todo.pop().read_text()):
            if name not in found:
                found[name] = (source.parent / name).read_text()
                todo.append(source.parent / name)
    return found


def compile_cubin(source: Path, arch: str, macros: Mapping[str, int]) -> bytes:
    """Machine code of `source` for `arch` ("sm_90"). Raises RuntimeError with the compiler's words."""
    nvrtc, headers = library(), included(source)
    text = f"{PRELUDE.read_text()}\n{source.read_text()}".encode()
    flags = [f"--gpu-architecture={arch}", "-std=c++17", "-default-device"]
    flags += [f"-D{key}={value}" for key, value in sorted(macros.items())]
    strings = ctypes.c_char_p * len(headers)
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), text, source.name.encode(), len(headers),
        strings(*(h.encode() for h in headers.values())), strings(*(name.encode() for name in headers)),
    )  # fmt: skip
    try:
        options = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        if nvrtc.nvrtcCompileProgram(program, len(flags), options):
            raise RuntimeError(f"{source.name} does not compile for {arch}:\n{_said(nvrtc, program)}")
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _said(nvrtc: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    return log.value.decode()


def kept(name: str, suffix: str, depends_on: Sequence[str], make: Callable[[Path], None]) -> Path:
    """A file in the cache, which `make` writes where it is not there yet; whole or not at all."""
    key = hashlib.sha256("\0".join(depends_on).encode()).hexdigest()[:24]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightlib"
    file = Path(os.environ.get("LIGHTLIB_HOME") or cache) / "kernels" / f"{name}-{key}{suffix}"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}")
        make(new)
        new.replace(file)
    return file


def cached_cubin(source: Path, arch: str, macros: Mapping[str, int]) -> bytes:
    """`compile_cubin`, kept on disk by everything that it depends on."""
    texts = [PRELUDE.read_text(), source.read_text(), *included(source).values()]
    depends_on = [*texts, version(), arch, repr(sorted(macros.items()))]
    return kept(
        source.stem, ".cubin", depends_on, lambda file: file.write_bytes(compile_cubin(source, arch, macros))
    ).read_bytes()


def pointers(args: Sequence[Tensor | int]) -> ctypes.Array:
    """What both launchers take: where each argument lies, a tensor's address or a whole number of 32 bits."""
    values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a) for a in args]
    found = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    found.values = values  # they must live as long as the pointers to them
    return found


@lru_cache(maxsize=1)
def driver() -> ctypes.CDLL:
    """CUDA's driver. Raises Unavailable."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Unavailable(f"the CUDA driver was not found: {error}") from None


def call(name: str, *args) -> None:
    """A function of the driver; RuntimeError with its name and reason if it fails."""
    if code := getattr(driver(), name)(*args):
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()}")


@lru_cache(maxsize=256)
def function(source: Path, name: str, macros: tuple[tuple[str, int], ...], device: int) -> ctypes.c_void_p:
    """The kernel `name` of `source`, loaded on `device`."""
    major, minor = torch.cuda.get_device_capability(device)
    cubin = cached_cubin(source, f"sm_{major}{minor}", dict(macros))
    module, found = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # makes the context that the module is loaded into
        call("cuModuleLoadData", ctypes.byref(module), cubin)
        call("cuModuleGetFunction", ctypes.byref(found), module, name.encode())
    return found


def launch(
    source: Path,
    name: str,
    grid: Sequence[int],
    args: Sequence[Tensor | int],
    macros: Mapping[str, int],
    *,
    threads: int = 128,
    shared_bytes: int = 0,
) -> None:
    """Run the kernel over `grid` on torch's current stream, on CUDA tensors and whole numbers (32 bits)."""
    device = next(a.device.index for a in args if isinstance(a, Tensor))
    kernel = function(source, name, tuple(sorted(macros.items())), device)
    if shared_bytes > 48 * 1024:
        call("cuFuncSetAttribute", kernel, SHARED_BYTES, shared_bytes)
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    call("cuLaunchKernel", kernel, *grid, threads, 1, 1, shared_bytes, stream, pointers(args), None)
