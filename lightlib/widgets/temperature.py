"""Temperature: what a teacher says beside its first word, and how large a gradient that gives a student.

Hinton, Vinyals and Dean 2015, arXiv:1503.02531
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import ipywidgets as W
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightlib.machine import one_thread
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.style import BLUE, GREY, ORANGE, VERMILION, bar_rows, panels

TEMPERATURES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
MARKED = (0.25, 1.0, 4.0, 16.0)  # on the axis
POWERS = 6  # of ten that the gradient's axis has at most
WORDS = 10
LONGEST = 14  # letters of a word


def entropy_bits(logits: Tensor, temperature: float) -> float:
    """Of softmax(logits / temperature), logits (V): from 0, one certain word, to log2 V."""
    log_p = (logits.double() / temperature).log_softmax(-1)
    return -torch.xlogy(log_p.exp(), log_p.exp()).sum().item() / math.log(2)


def gradient_size(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """|| d KL(p || q) / d student logits || of both softmaxes at `temperature`, all (V): ||q - p|| / T."""
    q, p = ((logits.double() / temperature).softmax(-1) for logits in (student, teacher))
    return (q - p).norm().item() / temperature


class Position:
    """One place of a text: the logits (V) of a teacher and of a student, and what of them stays the same."""

    def __init__(self, teacher: Tensor, student: Tensor, word: Callable[[int], str]):
        self.teacher, self.student = (t.detach().double().cpu() for t in (teacher, student))
        self.top = self.teacher.topk(WORDS).indices
        self.words = [shorter(word(int(i))) for i in self.top]
        self.sizes = [gradient_size(self.student, self.teacher, T) for T in TEMPERATURES]

    def at(self, T: float) -> dict:
        """What the explorer shows of one temperature."""
        p, q = ((logits / T).softmax(-1)[self.top] for logits in (self.teacher, self.student))
        size = self.sizes[TEMPERATURES.index(T)]
        ratio, at_one = (
            (self.teacher[self.top[1]] - self.teacher[self.top[-1]]).div(t).exp() for t in (T, 1)
        )
        sure = (self.teacher[self.top[0]] - self.teacher[self.top[1]]).div(T).exp()
        return {
            "entropy_bits": entropy_bits(self.teacher, T),
            "second_over_tenth": ratio.item(),
            "first_ten_words_share": p.sum().item(),
            "gradient": size,
            "gradient_times_T2": size * T * T,
            "says": f"At T = {T:g} {self.words[0]!r} is {sure:,.3g} times as likely as {self.words[1]!r}, "
            f"and that one {ratio:,.3g} times as likely as {self.words[-1]!r}; at T = 1 these last two stood "
            f"{at_one:,.3g} to 1.",
            "words": self.words,
            "teacher": p,
            "student": q,
            "sizes": self.sizes,
            "at": [T],
        }


def shorter(word: str) -> str:
    """A token as it reads in a list, its blank and line ends shown.

    >>> shorter(" the")
    '␣the'
    """
    word = word.replace("\n", "↵").replace(" ", "␣").replace("$", r"\$")
    return word if len(word) <= LONGEST else word[: LONGEST - 1] + "…"


def draw(fig: Figure, result: dict) -> None:
    """The ten likeliest words, the student's share as a mark; the gradient's size over the temperature."""
    left, right = panels(fig, (1.25, 1), (1.35, 1.0), right=0.2, top=0.4, bottom=0.6)
    p, q, (T,) = result["teacher"].tolist(), result["student"].tolist(), result["at"]
    bar_rows(left, result["words"], p, [""] * WORDS, [BLUE, *[ORANGE] * (WORDS - 1)], room=1.4)
    reach = left.get_xlim()[1]
    for row, share in enumerate(p):  # in a column of their own: a diamond may stand anywhere left of it
        left.text(reach, row, f"{100 * share:.2g} %", ha="right", va="center", fontsize=10)
    left.plot(
        [min(share, 0.82 * reach) for share in q], range(WORDS), "D", color=VERMILION, ms=5, mec="white"
    )
    left.set_title(f"teacher at T = {T:g} (diamond: student)")
    # logarithms on plain axes: they are drawn in a third of the time
    scaled = [size * t * t for size, t in zip(result["sizes"], TEMPERATURES, strict=True)]
    high = math.ceil(np.log10(max(result["sizes"] + scaled)))
    low = max(math.floor(np.log10(max(min(result["sizes"]), 1e-300))), high - POWERS)
    places, at = np.log10(TEMPERATURES), TEMPERATURES.index(T)
    for values, color, name in ((result["sizes"], GREY, "as it is"), (scaled, VERMILION, "times T²")):
        powers = np.log10(np.maximum(values, 10.0**low))
        right.plot(places, powers, color=color, label=name)
        right.plot(places[at], powers[at], "o", ms=8, color=color, mec="white")
    right.set_yticks(range(low, high + 1), [f"{10.0**e:g}" for e in range(low, high + 1)])
    right.set_xticks(np.log10(MARKED), [f"{t:g}" for t in MARKED])
    right.set(ylim=(low - 0.1, high + 0.1), xlabel="temperature", title="size of the gradient")
    right.legend(loc="lower left")


def temperature(
    positions: Mapping[str, tuple[Tensor, Tensor]], word: Callable[[int], str], **options
) -> Explorer:
    """Explore softmaxes of {text: (teacher's, student's logits (V) of its next token)} over the temperature.

    word: what an index of the vocabulary reads, as tokenizer.decode. Raises ValueError for logits that do
    not fit or are the same.
    """
    check(positions)
    with one_thread():
        found = {text: Position(*pair, word) for text, pair in positions.items()}

    def compute(position, T):
        with one_thread():
            return found[position].at(T)

    return Explorer(
        compute, draw, name="temperature", size=(8.6, 3.5), **options,
        position=W.Dropdown(options=list(found), description="text"),
        T=W.SelectionSlider(options=TEMPERATURES, value=1.0, description="temperature"),
    )  # fmt: skip


def check(positions: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    if not positions:
        raise ValueError("temperature: give {text: (teacher's logits, student's logits)}")
    for text, (teacher, student) in positions.items():
        shapes = tuple(teacher.shape), tuple(student.shape)
        if teacher.dim() != 1 or shapes[0] != shapes[1] or len(teacher) < WORDS:
            raise ValueError(
                f"temperature: {text!r} has logits {shapes[0]} and {shapes[1]}; give two of one vocabulary, "
                f"with {WORDS} words or more"
            )
        if torch.equal(teacher, student):
            raise ValueError(f"temperature: {text!r} has twice the same logits, so there is no gradient")
