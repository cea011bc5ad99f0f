"""Morpheme strip: what you type in boxes, a morpheme each, and the words that share them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import ipywidgets as W
import matplotlib.colors
from matplotlib.figure import Figure

from lightlib.lowrank.embeddings import root_up
from lightlib.lowrank.morphemes import indexed
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.style import PALE, PALETTE, boxes

SIZE = (8.6, 3.35)  # inches
LETTER = 0.118  # inches that a letter of the strip takes
LINES, SHARED = 2, 6  # lines of boxes, morphemes that are explained
LONGEST = 24  # letters of a morpheme that are drawn
TALL = 0.56  # inches of a box
MATES = 5  # words that share a morpheme, named
TINTS = tuple(tuple(0.45 * part + 0.55 for part in matplotlib.colors.to_rgb(color)) for color in PALETTE[:-1])


class Box(NamedTuple):
    """A morpheme of what was typed: its place in the table, None if it is not there; does it start a word?"""

    morpheme: str
    index: int | None
    first: bool


def table_of(vocabulary: Mapping[str, Sequence[str]], order: int = 3) -> dict[str, int]:
    """{morpheme: its row in the table}, row 0 being the pad, in the order in which the vocabulary has them.

    >>> table_of({"teacher": ["teach", "er"], "reader": ["read", "er"]})
    {'': 0, 'teach': 1, 'er': 2, 'read': 3}
    """
    return {name: i for i, name in enumerate(indexed([*vocabulary.values()], order).names)}


def words_with(vocabulary: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """{morpheme: the words that hold it}, shortest first."""
    found: dict[str, list[str]] = {}
    for word in sorted(vocabulary, key=lambda w: (len(w), w)):
        for morpheme in dict.fromkeys(vocabulary[word]):
            found.setdefault(morpheme, []).append(word)
    return found


def words_in(text: str) -> list[str]:
    """What stands between blanks and marks, in lower case.

    >>> words_in("Don't, said Tom-Tom.")
    ["don't", 'said', 'tom-tom']
    """
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


def strip(
    words: Sequence[str], segment: Callable[[str], list[str]], table: Mapping[str, int], order: int
) -> list[Box]:
    """The boxes of words; where one has more than `order` morphemes, `indexed` joins the last."""
    cut = indexed([segment(word) for word in words], order)
    return [Box(m, table.get(m), i == 0) for word in range(len(words)) for i, m in enumerate(cut.of(word))]


def table_numbers(morphemes: int, width: int, order: int, rank: int) -> int:
    """Numbers that `MorphTE` learns: of each morpheme `rank` vectors as long as the order-th root of width.

    >>> table_numbers(5757, 512, order=3, rank=7)
    322392
    """
    return morphemes * rank * root_up(width, order)


def shortened(morpheme: str) -> str:
    """A morpheme that fits into a box.

    >>> shortened("a" * 40)
    'aaaaaaaaaaaaaaaaaaaaaaa…'
    """
    return morpheme if len(morpheme) <= LONGEST else f"{morpheme[: LONGEST - 1]}…"


def draw(fig: Figure, result: dict) -> None:
    """The strip, then a line for each of its morphemes that other words have too."""
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, SIZE[0]), ylim=(SIZE[1], 0))
    ax.axis("off")
    write = partial(ax.text, va="center", parse_math=False)
    known = dict.fromkeys(box.morpheme for box in result["boxes"] if box.index is not None)
    colors = {morpheme: TINTS[i % len(TINTS)] for i, morpheme in enumerate(known)}
    placed, low = lines_of(result["boxes"])
    areas = [((x, x + wide, y, y + TALL), colors.get(box.morpheme, PALE)) for box, x, y, wide in placed]
    for box, x, y, wide in placed:
        write(x + wide / 2, y + 0.2, shortened(box.morpheme), ha="center", fontsize=12)
        number = "new" if box.index is None else f"{box.index:,}"
        write(x + wide / 2, y + 0.43, number, ha="center", fontsize=9)
    if len(placed) < len(result["boxes"]):
        write(SIZE[0] - 0.3, low - 0.48, "…", fontsize=14)
    for i, (box, mates, more) in enumerate(result["shared"]):
        y = low + 0.28 * i
        areas.append(((0.15, 0.33, y, y + 0.18), colors[box.morpheme]))
        words = ", ".join(mates) + (f" and {more:,} more" if more else "")
        write(0.42, y + 0.09, f"{shortened(box.morpheme)}:  {words}", fontsize=10)
    if areas:
        boxes(ax, *zip(*areas, strict=True))


def lines_of(found: list[Box]) -> tuple[list[tuple[Box, float, float, float]], float]:
    """([(box, left, top, width)], the height below all), in inches; a gap before each word, LINES at most."""
    x, y, line, placed = 0.15, 0.15, 1, []
    for box in found:
        wide = max(0.42, LETTER * len(shortened(box.morpheme)) + 0.16)
        x += 0.16 if box.first and x > 0.15 else 0
        if x + wide > SIZE[0] - 0.5:
            if line == LINES:
                break
            x, y, line = 0.15, y + TALL + 0.14, line + 1
        placed.append((box, x, y, wide))
        x += wide + 0.03
    return placed, y + TALL + 0.2


def shared_by(found: list[Box], holders: Mapping[str, list[str]], own: set[str]) -> list[tuple]:
    """(box, words that have its morpheme, how many more) of each morpheme that other words have too."""
    listed = []
    for box in {box.morpheme: box for box in found}.values():
        mates = [word for word in holders.get(box.morpheme, ()) if word not in own]
        if mates:
            listed.append((box, mates[:MATES], max(0, len(mates) - MATES)))
    return listed


def count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def judge(found: list[Box], words: int, morphemes: int, numbers: int, rows: int, order: int) -> str:
    """How what was typed is made, and what the table takes against a row for each word."""
    own = {box.morpheme for box in found}
    new = sorted({box.morpheme for box in found if box.index is None})
    made = f"{count(len(found), 'box', 'boxes')}, {count(len(own), 'morpheme', 'different morphemes')}"
    made = made if found else "Type a word or a sentence"
    unknown = (
        f", not in the table: {', '.join(map(shortened, new[:4]))}{' ...' if len(new) > 4 else ''}"
        if new
        else ""
    )
    return (
        f"{made}{unknown}. {words:,} words are made of {morphemes:,} morphemes: their table takes "
        f"{numbers:,} numbers, a row for each word {rows:,}, {rows / numbers:.3g} times as many; which "
        f"morphemes make a word takes {words * order:,} indices more."
    )


def morpheme_strip(
    segment: Callable[[str], list[str]],
    vocabulary: Mapping[str, Sequence[str]],
    *,
    width: int = 512,
    order: int = 3,
    text: str = "The governments teach international teachers",
    **options,
) -> Explorer:
    """Type words and see the morphemes that `segment` finds in each, and who shares them in `vocabulary`.

    vocabulary: {word: its morphemes}. width: of an embedding; order: vectors that are multiplied to make one.
    """
    if not any(vocabulary.values()):
        raise ValueError("morpheme_strip: give a vocabulary {word: [morphemes]} that is not empty")
    table, holders = table_of(vocabulary, order), words_with(vocabulary)

    def compute(text, rank):
        typed = words_in(text)
        found = strip(typed, segment, table, order)
        numbers, rows = table_numbers(len(table), width, order, rank), len(vocabulary) * width
        shared = shared_by(found, holders, set(typed))
        return {
            "morphemes_typed": len(found),
            "words": len(vocabulary),
            "morphemes": len(table),
            "table_numbers": numbers,
            "rows_numbers": rows,
            "times_fewer": rows / numbers,
            "says": judge(found, len(vocabulary), len(table), numbers, rows, order),
            "boxes": found,
            "shared": shared[:SHARED],
        }

    return Explorer(
        compute, draw, name="morpheme_strip", size=SIZE, **options,
        text=W.Combobox(value=text, options=[text, *examples(vocabulary)], layout=W.Layout(width="560px")),
        rank=W.IntSlider(7, 1, 16),
    )  # fmt: skip


def examples(vocabulary: Mapping[str, Sequence[str]], count: int = 4) -> list[str]:
    """Words of the most morphemes, to choose from."""
    return sorted(vocabulary, key=lambda word: (-len(vocabulary[word]), word))[:count]
