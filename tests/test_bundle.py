"""The offline bundle: parts are made, joined and checked; nothing is downloaded here."""

import json
import zipfile

import pytest

from lightlib.data.install_bundle import install, join
from lightlib.data.make_bundle import LEFT_OUT, PRESENT, TREE, closure, pins, split, stored


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "archive"
    path.write_bytes(bytes(range(256)) * 4)
    return path


@pytest.fixture
def parts(tmp_path, archive):
    folder = tmp_path / "bundle"
    folder.mkdir()
    split(archive, folder, limit=400)
    return folder


def test_parts_are_equal_and_within_the_limit(parts):
    assert [part.stat().st_size for part in sorted(parts.glob("part-*"))] == [342, 342, 340]


@pytest.mark.parametrize("limit", [1, 1000, 1024, 10**6])
def test_joined_parts_are_the_archive(tmp_path, archive, limit):
    split(archive, tmp_path, limit)
    assert join(tmp_path).read_bytes() == archive.read_bytes()


def test_a_damaged_part_is_named(parts):
    content = bytearray((parts / "part-2-of-3").read_bytes())
    content[100] ^= 1
    (parts / "part-2-of-3").write_bytes(content)
    with pytest.raises(ValueError, match="part-2-of-3 is damaged"):
        join(parts)


def test_a_part_cut_short_is_named(parts):
    content = (parts / "part-3-of-3").read_bytes()
    (parts / "part-3-of-3").write_bytes(content[:-1])
    with pytest.raises(ValueError, match="part-3-of-3 is damaged"):
        join(parts)


def test_a_missing_part_is_named(parts):
    (parts / "part-1-of-3").unlink()
    with pytest.raises(ValueError, match="part-1-of-3 is missing"):
        join(parts)


def test_a_manifest_of_another_bundle_is_refused(parts):
    manifest = json.loads((parts / "manifest.json").read_text())
    (parts / "manifest.json").write_text(json.dumps(manifest | {"sha256": "0" * 64}))
    with pytest.raises(ValueError, match="copy the parts and the manifest again"):
        join(parts)


def test_a_stored_wheel_holds_the_same_files_uncompressed(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("a/__init__.py", "x = 1\n" * 1000)
    (tmp_path / "b.whl").write_bytes(stored(tmp_path / "a.whl"))
    with zipfile.ZipFile(tmp_path / "a.whl") as old, zipfile.ZipFile(tmp_path / "b.whl") as new:
        assert new.read("a/__init__.py") == old.read("a/__init__.py")
        assert new.infolist()[0].compress_type == zipfile.ZIP_STORED


def test_every_bundled_package_is_pinned():
    versions = pins((TREE / "constraints.txt").read_text())
    assert [name for name in closure() if name not in versions] == []


def test_the_bundle_holds_what_runs_lessons_and_nothing_that_is_there():
    bundled = set(closure())
    assert {"nbval", "ipykernel", "ipywidgets", "pennylane", "gguf", "traitlets", "pyzmq"} <= bundled
    assert not bundled & (PRESENT | LEFT_OUT)


def test_the_installed_tree_is_one_package(tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    for name in ("lightlib/__init__.py", "data/sources.toml", "kernels/harness.py"):
        (tree / name).parent.mkdir(parents=True)
        (tree / name).touch()
    (tree / "pyproject.toml").write_bytes((TREE / "pyproject.toml").read_bytes())
    monkeypatch.setattr("subprocess.run", lambda *_, **__: None)
    environment = install(tmp_path)
    install(tmp_path)  # twice is harmless
    assert (tree / "lightlib" / "data" / "sources.toml").is_file()
    assert (tree / "lightlib" / "kernels" / "harness.py").is_file()
    assert environment["PYTHONPATH"].startswith(str(tree))
    assert environment["LIGHTLIB_DATA"] == str(tmp_path / "files")
