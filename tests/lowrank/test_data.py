"""What was measured for lesson 09 is whole, was made by its scripts, and agrees with itself."""

import json

import pytest

from lightlib.fetch import data_file
from lightlib.lowrank.ranks import rank_for, stored
from tests.scans import comes_out_again, is_the_whole_plan

SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))


def scan():
    return json.loads(data_file("low_rank.json").read_text())


def line(**wanted):
    """Points of low rank alone with these knobs and no other, by fraction."""
    alone = [p for p in scan()["points"] if [name for name, _ in p["steps"]] == ["svd"]]
    found = {p["steps"][0][1]["fraction"]: p for p in alone if without(p, "fraction") == wanted}
    return dict(sorted(found.items()))


def without(point, name):
    return {key: value for key, value in point["steps"][0][1].items() if key != name}


def point(*names, **knobs):
    """The one recipe of these methods whose knobs hold these."""
    found = [
        p for p in scan()["points"]
        if tuple(name for name, _ in p["steps"]) == names
        and knobs.items() <= {k: v for _, each in p["steps"] for k, v in each.items()}.items()
    ]  # fmt: skip
    assert len(found) == 1
    return found[0]


def test_the_scan_is_the_whole_plan():
    is_the_whole_plan("scan_low_rank", scan())


def test_bytes_are_those_that_the_ranks_leave():
    for pivot in (True, False):
        for fraction, p in line(**({} if pivot else {"pivot": False})).items():
            weights = 30 * sum(
                stored(s, rank_for(s, (1 - fraction) * s[0] * s[1], pivot), pivot) for s in SHAPES
            )
            order = 30 * 4 * sum(n for n, _ in SHAPES) if pivot else 0
            rest = 134_515_008 - 106_168_320
            assert p["stored_bytes"] == pytest.approx(
                2 * (weights + rest) + order, abs=300
            )  # and rotary frequencies


def test_errors_of_the_outputs_beat_those_of_norms_and_of_weights_at_every_fraction():
    weighed, norms, plain = (line(**knobs) for knobs in ({}, {"weighing": "norm"}, {"weighing": None}))
    assert len(norms) == len(plain) == 3
    for fraction in plain:
        found = [each[fraction]["perplexity"] for each in (weighed, norms, plain)]
        assert scan()["dense"]["perplexity"] < found[0] < found[1] < found[2]


def test_pivots_help_at_every_fraction_and_a_scan_of_the_layers_hardly_does_anything():
    plain, two, chosen = (line(**knobs) for knobs in ({}, {"pivot": False}, {"ranks": "sensitive"}))
    for fraction in two:
        assert plain[fraction]["perplexity"] < two[fraction]["perplexity"]
    assert list(chosen) == [0.2]
    assert chosen[0.2]["perplexity"] == pytest.approx(plain[0.2]["perplexity"], rel=0.05)
    assert chosen[0.2]["stored_bytes"] <= 1.001 * plain[0.2]["stored_bytes"]


def test_four_bits_after_low_rank_fail_and_with_pivots_worst():
    first = {"fraction": 0.1, "round_to": 64}
    pivots, two = (
        next(p for p in scan()["points"] if [n for n, _ in p["steps"]] == ["svd", "gptq"]
             and p["steps"][0][1] == knobs)
        for knobs in (first, first | {"pivot": False})
    )  # fmt: skip
    assert pivots["perplexity"] > 10 * two["perplexity"] > 10 * point("gptq", bits=4)["perplexity"]


def test_the_more_goes_the_worse():
    values = [p["perplexity"] for p in line().values()]
    assert values == sorted(values) and len(values) == 5


def test_at_equal_bytes_rounding_beats_low_rank():
    four = point("gptq", bits=4)
    for p in line().values():
        assert p["stored_bytes"] < four["stored_bytes"] or p["perplexity"] > four["perplexity"]


def test_more_rank_corrects_more():
    for names, knobs in ((("rtn", "correct"), {"bits": 3}), (("sparsegpt", "correct"), {"sparsity": 0.6})):
        found = [point(*names, **knobs, rank=rank) for rank in (8, 32)]
        alone = point(names[0], **knobs)
        assert alone["perplexity"] > found[0]["perplexity"] > found[1]["perplexity"]
        assert alone["stored_bytes"] < found[0]["stored_bytes"] < found[1]["stored_bytes"]


@pytest.mark.model
def test_a_rounded_point_comes_out_again():
    comes_out_again("scan_low_rank", point("rtn", bits=8), ("stored_bytes", "gflops_per_token"))


def test_recovery_brings_back_a_good_part_of_the_loss():
    found = json.loads(data_file("low_rank_recovery.json").read_text())
    for points in found["arms"].values():
        first, last = points[0]["perplexity"], points[-1]["perplexity"]
        assert found["dense"] < last < first - 0.4 * (first - found["dense"])
