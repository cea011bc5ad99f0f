"""What was measured for structured pruning is whole, was made by its scripts, and agrees with itself."""

import json

import pytest

from lightlib.fetch import data_file
from tests.scans import is_the_whole_plan


def ablation():
    return json.loads(data_file("fisher_masks.json").read_text())


def test_the_ablation_is_the_whole_plan():
    is_the_whole_plan("ablate_fisher_masks", ablation())


def test_each_step_of_the_masks_was_measured_at_the_same_size_and_tuning_pays():
    found = ablation()
    for fraction in {p["fraction"] for p in found["points"]}:
        line = {
            (p["rearrange"], p["tune"], p["shrinkage"]): p
            for p in found["points"]
            if p["fraction"] == fraction
        }
        assert len({p["parameters"] for p in line.values()}) == 1
        for rearrange in (False, True):
            untuned, tuned = (line[rearrange, tune, None]["perplexity"] for tune in (False, True))
            assert found["dense"]["perplexity"] < tuned < untuned


def scan():
    return json.loads(data_file("structured.json").read_text())


def line(method, **knobs):
    """The scan's points of a method with these knobs alone, by fraction."""
    points = [p for p in scan()["points"] if p["method"] == method and p["knobs"] == knobs]
    return sorted(points, key=lambda p: p["fraction"])


def test_the_scan_is_the_whole_plan():
    is_the_whole_plan("scan_structured", scan())


def test_parameters_and_bytes_are_those_that_the_neurons_leave():
    for p in scan()["points"]:
        if p["method"] in ("cfsp", "llm_pruner") and p["knobs"].get("kinds") != ["channels"]:
            gone = 30 * 1536 - sum(p["neurons"])
            assert p["parameters"] == 134_515_008 - gone * 3 * 576
        if p["method"] == "drop_blocks":
            assert p["parameters"] == 134_515_008 - p["knobs"]["count"] * (106_168_320 // 30 + 2 * 576)
        assert p["stored_bytes"] == pytest.approx(4 * p["parameters"], rel=1e-4)


def test_the_more_goes_the_worse_and_the_faster():
    dense = scan()["dense"]["perplexity"]
    for points in (
        line("cfsp"),
        line("llm_pruner", kinds=["neurons"]),
        line("fisher_masks", kinds=["neurons"]),
    ):
        values = [dense, *(p["perplexity"] for p in points)]
        assert len(values) >= 4 and values == sorted(values)
    for first, next_ in (("ttft_ms", "dense_ttft_ms"), ("tpot_ms", "dense_tpot_ms")):
        gains = [p[next_] / p[first] for p in line("cfsp")]
        assert gains == sorted(gains) and gains[-1] > 1.15


def test_budgets_in_milliseconds_were_met_within_5_percent():
    points = [p for p in scan()["points"] if "share_of_ms" in p["knobs"]]
    assert len(points) == 4
    for p in points:
        # the dense model, timed before and after, says how much the machine itself changed
        drift = p["dense_ms_after"] / p["dense_ms"]
        assert p["ms"] / drift == pytest.approx(p["asked_ms"], rel=0.05)


def test_both_arms_of_the_recovery_learn_as_many_weights_and_regain_a_part():
    found = json.loads(data_file("pruned_recovery.json").read_text())
    assert found["dense"] == pytest.approx(scan()["dense"]["perplexity"], rel=1e-4)
    (same,) = [p for p in line("cfsp") if p["fraction"] == found["fraction"]]
    assert found["neurons"] == same["neurons"] and found["pruned"] == pytest.approx(
        same["perplexity"], rel=1e-4
    )
    assert len(set(found["ranks"]["equal"])) == 1 < len(set(found["ranks"]["by importance"]))
    weights = {
        name: sum(
            rank * (4 * 576 + 2 * (576 + 192) + 3 * (576 + neurons))
            for rank, neurons in zip(ranks, found["neurons"], strict=True)
        )
        for name, ranks in found["ranks"].items()
    }
    assert weights["by importance"] == pytest.approx(weights["equal"], rel=0.02)
    assert sorted((run["ranks"], run["seed"]) for run in found["runs"]) == [
        (name, seed) for name in ("by importance", "equal") for seed in (0, 1, 2)
    ]
    assert all(found["dense"] < run["perplexity"] < found["pruned"] for run in found["runs"])
