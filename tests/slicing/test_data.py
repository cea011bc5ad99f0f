"""What was measured for lesson 08 is whole, was made by its scripts, and agrees with the arithmetic."""

import json

import pytest

from lightlib.fetch import data_file
from tests.scans import is_the_whole_plan


def scan():
    return json.loads(data_file("slicing.json").read_text())


def test_the_scan_is_the_whole_plan():
    is_the_whole_plan("scan_slicing", scan())


def test_uncut_it_is_the_dense_model_and_the_more_is_cut_the_worse():
    found = scan()
    for rotations in ("sublayer", "block"):
        line = [p for p in found["points"] if (p["rotations"], p["shortcuts"]) == (rotations, "low_rank")]
        line.sort(key=lambda p: p["slice_fraction"])
        assert line[0]["perplexity"] == pytest.approx(found["dense"]["perplexity"], rel=1e-3)
        values = [p["perplexity"] for p in line]
        assert values == sorted(values)


def test_parameters_are_those_that_the_widths_leave():
    for p in scan()["points"]:
        kept = 576 if p["slice_fraction"] == 0 else int(576 * (1 - p["slice_fraction"])) // 8 * 8
        between = 59 if p["rotations"] == "sublayer" else 29
        cut = 576 - kept
        if p["shortcuts"] == "full":
            shortcuts = between * kept**2 + kept * 576
        else:  # to all directions, at the end, nothing is needed
            shortcuts = between * kept * (cut if 2 * cut < kept else kept)
        assert p["shortcut_parameters"] == shortcuts
        block = 106_168_320 // 30 // 576  # weights of a block for each direction of its stream
        blocks = 30 * block * kept + 1536 * (576 - kept)  # the last one writes what the head reads
        assert p["parameters"] == 49152 * (kept + 576) + blocks + shortcuts
        assert p["stored_bytes"] == pytest.approx(4 * p["parameters"], rel=1e-4)


def test_the_form_of_the_shortcuts_changes_bytes_and_not_what_the_model_says():
    def key(p):
        return p["slice_fraction"], p["rotations"]

    low, full = (
        {key(p): p for p in scan()["points"] if p["shortcuts"] == kind} for kind in ("low_rank", "full")
    )
    assert len(full) == 3
    for at, p in full.items():
        assert low[at]["perplexity"] == pytest.approx(p["perplexity"], rel=1e-4)
        assert low[at]["stored_bytes"] < p["stored_bytes"]


def test_recovery_brings_back_a_good_part_of_the_loss():
    found = json.loads(data_file("slicing_recovery.json").read_text())
    first, last = found["points"][0], found["points"][-1]
    assert last["seconds"] <= 600 and found["dense"] == pytest.approx(scan()["dense"]["perplexity"], rel=1e-4)
    assert (first["perplexity"] - last["perplexity"]) / (first["perplexity"] - found["dense"]) > 0.4
    assert [p["step"] for p in found["points"]] == sorted(p["step"] for p in found["points"])
