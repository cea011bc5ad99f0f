"""Budgets: what a share keeps, which bytes and milliseconds are left, the least fraction that meets them."""

import os
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightlib.cost import size
from lightlib.decoder import find_blocks, use_linear_everywhere
from lightlib.machine import one_thread
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from lightlib.structured import budget
from lightlib.structured.budget import (
    NEAR,
    LatencyTable,
    best,
    cut_copy,
    fit,
    kept_bytes,
    kept_count,
    kept_ms,
    some_ids,
)  # fmt: skip
from lightlib.units import keep_units, unit_counts
from tests.conftest import random_model

NONE = dict(fraction=0.25, budget_bytes=None, budget_ms=None, tokens=16)


def first_ones(model, round_to=1, kinds=("heads", "neurons")):
    """A choice that keeps the first units of each block, an equal share of each kind."""
    counts = unit_counts(model)

    def choose(fraction):
        return {
            name: {kind: torch.arange(kept_count(block[kind], 1 - fraction, round_to)) for kind in kinds}
            for name, block in counts.items()
        }

    return choose


def counts_of(kept):
    return {name: {kind: len(index) for kind, index in kinds.items()} for name, kinds in kept.items()}


def weights_of(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture
def fair_clock(monkeypatch):
    """A module takes a microsecond a weight; returns the calls that it timed."""
    timed = []

    def forwards_ms(works):
        timed.extend(module for module, _, _ in works)
        return [weights_of(module) / 1e3 for module, _, _ in works]

    monkeypatch.setattr(budget, "forwards_ms", forwards_ms)
    return timed


# counts and choices
def test_a_share_is_rounded_to_the_nearest_multiple_within_one_multiple_and_the_whole():
    assert [kept_count(64, share) for share in (1.0, 0.5, 0.49, 0.0)] == [64, 32, 31, 1]
    assert [kept_count(100, share, 8) for share in (1.0, 0.99, 0.54, 0.01)] == [100, 96, 56, 8]
    assert kept_count(1536, 0.7, 64) == 1088
    assert kept_count(3, 0.2, 8) == 3 and kept_count(2, 0.5) == 1


def test_the_best_are_the_largest_in_rising_order_and_of_equals_the_first():
    assert best(torch.tensor([0.1, 3.0, 2.0, 5.0]), 2).tolist() == [1, 3]
    assert best(torch.tensor([1.0, 2.0, 1.0, 1.0]), 3).tolist() == [0, 1, 2]
    assert best(torch.ones(200), 100).tolist() == list(range(100))


def test_without_a_budget_the_fraction_goes_to_the_choice_as_it_is(llama):
    asked = []
    assert fit(llama, lambda fraction: asked.append(fraction) or {}, **NONE) == {}
    assert asked == [0.25]


# bytes
def test_the_bytes_left_are_those_of_the_model_that_is_really_cut(model):
    light = use_linear_everywhere(model)
    kept = first_ones(light)(0.5)
    del kept[next(iter(kept))]["heads"]
    expected = kept_bytes(light, kept)
    assert kept_bytes(light, {}) == size(light).stored_bytes > expected
    keep_units(light, kept, "some")
    assert size(light).stored_bytes == expected


def test_half_precision_counts_two_bytes_a_weight():
    light = random_model("llama", torch.bfloat16)
    kept = first_ones(light)(0.5)
    expected = kept_bytes(light, kept)
    keep_units(light, kept, "some")
    assert size(light).stored_bytes == expected


def test_the_least_fraction_that_meets_the_bytes_is_taken(llama):
    choose, whole = first_ones(llama, kinds=("neurons",)), size(llama).stored_bytes
    one = (whole - kept_bytes(llama, choose(0.5))) // 32  # a neuron in each block
    for target in (whole, whole - 1, whole - 10 * one, whole - 10 * one - 1):
        kept = fit(llama, choose, **NONE | {"budget_bytes": target})
        (count,) = {block["neurons"] for block in counts_of(kept).values()}
        assert kept_bytes(llama, kept) <= target
        assert count == 64 or kept_bytes(llama, kept) + one > target


def test_budgets_that_cannot_be_met_name_the_least_that_can(llama, fair_clock):
    choose = first_ones(llama)
    least = kept_bytes(llama, choose(0.95))
    with pytest.raises(ValueError, match=f"budget_bytes=10: the least that can be had is {least} bytes"):
        fit(llama, choose, **NONE | {"budget_bytes": 10})
    least = weights_of(cut_copy(llama, choose(0.95))) / 1e3
    with pytest.raises(ValueError, match=rf"budget_ms=0.01: the least that can be had is {least:.3g} ms"):
        fit(llama, choose, **NONE | {"budget_ms": 0.01})


def test_bad_requests_are_refused(llama, fair_clock):
    with pytest.raises(ValueError, match=r"budget_bytes=5 and budget_ms=3.0: give one"):
        fit(llama, first_ones(llama), **NONE | {"budget_bytes": 5, "budget_ms": 3.0})
    with pytest.raises(ValueError, match=r"fraction=1.0: give a number from 0 to below 1"):
        fit(llama, first_ones(llama), **NONE | {"fraction": 1.0})
    with pytest.raises(ValueError, match="tokens=65: give 1 to 64"):
        fit(llama, first_ones(llama), **NONE | {"budget_ms": 5.0, "tokens": 65})
    packed = rtn(llama, None, grid=Int(8), progress=False).model
    with pytest.raises(ValueError, match="is packed"):
        kept_bytes(packed, first_ones(llama)(0.5))


# milliseconds
def test_a_table_gives_between_its_points_what_lies_on_their_line():
    neurons, heads = ((2, 4, 8), (3.0, 4.0, 10.0)), ((1, 2), (7.0, 10.0))
    table = LatencyTable({"a": {"heads": heads, "neurons": neurons}, "b": {"neurons": neurons}}, 5.0)
    assert table.of_counts({}) == table.milliseconds({"a": {"heads": torch.arange(2)}}) == 25.0
    assert table.of_counts({"a": {"neurons": 4}}) == 19.0
    assert table.milliseconds({"a": {"neurons": torch.tensor([0, 3, 4, 6, 7, 9])}}) == 22.0
    assert table.of_counts({"b": {"neurons": 1}}) == 17.5
    assert table.of_counts({"a": {"heads": 1, "neurons": 2}}) == 15.0


def test_with_a_fair_clock_the_table_predicts_every_cut(model, fair_clock):
    light = use_linear_everywhere(model)
    table = LatencyTable.measure(light, 16, points=4)
    assert list(table.blocks) == list(find_blocks(light))
    for kept in ({}, first_ones(light)(0.5), first_ones(light)(0.3)):
        assert table.milliseconds(kept) == pytest.approx(kept_ms(light, kept, 16))


def test_blocks_of_equal_shapes_are_timed_once_and_the_model_stays_as_it_is(llama, fair_clock):
    before = {name: (p, p.clone()) for name, p in llama.named_parameters()}
    LatencyTable.measure(llama, 16, points=4)
    # a whole block, one with fewer heads, three with fewer neurons, and the model
    assert len(fair_clock) == 1 + 1 + 3 + 1
    now = dict(llama.named_parameters())
    assert all(now[name] is p and torch.equal(p, values) for name, (p, values) in before.items())
    keep_units(llama, {"model.layers.0": {"neurons": torch.arange(8)}}, "some")
    fair_clock.clear()
    table = LatencyTable.measure(llama, 16, points=4)
    assert len(fair_clock) == 1 + 2 * (1 + 1 + 3)
    assert table.blocks["model.layers.0"]["neurons"][0] == (2, 4, 6, 8)


def test_the_rest_is_never_negative(llama, monkeypatch):
    monkeypatch.setattr(budget, "forwards_ms", lambda works: [1.0] * len(works))
    assert LatencyTable.measure(llama, 16).rest_ms == 0.0


def test_cut_copies_share_what_is_not_cut(llama):
    light = cut_copy(llama, {"model.layers.1": {"neurons": torch.arange(8)}})
    assert light.lm_head.weight is llama.lm_head.weight
    assert light.model.layers[1].self_attn.q_proj.weight is llama.model.layers[1].self_attn.q_proj.weight
    assert llama.model.layers[1].mlp.up_proj.out_features == 64


def test_the_least_fraction_that_meets_the_milliseconds_is_taken(llama, fair_clock):
    choose, whole = first_ones(llama, kinds=("neurons",)), weights_of(llama) / 1e3
    one = 2 * 3 * 32 / 1e3  # a neuron in each block: a row of gate and up, a column of down
    for target in (whole, whole - 10 * one, whole - 10.5 * one):
        kept = fit(llama, choose, **NONE | {"budget_ms": target + 1e-9})
        (count,) = {block["neurons"] for block in counts_of(kept).values()}
        assert abs(kept_ms(llama, kept, 16) - target) <= one and kept_ms(llama, kept, 16) <= target + 1e-9
        assert count == 64 or kept_ms(llama, kept, 16) + one > target


@pytest.mark.parametrize("slower", [0.8, 1.5])
def test_a_table_that_is_wrong_is_corrected_by_what_cuts_really_take(llama, fair_clock, monkeypatch, slower):
    choose, whole = first_ones(llama, kinds=("neurons",)), weights_of(llama) / 1e3
    fair = LatencyTable.measure(llama, 16)
    wrong = LatencyTable(fair.blocks, fair.rest_ms + (1 / slower - 1) * whole)
    monkeypatch.setattr(LatencyTable, "measure", lambda *_: wrong)
    kept = fit(llama, choose, **NONE | {"budget_ms": 0.8 * whole})
    assert kept_ms(llama, kept, 16) == pytest.approx(0.8 * whole, rel=0.05)


def test_a_choice_with_large_steps_stays_below_the_budget(llama, fair_clock):
    choose, whole = first_ones(llama, round_to=32, kinds=("neurons",)), weights_of(llama) / 1e3
    kept = fit(llama, choose, **NONE | {"budget_ms": 0.95 * whole / 1.06})
    assert kept_ms(llama, kept, 16) <= 0.95 * whole / 1.06
    assert {block["neurons"] for block in counts_of(kept).values()} == {32}


@pytest.fixture
def real_clock(monkeypatch):
    """Real times of cuts of a model, in hundredths of its own, which takes turns with them.

    A device that is in use is now slower and now faster; this takes out what changes for both.
    """
    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=256, intermediate_size=2048, num_hidden_layers=2)
    heads = dict(num_attention_heads=8, num_key_value_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads)).eval()
    measured, whole = budget.forwards_ms, (model, (some_ids(model, 256),), {"logits_to_keep": 1})

    def forwards_ms(works):
        *times, yard = measured([*works, whole])
        return [100 * time / yard for time in times]

    monkeypatch.setattr(budget, "forwards_ms", forwards_ms)
    monkeypatch.setattr(budget, "TURNS", 5)
    if os.getloadavg()[0] > os.cpu_count():  # others take the cores: only our own time counts
        monkeypatch.setattr(time, "perf_counter", time.thread_time)
    with one_thread():
        yield model


@pytest.mark.alone
def test_on_this_device_the_milliseconds_are_met_within_5_percent(real_clock):
    choose = first_ones(real_clock, kinds=("neurons",))

    def off() -> float:
        kept = fit(real_clock, choose, **NONE | {"budget_ms": 65, "tokens": 256})
        low, middle, high = sorted(kept_ms(real_clock, kept, 256) for _ in range(3))
        return abs(middle - 65) - (high - low) / 2

    # between a fit and its check the device may change its pace
    assert any(off() <= NEAR * 65 for _ in range(3))
