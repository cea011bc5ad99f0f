"""The budget allocator: the shares of cfsp, the counts of what is really cut, and quick."""

import pytest
import torch

from lightlib.cost import flops, size
from lightlib.decoder import find_blocks
from lightlib.structured.budget import LatencyTable
from lightlib.structured.cfsp import cfsp, importances
from lightlib.units import unit_counts
from lightlib.widgets.anatomy import MODELS, Shape
from lightlib.widgets.budget_allocator import CONTEXT, EXAMPLE, allocate, budget_allocator, costs
from tests.conftest import random_model
from tests.explorers import is_the_same_twice, redraws_within_200_ms

BLOCKS = [f"model.layers.{i}" for i in range(30)]
FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def some_table(blocks=BLOCKS, d_ff=1536):
    """A block takes 2 ms and 3 more where it has all neurons; 10 ms go elsewhere."""
    series = {"neurons": ((d_ff // 2, d_ff), (3.5, 5.0))}
    return LatencyTable(dict.fromkeys(blocks, series), 10.0)


def with_a_table(**options):
    return budget_allocator(table=some_table(), **options)


def shape_of(family):
    return Shape(2, 32, 4, 2, 8, 64, 96, random_model(family).config.tie_word_embeddings, FAMILIES[family])


every_explorer = pytest.mark.parametrize("make", [budget_allocator, with_a_table])


@every_explorer
def test_two_of_a_kind_are_equal_and_every_description_is_wide_enough(make):
    is_the_same_twice(make)


@pytest.mark.alone
@every_explorer
def test_every_control_redraws_within_200_ms(make):
    redraws_within_200_ms(make)


def test_where_nothing_goes_the_model_is_the_dense_one():
    result = with_a_table().set(fraction=0).result
    assert result["neurons_kept"] == 30 * 1536 and result["parameters"] == 134_515_008
    assert result["weights_bytes"] == 4 * 134_515_008
    assert result["predicted_ms"] == result["dense_ms"] == 160 and result["times_as_fast"] == 1
    assert set(result["left"].values()) == {1.0}


def test_without_sharpness_all_blocks_keep_the_same_but_for_the_sum():
    kept = budget_allocator().set(sharpness=0.0, fraction=0.7).result["kept"]
    assert set(kept) == {460, 461} and sum(kept) == round(0.3 * 30 * 1536)
    assert set(budget_allocator().set(sharpness=0.0, fraction=0.25).result["kept"]) == {1152}


def test_the_more_important_a_block_is_the_more_it_keeps():
    kept = budget_allocator().set(sharpness=12.0, fraction=0.5).result["kept"]
    order = sorted(range(30), key=lambda i: EXAMPLE[i])
    assert [kept[i] for i in order] == sorted(kept) and max(kept) > 1.5 * min(kept)
    assert sum(kept) == 15 * 1536


@pytest.mark.parametrize("round_to", [8, 64, 128])
def test_blocks_keep_multiples_and_protected_ones_all(round_to):
    ex = budget_allocator().set(round_to=round_to, protect_first=3, protect_last=2)
    kept = ex.result["kept"]
    assert kept[:3] == [1536] * 3 and kept[-2:] == [1536] * 2
    assert all(n % round_to == 0 for n in kept) and max(kept[3:-2]) < 1536
    assert abs(sum(kept[3:-2]) - 0.8 * 25 * 1536) <= round_to
    assert "between the protected" in ex.result["says"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_explorer_counts_what_cfsp_really_leaves(family, calib):
    model, shape = random_model(family), shape_of(family)
    found, _ = importances(model, calib, "activation", progress=False)
    ex = budget_allocator(found, shape=shape)
    assert ex.set(fraction=0).result["parameters"] == size(model).parameters
    for settings in ({"fraction": 0.4, "sharpness": 12.0, "round_to": 8}, {"fraction": 0.25, "round_to": 1}):
        result = ex.set(**settings).result
        knobs = {name: ex.values[name] for name in ("fraction", "sharpness", "round_to")}
        light, _ = cfsp(model, calib, **knobs, progress=False)
        assert result["kept"] == [counts["neurons"] for counts in unit_counts(light).values()]
        assert result["parameters"] == size(light).parameters
        assert result["decode_per_token_flop"] == flops(light, CONTEXT).decode_per_token


def test_a_model_in_half_precision_takes_half_the_bytes():
    one, half = budget_allocator().result, budget_allocator(bits=16).result
    assert one["weights_bytes"] == 2 * half["weights_bytes"] and one["parameters"] == half["parameters"]


def test_biases_of_neurons_go_with_them():
    shape = MODELS["GPT-2"]
    dense, cut = costs(shape, 0, 8), costs(shape, 100, 8)
    assert dense["parameters"] - cut["parameters"] == 100 * (2 * 768 + 1)
    assert dense["decode_per_token_flop"] - cut["decode_per_token_flop"] == 100 * 2 * 2 * 768


def test_predicted_times_are_those_of_the_table():
    table = some_table()
    ex = budget_allocator(table=table).set(fraction=0.5, sharpness=0.0)
    assert ex.result["predicted_ms"] == pytest.approx(10 + 30 * 3.5)
    assert ex.result["times_as_fast"] == pytest.approx(160 / 115)
    kept = ex.set(fraction=0.3, sharpness=6.0).result["kept"]
    units = {name: {"neurons": torch.arange(n)} for name, n in zip(BLOCKS, kept, strict=True)}
    assert ex.result["predicted_ms"] == pytest.approx(table.milliseconds(units))
    assert "should take" in ex.result["says"]


def test_without_a_table_it_says_that_there_are_no_times():
    ex = budget_allocator()
    assert "predicted_ms" not in ex.result and "no time is shown" in ex.result["says"]
    assert "ms" not in ex.result["left"]


def test_times_measured_on_a_real_model_can_be_explored(llama, calib):
    found, _ = importances(llama, calib, "activation", progress=False)
    table = LatencyTable.measure(llama, 16, points=2)
    result = budget_allocator(found, table, shape_of("llama")).set(fraction=0).result
    assert list(found) == list(find_blocks(llama))
    assert result["predicted_ms"] == result["dense_ms"] > 0


def test_equal_importance_and_importance_of_zero_are_drawn():
    for value in (0.0, 0.3):
        ex = budget_allocator(dict.fromkeys(BLOCKS, value))
        assert set(ex.result["kept"]) == {1228, 1229} and len(ex._png) > 1000


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(ValueError, match="2 importances, but the shape has 30 blocks"):
        budget_allocator({"a": 0.1, "b": 0.2})
    with pytest.raises(ValueError, match="other blocks"):
        budget_allocator(table=some_table(BLOCKS[1:]))
    with pytest.raises(ValueError, match=r"goes to \[64\] neurons a block, the shape has 1536"):
        budget_allocator(table=some_table(d_ff=64))


def test_protected_ends_leave_the_rest_as_it_would_be_alone():
    values = list(EXAMPLE)
    assert allocate(values, 1536, 0.3, 6.0, 8, (2, 1))[2:-1] == allocate(values[2:-1], 1536, 0.3, 6.0, 8)
