"""The README's ten lines print what the README says they print."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
ROOT = Path(__file__).parents[1]


@pytest.mark.model
def test_the_ten_lines_print_what_they_say(tmp_path, monkeypatch):
    code, said = re.findall(r"```python\n(.*?)```\n```\n(.*?)```", README, re.S)[0]
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    numbers = re.compile(r"\d+(?:\.\d+)?")
    assert numbers.sub("#", printed.getvalue()) == numbers.sub("#", said)
    for now, then in zip(numbers.findall(printed.getvalue()), numbers.findall(said), strict=True):
        assert float(now) == pytest.approx(float(then), rel=5e-3)


def test_every_file_and_command_it_names_is_there():
    for name in re.findall(r"\]\((lessons/[^)]+)\)", README) + re.findall(
        r"`((?:lightlib|tests)/[\w/]+\.py)`", README
    ):
        assert (ROOT / name).is_file(), name
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)`", README):
        assert re.search(rf"(?m)^{target}:", makefile), target
