"""Install lightlib from the bundle beside this file, without a network, then run its GPU tests and lessons.

`python install.py`, with the Python that has torch (manifest.json lists what must be there), joins and checks
the parts, installs into the folder `lightlib-bundle` and nowhere else, and runs all (`--no-run`: nothing).
The results of the lessons on this device are in lightlib-bundle/tree/lessons/validation/.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

ARCHIVE = "lightlib-bundle.tar.xz"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def join(folder: Path) -> Path:
    """Path of the archive made of the parts in `folder`; ValueError if one is missing or damaged."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for part in manifest["parts"]:
        path = folder / part["name"]
        if not path.is_file():
            raise ValueError(f"{path} is missing: copy it here from the machine that made the bundle")
        if path.stat().st_size != part["bytes"] or sha256(path) != part["sha256"]:
            raise ValueError(f"{path} is damaged: its sha256 is not that in manifest.json; copy it again")
    archive = folder / manifest["archive"]
    with open(archive, "wb") as whole:
        for part in manifest["parts"]:
            whole.write((folder / part["name"]).read_bytes())
    if sha256(archive) != manifest["sha256"]:
        raise ValueError(f"{archive} is not what manifest.json says; copy the parts and the manifest again")
    return archive


def install(root: Path) -> dict[str, str]:
    """Install the unpacked wheels into root/site, make the tree importable; the variables to use both."""
    site, tree = root / "site", root / "tree"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
    wheels = map(str, (root / "wheels").glob("*.whl"))
    subprocess.run([*pip, "--target", str(site), *wheels], check=True)
    project = tomllib.loads((tree / "pyproject.toml").read_text())
    for package, folder in project["tool"]["setuptools"]["package-dir"].items():
        link = tree / package.replace(".", "/")
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(tree / folder, link.parent))
    paths = [str(tree), str(site), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "LIGHTLIB_DATA": str(root / "files"),
        "LIGHTLIB_HOME": str(root / "home"),
        "HF_HUB_OFFLINE": "1",
    }


def run(root: Path, environment: dict[str, str]) -> list[str]:
    """Run the GPU tests and the lessons; the names of what failed."""
    steps = {
        "the GPU tests": ["-m", "pytest", "-m", "gpu", "tests"],
        "the lessons": ["lessons/validate.py"],
    }
    failed = []
    for name, command in steps.items():
        print(f"--- {name}", flush=True)
        done = subprocess.run([sys.executable, *command], cwd=root / "tree", env=os.environ | environment)
        # 5: pytest found no test of that kind
        if done.returncode not in (0, 5):
            failed.append(name)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-run", action="store_true", help="install, and run nothing")
    options = parser.parse_args()
    folder = Path(__file__).resolve().parent
    root = folder / "lightlib-bundle"
    try:
        archive = join(folder)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    with tarfile.open(archive) as packed:
        packed.extractall(root, filter="data")
    archive.unlink()
    environment = install(root)
    print(
        "Installed; to use it:", *(f"export {name}={value}" for name, value in environment.items()), sep="\n"
    )
    if not options.no_run and (failed := run(root, environment)):
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
