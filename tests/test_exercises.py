"""Exercises: right answers pass, known slips are told apart, and nothing that a learner types raises."""

import pytest
import torch

from lightlib import exercises
from lightlib.exercises import EXERCISES, check

SLIPS = [(name, slip, remark) for name, e in EXERCISES.items() for slip, remark in e.slips]


@pytest.fixture(autouse=True)
def fresh_tries():
    exercises._tries.clear()


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_is_right(name):
    verdict = check(name, EXERCISES[name].solution)
    assert verdict and repr(verdict).startswith("[ok]")


@pytest.mark.parametrize("name", EXERCISES)
def test_an_untouched_exercise_is_to_do_and_says_what_is_asked(name):
    for empty in (..., None):
        verdict = check(name, empty)
        assert verdict.state == "todo" and EXERCISES[name].task in verdict.text and not verdict


@pytest.mark.parametrize(("name", "slip", "remark"), SLIPS)
def test_each_slip_is_wrong_and_gets_its_own_remark(name, slip, remark):
    verdict = check(name, slip)
    assert verdict.state == "wrong" and remark in verdict.text


def test_hints_come_one_after_the_other_and_the_last_one_stays():
    hints = EXERCISES["01.scale"].hints
    said = [check("01.scale", lambda W: 0.0).text for _ in range(3)]
    assert [hint in text for hint, text in zip((*hints, hints[-1]), said, strict=True)] == [True] * 3


def test_an_unknown_name_is_answered_with_the_known_ones():
    verdict = check("01.scael", 1)
    assert not verdict and "Did you mean '01.scale'?" in verdict.text and "00.kv_bytes" in verdict.text


def test_answers_may_be_arrays_lists_or_tensors():
    assert check("01.scale", lambda W: W.numpy().__abs__().max() / 127)
    assert check("01.quantize", lambda row, scale: (row / scale).round().clamp(-127, 127).to(torch.int8))
    assert check("01.dequantize", lambda q, s, z: ((q.float() - z) * s).tolist())
    assert check("01.bits_per_weight", torch.tensor(4.3125))


def broken(*_):
    raise KeyError("row")


@pytest.mark.parametrize(
    ("name", "answer", "says"),
    [
        ("01.scale", 0.04, "asks for a function"),
        ("01.bits_per_weight", lambda: 4.3125, "asks for a number"),
        ("01.bits_per_weight", "a lot", "not a number or a tensor"),
        ("01.bits_per_weight", float("nan"), "not a number (nan)"),
        ("01.bits_per_weight", 7, "too large"),
        ("01.bits_per_weight", object(), "not a number or a tensor"),
        ("01.quantize", broken, "raised KeyError"),
        ("01.quantize", lambda row: row, "raised TypeError"),
        ("01.quantize", lambda row, scale: row[:2], "(2,); (6,) is asked for"),
        ("01.dequantize", lambda q, s, z: (q.float() - z) * s * 1.01, "not [-1.75"),
    ],
)
def test_a_wrong_answer_is_told_what_is_wrong(name, answer, says):
    verdict = check(name, answer)
    assert verdict.state == "wrong" and says in verdict.text


def test_a_function_that_still_returns_nothing_is_to_do():
    assert check("01.scale", lambda W: None).state == "todo"
    assert check("01.scale", lambda W: ...).state == "todo"


def test_an_answer_that_works_in_place_spoils_no_other():
    assert not check("01.quantize", lambda row, scale: row.zero_())
    assert check("01.quantize", lambda row, scale: row.div_(scale).round_().clamp_(-127, 127))
    assert check("01.quantize", EXERCISES["01.quantize"].solution)


def test_the_verdict_shows_as_html_with_its_text_escaped():
    shown = check("01.bits_per_weight", "<b>")._repr_html_()
    assert "&lt;b&gt;" in shown and "<b>" not in shown and "[not yet]" in shown
