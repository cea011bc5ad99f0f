"""A text screen: letters are drawn once each and then set in cells, in a tenth of matplotlib's time."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from lightlib.widgets.style import DPI, GREY, SKY, VERMILION, new_figure, styled

WIDE, HIGH = 8, 20  # pixels of a letter's cell
COLUMNS = 104
FONT, POINTS = "DejaVu Sans Mono", 10  # its letters are 8 pixels wide at 100 dots an inch
SIGNS = {"\n": "↵", "\t": "→", "\r": "←"}
KEPT, LOST, PAPER = np.array(to_rgb(SKY)), np.array(to_rgb(GREY)), np.ones(3)
LEAST = 0.15  # of the full colour, for a token that a single head holds


def readable(token: str) -> str:
    """A token in letters that the font has, all of it visible.

    >>> readable(" end\\n")
    ' end↵'
    """
    signs = "".join(SIGNS.get(letter, letter) for letter in token)
    known = font_manager.get_font(font_manager.findfont(FONT)).get_charmap()
    return "".join(s if ord(s) in known else "□" for s in signs) or "∅"


def places(texts: Sequence[str]) -> list[tuple[int, int]]:
    """(row, column) where each text begins, none broken over two rows.

    >>> places(["a" * 60, "b" * 60, "c"])
    [(0, 0), (1, 0), (1, 60)]
    """
    row, column, found = 0, 0, []
    for text in texts:
        if column + len(text) > COLUMNS:
            row, column = row + 1, 0
        found.append((row, column))
        column += len(text)
    return found


@functools.lru_cache(64)
def letters_of(alphabet: str) -> np.ndarray:
    """How much ink each pixel of each letter has, 0 to 1 (letters, HIGH, WIDE)."""
    n = len(alphabet)
    with styled():
        # every other cell stays empty: a W is wider than its own
        fig = new_figure((2 * n * WIDE / DPI, HIGH / DPI))
        for i, letter in enumerate(alphabet):
            fig.text(i / n, 6 / HIGH, letter, family=FONT, fontsize=POINTS, parse_math=False)
        canvas = FigureCanvasAgg(fig)
        canvas.draw()
    ink = 1 - np.asarray(canvas.buffer_rgba())[..., 0] / 255
    return ink.reshape(HIGH, n, 2 * WIDE).swapaxes(0, 1)[..., :WIDE]


class Page:
    """A text laid out: where its tokens lie, and its letters; coloured anew for each step."""

    def __init__(self, tokens: Sequence[str]):
        self.texts = [
            text[: COLUMNS - 1] + "…" if len(text) > COLUMNS else text for text in map(readable, tokens)
        ]
        self.places = places(self.texts)
        self.rows = self.places[-1][0] + 1
        alphabet = "".join(sorted({" ", *"".join(self.texts)}))
        self.letters = letters_of(alphabet)
        self.cells = np.full((self.rows, COLUMNS), alphabet.index(" "))
        self.owner = np.full((self.rows, COLUMNS), -1)
        for i, (text, (row, column)) in enumerate(zip(self.texts, self.places, strict=True)):
            self.cells[row, column : column + len(text)] = [alphabet.index(letter) for letter in text]
            self.owner[row, column : column + len(text)] = i

    def picture(self, share: np.ndarray, first: int) -> np.ndarray:
        """The text so far (HIGH x rows, WIDE x columns, 3): blue in caches, struck out where in none."""
        shown = (self.owner >= 0) & (self.owner < len(share))
        shares = np.where(shown, share[np.where(shown, self.owner, 0)], 0)[..., None]
        paper = PAPER + np.where(shares > 0, LEAST + (1 - LEAST) * shares, 0) * (KEPT - PAPER)
        lost = shown[..., None] & (shares == 0)
        ink = np.where(lost, LOST, 0.0)
        strength = self.letters[self.cells] * shown[..., None, None]  # (rows, columns, HIGH, WIDE)
        strength[lost[..., 0], HIGH // 2] = 1  # the stroke
        image = paper[:, :, None, None] + strength[..., None] * (ink - paper)[:, :, None, None]
        image[:, :, [0, -1]] = 1  # rows apart
        starts = np.diff(self.owner, axis=1, prepend=-1) != 0
        image[starts & shown, :, 0] = 1  # tokens apart
        begins = starts & shown & (self.owner == first)
        image[begins, 1:-1, :2] = to_rgb(VERMILION)
        return image.transpose(0, 2, 1, 3, 4).reshape(self.rows * HIGH, COLUMNS * WIDE, 3)

    def box(self, token: int) -> tuple[int, int, int]:
        """Pixels of a token's box: (left, below the top of the page, width)."""
        row, column = self.places[token]
        return column * WIDE, row * HIGH, len(self.texts[token]) * WIDE
