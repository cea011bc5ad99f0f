"""Lesson 01 in a real browser: JupyterLab opens it, runs it, and a slider moved by keyboard redraws."""

import importlib.util
from pathlib import Path

import pytest

from tests.labdriver import CHROMIUM, browser_page, lab, open_notebook, reveal, run_all, stripped_copy

LESSON = Path(__file__).parents[1] / "lessons" / "01_numbers.ipynb"
WITH_SLIDER = ".light-explorer:has(.noUi-handle)"

missing = [
    reason
    for reason, absent in (
        (
            f"no Chromium at {CHROMIUM}: install it (Debian: chromium) or set CHROMIUM",
            not Path(CHROMIUM).exists(),
        ),
        ("no playwright: pip install -e '.[test]'", importlib.util.find_spec("playwright") is None),
        ("no jupyterlab: pip install -e '.[lab]'", importlib.util.find_spec("jupyterlab") is None),
        (f"no lesson {LESSON.name}", not LESSON.exists()),
    )
    if absent
]
pytestmark = [pytest.mark.alone, pytest.mark.skipif(bool(missing), reason="; ".join(missing))]


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    """The page with the lesson open and every cell run."""
    root = tmp_path_factory.mktemp("lab")
    stripped_copy(LESSON, root)
    with lab(root) as address, browser_page() as page:
        open_notebook(page, address, "live.ipynb")
        run_all(page)
        reveal(page, WITH_SLIDER).first.wait_for()
        yield page


def test_a_slider_moved_by_keyboard_changes_the_figure_and_the_numbers(lesson):
    explorer = lesson.locator(WITH_SLIDER).first
    explorer.scroll_into_view_if_needed()
    numbers, picture = explorer.locator(".light-numbers"), explorer.locator("img")
    assert picture.evaluate("i => i.naturalWidth") > 400
    text, source, handle = (
        numbers.inner_text(),
        picture.get_attribute("src"),
        explorer.locator(".noUi-handle").first,
    )
    before = handle.get_attribute("aria-valuenow")
    handle.focus()
    lesson.keyboard.press("ArrowRight")
    if handle.get_attribute("aria-valuenow") == before:  # it stood at its right end
        lesson.keyboard.press("ArrowLeft")
    explorer.page.wait_for_function(
        "([box, text, source]) => box.querySelector('.light-numbers').innerText !== text"
        " && box.querySelector('img').src !== source",
        arg=[explorer.element_handle(), text, source],
    )
    assert explorer.locator("[role=alert]").count() == 0


def test_every_explorer_shows_its_controls_numbers_and_picture(lesson):
    explorers = reveal(lesson, ".light-explorer").all()
    assert explorers
    for explorer in explorers:
        explorer.scroll_into_view_if_needed()
        assert explorer.locator(".light-numbers").inner_text().strip()
        for picture in explorer.locator("img").all():
            assert picture.evaluate("i => i.complete && i.naturalWidth") > 400
        cut = explorer.locator(".widget-label").evaluate_all(
            "ls => ls.filter(l => l.scrollWidth > l.clientWidth + 1)"
        )
        assert not cut, "a control's description is cut off"


def test_the_console_has_no_error(lesson):
    assert lesson.errors == []
