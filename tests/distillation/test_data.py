"""What was measured for lesson 12 is whole, was made by its scripts, and what the lesson says of it holds."""

import json
import math

import pytest

from lightlib.fetch import data_file
from lightlib.scores import t_interval
from lightlib.zoo import load_model
from tests.conftest import data_script


def read(name):
    return json.loads(data_file(f"{name}.json").read_text())


def of_seeds(found, part, name, key):
    """This figure of an arm, a seed each."""
    runs = [run for run in found["runs"] if (run["part"], run["name"]) == (part, name)]
    return [run[key] for run in sorted(runs, key=lambda run: run["seed"])]


def difference(found, part, key, one, other):
    """Bounds of the mean of one arm's figure less another's, seed by seed."""
    pairs = zip(of_seeds(found, part, one, key), of_seeds(found, part, other, key), strict=True)
    return t_interval([a - b for a, b in pairs])


@pytest.fixture(scope="module")
def scan():
    return read("distillation")


@pytest.fixture(scope="module")
def tricks():
    return read("minillm")


@pytest.mark.parametrize(
    ("name", "script"),
    [("distillation", "scan_distillation"), ("minillm", "ablate_minillm")],
)
def test_every_arm_was_trained_with_every_seed(name, script):
    found, made = read(name), data_script(script)
    assert found["settings"] == made.SETTINGS
    assert [{key: run[key] for key in made.plan()[0]} for run in found["runs"]] == made.plan()


# by which labels
def test_rates_were_tried_for_every_kind_and_none_is_best_at_the_end_of_the_range(scan):
    assert list(scan["rates"]) == list(data_script("scan_distillation").LABELS)
    for tries in scan["rates"].values():
        rates = [float(rate) for rate in tries]
        assert rates == scan["settings"]["rates"]
        assert float(min(tries, key=tries.get)) in rates[1:-1]


def test_soft_labels_beat_hard_ones_at_equal_steps_on_text_that_no_training_saw(scan):
    for name in ("soft", "half and half", "soft, and hidden states"):
        low, high = difference(scan, "labels", "nll", "hard", name)
        assert 0 < low < high


def test_the_cut_student_is_hurt_and_learns_and_stays_behind_its_teacher(scan):
    for name in scan["rates"]:
        assert scan["teacher"]["nll"] < min(of_seeds(scan, "labels", name, "nll"))
        assert max(of_seeds(scan, "labels", name, "nll")) < scan["cut"]["nll"] - 0.5


def test_reverse_kl_is_worse_on_peoples_text_and_better_in_what_it_writes(scan):
    assert difference(scan, "labels", "nll", "reverse KL", "soft")[0] > 0
    assert difference(scan, "writing", "teacher_nll", "reverse KL", "forward KL")[1] < 0


@pytest.mark.model
def test_what_needs_no_training_comes_out_again(scan):
    made, (teacher, tokenizer) = data_script("scan_distillation"), load_model("tiny")
    texts = made.Texts(tokenizer, made.SETTINGS)
    n, length = scan["settings"]["prompts"], scan["settings"]["prompt"] + scan["settings"]["new"]
    assert made.judged(texts.test[:n, :length], teacher) == pytest.approx(scan["people"], abs=2e-3)
    cut = made.fewer_layers(teacher, keep=scan["settings"]["keep"])
    known = {key: scan["cut"][key] for key in ("nll", "kl", "agreement")}
    assert made.fitted(cut, teacher, texts) == pytest.approx(known, abs=2e-3)
    assert scan["parameters"] == {"teacher": teacher.num_parameters(), "student": cut.num_parameters()}


# MiniLLM's tricks
def ends(tricks, name, key):
    return [run["curve"][-1][key] for run in tricks["runs"] if run["name"] == name]


def test_curves_have_every_point_and_all_arms_of_a_seed_begin_alike(tricks):
    marks = [0, *tricks["settings"]["watched"]]
    for run in tricks["runs"]:
        assert [point["step"] for point in run["curve"]] == marks
    for seed in tricks["settings"]["seeds"]:
        (start,) = {json.dumps(run["curve"][0]) for run in tricks["runs"] if run["seed"] == seed}
        assert json.loads(start)["reverse_kl"] > 1.2


def test_without_length_normalisation_lines_collapse_and_with_it_they_do_not(tricks):
    sums, means = ends(tricks, "sums for means", "length"), ends(tricks, "all three", "length")
    own = tricks["teacher"]["length"]
    assert max(sums) < 0.65 * own and min(means) > 0.85 * own


def test_the_exact_single_step_gets_nearer_to_the_teacher(tricks):
    sampled, exact = (ends(tricks, name, "reverse_kl") for name in ("single step sampled", "all three"))
    assert t_interval([a - b for a, b in zip(sampled, exact, strict=True)])[0] > 0


# recovery
def won_back(found, light, names):
    """Which share of the nll that was lost on these texts came back."""
    (run,) = (run for run in found["runs"] if run["light"] == light)
    before, after, dense = (
        sum(math.log(each[name]) for name in names) for each in (run["before"], run["after"], found["dense"])
    )
    return (before - after) / (before - dense)


def test_twenty_minutes_win_back_most_of_the_nll_and_less_where_there_is_little_text():
    found, script = read("distilled_recovery"), data_script("recover_distilled")
    assert found["settings"] == data_script("scanning").SETTINGS | script.RECOVERY
    assert [{key: run[key] for key in script.plan()[0]} for run in found["runs"]] == script.plan()
    for run in found["runs"]:
        first, last = run["points"][0], run["points"][-1]
        assert first["perplexity"] == pytest.approx(run["before"]["prose"], rel=1e-4)
        assert last["seconds"] <= 1.05 * 60 * found["settings"]["minutes"]
        assert last["perplexity"] < run["points"][2]["perplexity"] < first["perplexity"]
        assert won_back(found, run["light"], ["prose", "plays"]) > 0.5
        assert won_back(found, run["light"], ["prose"]) > 0.4
        assert won_back(found, run["light"], ["plays"]) > won_back(found, run["light"], ["prose"])
