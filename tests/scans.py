"""What every scan of data/ must pass."""

import json

import pytest

from lightlib.zoo import load_model
from tests.conftest import data_script


def is_the_whole_plan(script: str, found: dict) -> None:
    """Every point of the script's plan was measured, once, with the settings that scans share."""
    made = data_script(script)
    assert found["settings"] == data_script("scanning").SETTINGS
    measured = [
        json.dumps({key: point[key] for key in made.plan()[0]}, sort_keys=True) for point in found["points"]
    ]
    planned = [json.dumps(point, sort_keys=True) for point in made.plan()]
    assert sorted(measured) == sorted(planned) and len(set(planned)) == len(planned)


def comes_out_again(script: str, kept: dict, same: tuple[str, ...]) -> tuple:
    """Measured anew, a point that needs no calibration has the same numbers; gives (model, test windows)."""
    made, scanning = data_script(script), data_script("scanning")
    model, tokenizer = load_model(scanning.SETTINGS["model"])
    tests = scanning.windows(tokenizer, **scanning.SETTINGS["test"])
    again = made.measure(model, None, tests, {key: kept[key] for key in made.plan()[0]})
    assert {k: again[k] for k in same} == {k: kept[k] for k in same}
    assert again["perplexity"] == pytest.approx(kept["perplexity"], rel=2e-3)
    return model, tests
