"""What a cubin holds, read with the tools that come with Triton: machine code, registers, stack."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from tempfile import NamedTemporaryFile

from lightlib.kernels import nvrtc


def no_compiler() -> str:
    """Why no .cu file can be compiled and read here, or ""."""
    if not importlib.util.find_spec("triton"):
        return "no tools that read machine code, which come with Triton"
    try:
        return "" if shutil.which("nvcc") else nvrtc.library() and ""
    except nvrtc.Unavailable:
        return "neither nvcc nor NVRTC to compile kernels with"


def compiled(source: Path, arch: str, **macros: int) -> bytes:
    """The cubin of a .cu file, by nvcc if it is there, or by NVRTC."""
    if not shutil.which("nvcc"):
        return nvrtc.compile_cubin(source, arch, macros)
    with NamedTemporaryFile(suffix=".cubin") as file:
        defined = [f"-D{name}={value}" for name, value in macros.items()]
        flags = [f"-arch={arch}", "-std=c++17", f"-I{source.parent}", "-include", str(nvrtc.PRELUDE)]
        command = ["nvcc", "-cubin", *flags, *defined, "-o", file.name, str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return Path(file.name).read_bytes()


def main_loop(cubin: bytes) -> list[str]:
    """The instructions of the loop in which most tensor products lie, or else of the longest one.

    A loop goes from where a branch leads back to, up to the branch. Raises ValueError for code without one.
    """
    code, labels, loops = [], {}, [[]]
    for line in said("nvdisasm", "-c", cubin=cubin).splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
            branch = re.search(r"\bBRA\b.*?(\.L_\w+)", instruction[1])
            # a label already seen lies before; a branch to itself only fills up the end of a kernel
            if branch and labels.get(branch[1], len(code)) < len(code) - 1:
                loops.append(code[labels[branch[1]] :])
    if loops == [[]]:
        raise ValueError("the code has no loop")
    return max(loops, key=lambda loop: (sum("MMA." in instruction for instruction in loop), len(loop)))


def opcodes(instructions: list[str]) -> list[str]:
    """Their names, without predicates and operands; what fills up space (NOP) left out."""
    names = [re.sub(r"^@\S+\s+", "", instruction).split()[0] for instruction in instructions]
    return [name for name in names if name != "NOP"]


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL and more: the registers of a thread, and bytes."""
    text = said("cuobjdump", "--dump-resource-usage", cubin=cubin)
    return {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", text)}


def said(tool: str, *flags: str, cubin: bytes) -> str:
    import triton

    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
        return subprocess.run([path, *flags, file.name], capture_output=True, text=True, check=True).stdout
