"""What was measured of the generators of faces is whole, was made by its script, and what is said holds."""

import json
import math
import statistics

import pytest

from lightlib.fetch import data_file
from lightlib.quantum.baselines import count
from lightlib.quantum.generator import build
from lightlib.scores import t_quantile
from tests.conftest import data_script


@pytest.fixture(scope="module")
def found():
    return json.loads(data_file("faces.json").read_text())


@pytest.fixture(scope="module")
def script():
    return data_script("scan_faces")


def values(found, arm, key):
    return [row[key] for row in found["rows"] if row["arm"] == arm]


def mean(found, arm, key):
    return statistics.mean(values(found, arm, key))


def apart(found, one, other, key):
    """Interval of how much more of it one arm has than the other; the seeds of two arms are no pairs."""
    a, b = values(found, one, key), values(found, other, key)
    error = math.sqrt((statistics.variance(a) + statistics.variance(b)) / len(a))
    half, middle = t_quantile(0.975, len(a) - 1) * error, statistics.mean(a) - statistics.mean(b)
    return middle - half, middle + half


def test_the_whole_plan_was_measured(found, script):
    assert found["settings"] == script.SETTINGS
    for name, points in (("tried", script.tries()), ("rows", script.plan())):
        assert [{key: row[key] for key in points[0]} for row in found[name]] == points
    assert len(script.plan()) == len(script.ARMS) * 5


def test_every_arm_has_the_best_knob_and_rate_of_its_own(found, script):
    for row in found["rows"]:
        front, knobs = script.ARMS[row["arm"]]
        own = [t for t in found["tried"] if t["front"] == front and t["knob"] in knobs]
        (taken,) = (t for t in own if (t["knob"], t["rate"]) == (row["knob"], row["rate"]))
        assert row["front"] == front and taken["psnr"] == max(t["psnr"] for t in own)


def test_all_decoders_are_of_one_size(found):
    for row in found["rows"]:
        assert abs(row["parameters"] / found["settings"]["parameters"] - 1) < 0.02
        again = build(row["front"], **{key: found["settings"][key] for key in ("parameters", "length")})
        assert count(again) == row["parameters"]


def test_the_kept_pictures_are_faces_of_625_gray_values(found, script):
    assert [kept["arm"] for kept in found["pictures"]] == ["eigenfaces", *script.ARMS]
    for kept in found["pictures"]:
        pictures = [bytes.fromhex(picture) for picture in kept["pictures"]]
        assert [len(picture) for picture in pictures] == [625] * script.SETTINGS["kept"]
        assert len(set(pictures)) == len(pictures)
        assert all(statistics.stdev(picture) > 15 for picture in pictures)


def test_circuits_as_set_give_unseen_faces_better_and_tuned_frequencies_no_worse(found):
    low, high = apart(found, "quantum", "fourier", "psnr")
    assert 0 < low < high < 1
    low, high = apart(found, "quantum", "fourier, tuned", "psnr")
    assert -0.3 < low < 0 < high < 0.3


def test_new_faces_are_blurred_by_circuits_and_noisier_by_frequencies_as_set(found):
    low, _ = apart(found, "fourier", "quantum", "roughness")
    assert low > 0 and mean(found, "fourier", "roughness") < found["roughness"]


def test_eigenfaces_are_nearer_to_real_faces_than_any_decoder(found):
    as_many = max(found["eigenfaces"], key=lambda row: row["components"])
    assert all(as_many["frechet"] < row["frechet"] for row in found["rows"])
    assert all(found["mean_face"]["psnr"] + 3 < row["psnr"] for row in found["rows"])
