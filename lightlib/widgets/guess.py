"""Guess first: commit to an answer before the lesson computes it."""

from __future__ import annotations

import html
from collections.abc import Sequence

import ipywidgets as W

from lightlib.report import tidy


class Guess(W.VBox):
    """A question with `choices`, or with a number from `low` to `high`; `reveal` in a later cell answers it.

    >>> guess = Guess("How many bits does a byte have?", low=0, high=16)
    >>> guess.reveal(8)
    No guess yet: it is 8. Go back and guess first, then run this cell again.
    """

    def __init__(
        self, question: str, choices: Sequence[str] | None = None, *, low: float | None = None,
        high: float | None = None, unit: str = "",
    ):  # fmt: skip
        if (choices is None) == (low is None or high is None):
            raise ValueError("Guess: give either choices, or low and high")
        self.question, self.choices, self.unit = question, None if choices is None else list(choices), unit
        self.answer: str | float | None = None
        self._said = W.HTML("Not guessed yet.", layout=W.Layout(margin="0"))
        head = W.HTML(f"<b style='font-size:14px'>{html.escape(question)}</b>")
        row = self._choice() if self.choices else self._number(low, high)
        super().__init__([head, row, self._said])
        self.add_class("light-guess")

    def _choice(self) -> W.Widget:
        self.control = W.RadioButtons(options=self.choices, value=None, layout=W.Layout(width="auto"))
        self.control.observe(lambda change: self.commit(change["new"]), names="value")
        return self.control

    def _number(self, low: float, high: float) -> W.Widget:
        whole = isinstance(low, int) and isinstance(high, int)
        middle, layout = (low + high) / 2, W.Layout(width="420px")
        if whole:
            self.control = W.IntSlider(round(middle), low, high, layout=layout)
        else:
            self.control = W.FloatSlider(middle, min=low, max=high, step=(high - low) / 200, layout=layout)
        button = W.Button(
            description="This is my guess", button_style="primary", layout=W.Layout(width="160px")
        )
        button.on_click(lambda _: self.commit(self.control.value))
        return W.HBox([self.control, W.Label(self.unit), button], layout=W.Layout(align_items="center"))

    def commit(self, answer: str | float) -> Guess:
        """Guess from code, as the widget does. Raises ValueError for what is not on offer."""
        if self.choices and answer not in self.choices:
            raise ValueError(
                f"{answer!r} is not a choice; choose one of {', '.join(map(repr, self.choices))}"
            )
        self.answer = answer
        self._said.value = (
            f"Your guess: <b>{html.escape(self._with_unit(answer))}</b>. A later cell answers it."
        )
        return self

    def reveal(self, truth: str | float) -> Answer:
        """What is true beside what was guessed."""
        is_ = self._with_unit(truth)
        if self.answer is None:
            return Answer(f"No guess yet: it is {is_}. Go back and guess first, then run this cell again.")
        mine = self._with_unit(self.answer)
        if self.answer == truth:
            return Answer(f"You guessed {mine}: right.")
        if self.choices:
            return Answer(f"You guessed {mine}; it is {is_}.")
        return Answer(f"You guessed {mine}; it is {is_}. {closeness(float(self.answer), float(truth))}")

    def _with_unit(self, value) -> str:
        return f"{tidy(value)} {self.unit}".strip()

    def __repr__(self) -> str:
        asked = (
            " / ".join(self.choices)
            if self.choices
            else f"{self.control.min} to {self.control.max} {self.unit}"
        )
        answer = "no guess yet" if self.answer is None else self._with_unit(self.answer)
        return f"{self.question} [{asked.strip()}] {answer}"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        data = super()._repr_mimebundle_(**kwargs) or {}
        return {**data, "text/plain": repr(self), "text/html": f"<p>{html.escape(repr(self))}</p>"}


class Answer(str):
    """A sentence that a notebook shows without quotation marks."""

    def __repr__(self) -> str:
        return str(self)


def closeness(guess: float, truth: float) -> str:
    """How far off, as a factor where both have one sign, else as a difference."""
    if guess * truth <= 0:
        return f"Off by {tidy(abs(guess - truth))}."
    factor = max(guess / truth, truth / guess)
    side = "high" if abs(guess) > abs(truth) else "low"
    if factor < 1.1:
        return f"Within {100 * (factor - 1):.1f} %: very close."
    return f"Too {side} by a factor of {factor:.2f}: {'close' if factor < 1.5 else 'worth a second thought'}."
