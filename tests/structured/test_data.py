"""What was measured for structured pruning is whole, was made by its scripts, and agrees with itself."""

import json

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
