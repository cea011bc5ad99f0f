"""`check(name, answer)`: right, or wrong and why with the next hint, or still to do. It never raises."""

from __future__ import annotations

import difflib
import html
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from lightlib.exercise_data import EXERCISES
from lightlib.exercise_data.exercise import Exercise

MARKS = {"ok": "[ok]", "wrong": "[not yet]", "todo": "[to do]"}
COLORS = {"ok": "#1a7f37", "wrong": "#b35900", "todo": "#57606a"}
_tries: Counter[str] = Counter()  # wrong answers so far: each one opens the next hint


@dataclass(frozen=True)
class Verdict:
    """What `check` says. `state` is "ok", "wrong" or "todo"; true only if "ok"."""

    state: str
    text: str

    def __bool__(self) -> bool:
        return self.state == "ok"

    def __repr__(self) -> str:
        return f"{MARKS[self.state]} {self.text}"

    def _repr_html_(self) -> str:
        style = f"border-left:4px solid {COLORS[self.state]};padding:.3em .8em;max-width:50em"
        return f"<div role='status' style='{style}'>{html.escape(repr(self))}</div>"


def check(name: str, answer=...) -> Verdict:
    """Judge `answer`, a number or a function, to the exercise `name`; `...` and None are not answers yet.

    >>> check("01.bits_per_weight", 4)
    [not yet] 01.bits_per_weight: that counts only the codes; the scales and zero points take room too. ...
    """
    if name not in EXERCISES:
        near = difflib.get_close_matches(str(name), EXERCISES, 1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        return Verdict("wrong", f"no exercise is called {name!r}.{meant} There are {', '.join(EXERCISES)}.")
    exercise = EXERCISES[name]
    if answer is ... or answer is None:
        return Verdict("todo", f"{name}: {exercise.task} Replace the ... and run this cell again.")
    try:
        state, text = judge(exercise, answer)
    except Exception as error:  # a strange object must not stop the lesson
        state, text = "wrong", f"the answer could not be read: {type(error).__name__}: {error}"
    if state == "wrong":
        text = f"{text} {next_hint(name, exercise)}".strip()
    return Verdict(state, f"{name}: {text}")


def judge(exercise: Exercise, answer) -> tuple[str, str]:
    """("ok" | "wrong" | "todo", why)."""
    if not callable(exercise.solution):
        if callable(answer):
            return "wrong", "this asks for a number, not for a function."
        why = compare(exercise, (), answer, exercise.solution)
        return ("wrong", why) if why else ("ok", "right.")
    if not callable(answer):
        return "wrong", "this asks for a function: give its name alone, without brackets behind it."
    for arguments in exercise.cases:
        called = f"({', '.join(map(short, arguments))})"
        try:
            got = answer(*map(own, arguments))
        except Exception as error:  # the learner's own error, told kindly
            return "wrong", f"calling it with {called} raised {type(error).__name__}: {error}."
        if got is ... or got is None:
            return "todo", f"{exercise.task} It still returns {got!r}."
        why = compare(exercise, arguments, got, exercise.solution(*arguments))
        if why:
            return "wrong", f"called with {called}, {why}"
    return "ok", f"right in all {len(exercise.cases)} cases."


def compare(exercise: Exercise, arguments: tuple, got, want) -> str:
    """What is wrong with `got`, or "" if it equals `want` within the exercise's tolerance."""
    right = as_tensor(want)
    try:
        mine = as_tensor(got)
    except (TypeError, ValueError, RuntimeError):
        return f"it gave {short(got)}, which is not a number or a tensor."
    fits = mine.shape == right.shape or mine.numel() == right.numel() == 1
    if fits and same(mine, right, exercise.rtol):
        return ""
    for slip, remark in exercise.slips:
        wrong = as_tensor(slip(*map(own, arguments)) if callable(slip) else slip)
        if same(mine, wrong, exercise.rtol):
            return remark
    if not fits:
        return f"it gave a tensor of shape {tuple(mine.shape)}; {tuple(right.shape)} is asked for."
    if mine.isnan().any():
        return f"it gave {short(got)}: not a number (nan)."
    if not arguments:  # one number: which way, but not the answer itself
        return f"{short(got)} is too {'small' if mine.item() < right.item() else 'large'}."
    return f"it gave {short(got)}, not {short(want)}."


def as_tensor(value) -> Tensor:
    return torch.as_tensor(value).detach().cpu().to(torch.float64)


def same(a: Tensor, b: Tensor, rtol: float) -> bool:
    """Equal within `rtol` of each entry, and a millionth of the largest."""
    if a.numel() != b.numel():
        return False
    return torch.allclose(a.flatten(), b.flatten(), rtol, 1e-6 * b.abs().max().item())


def own(argument):
    """A copy of a tensor, so that an answer that works in place spoils nothing."""
    return argument.clone() if isinstance(argument, Tensor) else argument


def short(value) -> str:
    """`value` on one line; of a long tensor only the shape."""
    if isinstance(value, Tensor):
        if value.numel() > 12:
            return f"a tensor of shape {tuple(value.shape)}"
        return str(value.double().round(decimals=5).tolist())
    if isinstance(value, float):
        return f"{value:.6g}"
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def next_hint(name: str, exercise: Exercise) -> str:
    hint = exercise.hints[min(_tries[name], len(exercise.hints) - 1)] if exercise.hints else ""
    _tries[name] += 1
    return f"Hint: {hint}" if hint else ""
