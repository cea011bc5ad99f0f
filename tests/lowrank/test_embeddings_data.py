"""What was measured of embeddings in a language model is whole, and what lesson 10 says of it holds."""

import json

import pytest

from lightlib.fetch import data_file
from tests.conftest import data_script


@pytest.fixture(scope="module")
def found():
    return json.loads(data_file("embeddings_lm.json").read_text())


def values(found, arm, key="perplexity"):
    return [run[key] for run in sorted(found["runs"], key=lambda run: run["seed"]) if run["arm"] == arm]


def test_every_arm_was_run_with_every_seed(found):
    script = data_script("embeddings_lm")
    assert found["settings"] == script.SETTINGS
    planned = [(arm, seed) for arm in script.ARMS for seed in found["settings"]["seeds"]]
    assert [(run["arm"], run["seed"]) for run in found["runs"]] == planned
    assert all(run["rate"] in found["settings"]["rates"] for run in found["runs"])


def test_all_small_arms_store_about_as_much_and_low_rank_the_most(found):
    script = data_script("embeddings_lm")
    numbers = {arm: values(found, arm, "numbers")[0] for arm in script.ARMS}
    full = numbers.pop("full table")
    assert full == 6000 * 64
    assert max(numbers.values()) == numbers["low rank"] == 3 * (6000 + 64)
    assert min(numbers.values()) > 0.94 * numbers["low rank"] and full / max(numbers.values()) > 21
    assert {numbers[arm] for arm in script.INDICES} == {found["morphemes"] * 2 * 4}
    assert {values(found, arm, "index_bytes")[0] for arm in script.INDICES} == {6000 * 3 * 2}


def test_sharing_by_tensor_products_is_better_than_low_rank_with_every_seed(found):
    full, low_rank = (values(found, arm) for arm in ("full table", "low rank"))
    for arm in set(data_script("embeddings_lm").ARMS) - {"full table", "low rank"}:
        for whole, shared, reduced in zip(full, values(found, arm), low_rank, strict=True):
            assert whole < shared < 0.75 * reduced, arm


def test_of_the_tables_of_indices_morphology_is_not_the_best(found):
    morphemes, shuffled, codes, hashed = (values(found, arm) for arm in data_script("embeddings_lm").INDICES)
    assert max(codes + hashed) < min(shuffled) <= max(shuffled) < min(morphemes)
    # a third of all places hold one and the same pad; told apart, they make up most of the difference
    assert 0.3 < found["pads"] < 0.4
    assert all(m - h > 0.8 * (m - c) for m, h, c in zip(morphemes, hashed, codes, strict=True))


def test_it_matters_little_whether_words_of_like_frequency_share(found):
    by_rank, by_lot = (values(found, arm) for arm in ("word2ketXS", "word2ketXS, numbered by lot"))
    assert all(a < b < 1.05 * a for a, b in zip(by_rank, by_lot, strict=True))
