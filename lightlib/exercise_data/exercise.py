"""What an exercise is: a task, the right answer, slips that learners make, hints from gentle to plain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Answer = float | Callable


@dataclass(frozen=True)
class Exercise:
    """`solution` is a number, or a function that is compared on each of `cases` (its arguments).

    slips: (a wrong number or function, what to say to whoever gives it).
    """

    task: str
    solution: Answer
    cases: tuple[tuple, ...] = ()
    slips: tuple[tuple[Answer, str], ...] = ()
    hints: tuple[str, ...] = ()
    rtol: float = 1e-4
