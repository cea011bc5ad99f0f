"""What makes a fresh machine work: pins, the conda file, the Makefile's sentences, no machine's address."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lightlib.data.make_bundle import pins

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = pins((ROOT / "constraints.txt").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"].values()
NEEDS = [Requirement(line) for lines in (PROJECT["project"]["dependencies"], *EXTRAS) for line in lines]
MACHINE = re.compile(r"(?<![\w.~$-])/(?:home|root|work|opt|Users)/\w+")
REGISTRY = re.compile(
    r"pypi[.](?:org|io)|python[h]osted[.]org|anaconda[.](?:org|com)|pytorch[.]org/whl|npmjs[.]"
)


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("need", NEEDS, ids=str)
def test_a_direct_dependency_is_pinned_within_its_range(need):
    assert PINS[canonicalize_name(need.name)] in need.specifier


def test_no_pin_belongs_to_one_kind_of_machine():
    assert [version for version in PINS.values() if "+" in version] == []
    assert "lightlib" not in PINS


def test_conda_installs_the_same_environment():
    lines = [line.strip(" -") for line in (ROOT / "environment.yml").read_text().splitlines()]
    python = next(line for line in lines if line.startswith("python="))
    assert python.removeprefix("python=") in PROJECT["project"]["requires-python"]
    # torch by itself, before what merely needs some torch
    assert f"torch=={PINS['torch']}" in lines
    assert (
        lines.index("c constraints.txt")
        < lines.index(f"torch=={PINS['torch']}")
        < lines.index("e .[lab,test]")
    )


def test_every_file_of_the_library_is_distributed():
    folders = PROJECT["tool"]["setuptools"]["package-dir"]
    places = {
        folders.get(name, name.replace(".", "/")): name for name in PROJECT["tool"]["setuptools"]["packages"]
    }
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    missing = []
    for path in (path.relative_to(ROOT) for path in tracked()):
        owner = next((str(p) for p in path.parents if str(p) in places), None)
        if owner and not (path.suffix == ".py" and str(path.parent) == owner):
            inner = str(path.relative_to(owner))
            missing += [str(path)] * (not any(fnmatch(inner, p) for p in patterns.get(places[owner], [])))
    assert missing == []


def test_no_registry_and_no_path_of_a_machine_is_named():
    found = []
    for path in tracked():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        if "\0" not in text:
            found += [
                f"{path.relative_to(ROOT)}: {hit[0]}"
                for hit in [*MACHINE.finditer(text), *REGISTRY.finditer(text)]
            ]
    assert found == []


@pytest.fixture
def make(tmp_path):
    """Run make in a copy of the set-up, with variables and an environment of its own; its result."""
    if not shutil.which("make"):
        pytest.skip("there is no make")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    own = (
        "PIP_",
        "MAKE",
        "MFLAGS",
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(own)}

    def run(*words, **variables):
        environment = clean | {"PIP_CONFIG_FILE": os.devnull} | variables
        return subprocess.run(
            ["make", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )

    return run


def test_a_silent_index_is_answered_with_one_sentence(make):
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        index = f"http://127.0.0.1:{closed.getsockname()[1]}/simple"
        done = make("lab", f"PY={sys.executable}", PIP_INDEX_URL=index)
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode != 0
    assert len(said) == 1
    assert said[0].startswith("Missing: ") and "PIP_INDEX_URL" in said[0] and said[0].count(". ") == 0


def test_another_python_is_answered_with_one_sentence(make, tmp_path):
    old = tmp_path / "python3.10"
    pretend = "import sys; sys.version_info = (3, 10, 2); exec(sys.argv[2])"
    old.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{pretend}' \"$@\"\n")
    old.chmod(0o755)
    done = make("lab", f"PY={old}")
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode != 0
    assert len(said) == 1 and said[0].startswith("Python 3.11, 3.12 or 3.13 is needed")


def test_nothing_is_installed_twice(make, tmp_path):
    for stamp in (".ready", ".fetched"):
        (tmp_path / ".venv").mkdir(exist_ok=True)
        (tmp_path / ".venv" / stamp).touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sources.toml").touch()
    os.utime(tmp_path / "data" / "sources.toml", (0, 0))
    words = make("--dry-run", "lab", "LAB_ARGS=--no-browser").stdout
    assert "pip" not in words and "--no-browser" in words
