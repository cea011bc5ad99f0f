"""What was measured of the generators of faces is whole, was made by its script, and what is said holds."""

import json
import math
import statistics

import pytest

from lightlib.fetch import data_file
from lightlib.quantum.baselines import count
from lightlib.quantum.generator import build
from tests.conftest import data_script

T_OF_TWO = 4.303  # Student's t of 2 degrees of freedom, 97.5 %


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


def interval(of):
    half = T_OF_TWO * statistics.stdev(of) / math.sqrt(len(of))
    return statistics.mean(of) - half, statistics.mean(of) + half


def apart(found, one, other, key):
    """Interval of how much more of it one arm has than the other; the seeds of two arms are no pairs."""
    a, b = values(found, one, key), values(found, other, key)
    half = T_OF_TWO * math.sqrt((statistics.variance(a) + statistics.variance(b)) / len(a))
    middle = statistics.mean(a) - statistics.mean(b)
    return middle - half, middle + half


def test_the_whole_plan_was_measured(found, script):
    assert found["settings"] == script.SETTINGS
    for name, points in (("tried", script.tries()), ("rows", script.plan())):
        assert [{key: row[key] for key in points[0]} for row in found[name]] == points
    assert len(script.plan()) == len(script.ARMS) * 3


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
