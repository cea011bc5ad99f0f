"""What was measured of shared heads is whole, was made by its script, and what lesson 14 says of it holds."""

import itertools
import json
import statistics

import pytest

from lightlib.fetch import data_file
from lightlib.zoo import load_model
from tests.conftest import data_script


@pytest.fixture(scope="module")
def found():
    return json.loads(data_file("shared_attention.json").read_text())


@pytest.fixture(scope="module")
def script():
    return data_script("scan_shared_attention")


def values(found, how, kv_heads, key="after"):
    """This figure of an arm, a seed each."""
    runs = [run for run in found["runs"] if (run["how"], run["kv_heads"]) == (how, kv_heads)]
    return [run[key] for run in sorted(runs, key=lambda run: run["seed"])]


def once(found, how, kv_heads, key="nll"):
    (row,) = (r for r in found["at_once"] if (r["how"], r["kv_heads"]) == (how, kv_heads))
    return row[key]


def test_every_arm_was_trained_with_every_seed(found, script):
    assert found["settings"] == script.SETTINGS
    assert [{key: run[key] for key in ("how", "kv_heads", "seed")} for run in found["runs"]] == script.plan()
    marks = [0, *script.SETTINGS["watched"], script.SETTINGS["steps"]]
    for run in found["runs"]:
        assert [step for step, _ in run["curve"]] == marks
        assert [run["before"], run["after"]] == [run["curve"][0][1], run["curve"][-1][1]]


def test_the_training_is_five_percent_of_the_models_own(found):
    card = json.loads(data_file("mha/card.json").read_text())
    assert found["settings"]["steps"] == 0.05 * card["steps"]
    assert found["tokens_a_step"] == card["batch"] * 256


def test_the_rate_is_the_best_of_those_tried(found):
    assert [float(rate) for rate in found["rates"]] == found["settings"]["rates"]
    assert found["rates"][str(found["rate"])] == min(found["rates"].values())


def test_parameters_and_cache_are_those_of_the_heads_that_are_left(found):
    for row in found["at_once"]:
        heads = row["kv_heads"]
        assert row["kv_bytes_per_token"] == 2 * 4 * heads * 16 * 4
        assert once(found, "mean", 8, "parameters") - row["parameters"] == 2 * 4 * (8 - heads) * 16 * 128


def test_with_all_heads_nothing_is_lost_and_the_control_starts_from_there(found, script):
    assert all(once(found, how, 8) == found["dense"] for how in script.HOWS)
    assert values(found, "control", 8, "before") == [found["dense"]] * 3


def test_the_fewer_heads_the_more_is_lost_at_once_and_aligned_heads_lose_least(found):
    for how in ("mean", "first", "aligned"):
        lost = [once(found, how, heads) for heads in (8, 4, 2, 1)]
        assert lost == sorted(lost), how
    for heads in (4, 2, 1):
        others = [once(found, how, heads) for how in ("mean", "first", "random")]
        assert once(found, "aligned", heads) < min(others)


def test_training_brings_most_of_it_back(found, script):
    for how, heads in script.TRAINED[1:]:
        for before, after in zip(values(found, how, heads, "before"), values(found, how, heads), strict=True):
            assert after - found["dense"] < 0.5 * (before - found["dense"]), (how, heads)


def test_after_training_fewer_heads_are_still_worse_than_as_much_training_with_all(found):
    arms = [values(found, "control", 8), *(values(found, "mean", heads) for heads in (4, 2, 1))]
    for more, fewer in itertools.pairwise(arms):
        assert statistics.mean(more) < statistics.mean(fewer)


def test_after_training_the_start_still_tells(found):
    arms = [values(found, how, 2) for how in ("aligned", "mean", "first", "random")]
    for better, worse in itertools.pairwise(arms):
        assert max(better) < min(worse)
    assert max(values(found, "control", 8)) < min(arms[0])
    # two heads that were turned together are about as good as four that were averaged; the seeds overlap
    assert statistics.mean(arms[0]) == pytest.approx(statistics.mean(values(found, "mean", 4)), abs=0.02)


def test_the_training_alone_does_the_model_with_all_heads_no_good(found):
    """At this rate, which suits what has much to repair: so losses are set beside the control's."""
    assert min(values(found, "control", 8)) > found["dense"]


def test_a_figure_comes_out_again(found, script):
    model, tokenizer = load_model("mha")
    texts = script.Texts(tokenizer, script.SETTINGS)
    for how in ("mean", "aligned"):
        kept = next(r for r in found["at_once"] if (r["how"], r["kv_heads"]) == (how, 2))
        again = script.at_once(model, texts, how, 2)
        assert again == kept | {"nll": pytest.approx(kept["nll"], abs=2e-3)}
