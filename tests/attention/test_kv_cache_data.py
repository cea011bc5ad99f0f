"""What was measured of compressed caches is whole, was made by its scripts, and what lesson 15 says holds."""

import itertools
import json
from functools import partial

import pytest
import torch

from lightlib.attention.context_gates import load_gates
from lightlib.attention.context_pruning import prune_context
from lightlib.attention.continuation import continuation_nll
from lightlib.attention.retrieval import QUESTIONS
from lightlib.fetch import data_file
from lightlib.zoo import load_model
from tests.conftest import data_script


def read(name):
    return json.loads(data_file(name).read_text())


@pytest.fixture(scope="module")
def scan():
    return read("kv_cache.json")


@pytest.fixture(scope="module")
def gates():
    return read("context_gates.json")


@pytest.fixture(scope="module")
def needles():
    return read("needles.json")


def one(rows, **knobs):
    """The one row that holds these."""
    (found,) = (row for row in rows if knobs.items() <= row.items())
    return found


def rises(values):
    return all(a < b for a, b in itertools.pairwise(values))


# the real model: nll beside bytes
def test_every_point_of_the_scan_was_measured(scan):
    script = data_script("scan_kv_cache")
    assert scan["settings"] == script.SETTINGS
    measured = [
        json.dumps({key: value for key, value in point.items() if key in script.KNOBS})
        for point in scan["points"]
    ]
    assert sorted(measured) == sorted(map(json.dumps, script.plan())) and len(measured) == len({*measured})
    for point in scan["points"]:
        assert len(point["nlls"]) == script.SETTINGS["pieces"]
        assert point["nll"] == pytest.approx(sum(point["nlls"]) / len(point["nlls"]), abs=1e-3)


def test_bytes_are_those_of_keys_values_and_positions(scan):
    per_token, heads = 2 * 30 * 3 * 64, 30 * 3  # numbers of all blocks, and their key-value heads
    assert one(scan["points"], cache="full")["bytes"] == 1024 * per_token * 4
    for point in scan["points"]:
        if point["cache"] in ("StreamingLLM", "TOVA", "key norm"):
            for key, itemsize in (("bytes", 4), ("bytes_bfloat16", 2)):
                assert point[key] == pytest.approx(
                    point["keep"] * (per_token * itemsize + heads * 8), rel=0.01
                )
            assert point["tokens"] == point["keep"]


def lost(scan, cache, **knobs):
    """The nll above that of the whole cache."""
    return one(scan["points"], cache=cache, **knobs)["nll"] - one(scan["points"], cache="full")["nll"]


def test_the_fewer_tokens_stay_the_more_is_lost(scan):
    for policy in ("StreamingLLM", "H2O", "SnapKV", "TOVA", "key norm"):
        assert rises(lost(scan, policy, keep=keep) for keep in (768, 512, 256, 128, 64)), policy


def test_attention_tells_better_than_place_and_place_better_than_norms_what_to_keep(scan):
    for keep in (256, 128, 64):
        order = [lost(scan, policy, keep=keep) for policy in ("H2O", "SnapKV", "StreamingLLM", "key norm")]
        assert rises(order), keep
    assert lost(scan, "H2O", keep=128) < 0.6 * lost(scan, "StreamingLLM", keep=128)


def test_tokens_by_lot_lose_most_and_for_the_most_part_since_the_first_go(scan):
    for keep in (768, 512, 256, 128, 64):
        lots = lost(scan, "random", keep=keep)
        others = [lost(scan, policy, keep=keep) for policy in data_script("scan_kv_cache").POLICIES]
        assert lots > 3 * max(others), keep
        assert lost(scan, "random and sinks", keep=keep) < 0.5 * lots, keep


def test_three_bits_lose_hardly_anything_and_two_bits_much(scan):
    by_channel = {"points": [point for point in scan["points"] if "keys" not in point]}
    few = {bits: lost(by_channel, "quantized", bits=bits, residual=128) for bits in (8, 4, 3, 2)}
    assert rises(few.values()) and few[3] < 0.01 < 0.1 < few[2]


def test_keys_rounded_by_token_lose_more_at_the_same_bytes(scan):
    token, channel = (
        one([p for p in scan["points"] if p.get("keys") == keys], cache="quantized", bits=2, residual=128)
        for keys in ("token", None)
    )
    full = one(scan["points"], cache="full")["nll"]
    assert token["bytes"] == channel["bytes"] and token["nll"] - full > 2 * (channel["nll"] - full)


@pytest.mark.parametrize("size", ["bytes", "bytes_bfloat16"])
def test_at_equal_bytes_four_bits_beat_every_policy_and_policies_beat_two_bits(scan, size):
    four, two = (one(scan["points"], cache="quantized", bits=bits, residual=32) for bits in (4, 2))
    policies = [p for p in scan["points"] if p["cache"] in data_script("scan_kv_cache").POLICIES]
    assert all(p["nll"] > four["nll"] for p in policies if p[size] < 1.5 * four[size])
    assert any(p["nll"] < two["nll"] for p in policies if p[size] < two[size])


@pytest.mark.model
def test_a_point_of_the_scan_comes_out_again(scan):
    script, (model, tokenizer) = data_script("scan_kv_cache"), load_model("smollm2-135m")
    kept, piece = one(scan["points"], cache="StreamingLLM", keep=512), script.texts(tokenizer)[0]
    cache = script.open_caches("StreamingLLM", keep=512)[0]
    assert continuation_nll(model, [piece], cache) == pytest.approx(kept["nlls"][0], abs=3e-3)
    assert script.after_prompt(model, piece, cache) == (kept["bytes"], kept["tokens"])


# gates
def of_weight(gates, cache, key="nll"):
    """This figure of each arm, by weight."""
    return {
        p["weight"]: p[key] for p in sorted(gates["points"], key=lambda p: p["weight"]) if p["cache"] == cache
    }


def test_every_arm_of_the_gates_was_trained_and_compared_with_every_policy(gates):
    script = data_script("train_gates")
    assert gates["settings"] == script.SETTINGS and gates["kept"] == script.KEPT
    assert [arm["weight"] for arm in gates["arms"]] == list(script.WEIGHTS)
    names = ("gates", *script.POLICIES)
    planned = [(weight, name) for weight in script.WEIGHTS for name in names]
    assert [(p["weight"], p["cache"]) for p in gates["points"]] == planned
    for arm in gates["arms"]:
        assert [step for step, _, _ in arm["curve"]] == [1, *range(10, script.SETTINGS["steps"] + 1, 10)]
    for weight, tokens in of_weight(gates, "gates", "tokens").items():
        assert all(of_weight(gates, name, "tokens")[weight] == round(tokens) for name in script.POLICIES)


def test_bytes_of_gates_are_those_of_keys_values_positions_and_gate_keys(gates):
    rank, kv = gates["settings"]["rank"], 2 * 2 * 32 * 4  # bytes of a token in a block
    assert gates["full"]["bytes"] == 192 * 4 * kv
    for point in gates["points"]:
        if point["cache"] == "gates":
            held = sum(point["of_block"])
            assert point["bytes"] == pytest.approx(held * (kv + 4 * rank + 2 * 8), rel=2e-3)


def test_the_larger_the_weight_the_fewer_tokens_stay_and_the_more_is_lost(gates):
    assert (
        rises(of_weight(gates, "gates").values()) and gates["full"]["nll"] < of_weight(gates, "gates")[0.05]
    )
    assert rises(-tokens for tokens in of_weight(gates, "gates", "tokens").values())


def test_the_kept_gates_hold_half_of_the_tokens_and_lose_little(gates):
    kept = one(gates["points"], weight=gates["kept"], cache="gates")
    assert kept["tokens"] < 0.5 * gates["full"]["tokens"]
    assert 0.02 < kept["nll"] - gates["full"]["nll"] < 0.04
    assert max(kept["of_block"]) > 1.5 * min(kept["of_block"])


def test_at_equal_tokens_gates_lose_less_than_norms_and_more_than_every_other_policy(gates):
    for key in ("nll", "nll_stepwise"):
        points = [p for p in gates["points"] if key in p]
        assert {p["weight"] for p in points} == (
            {gates["kept"]} if key == "nll_stepwise" else {*data_script("train_gates").WEIGHTS}
        )
        for weight in {p["weight"] for p in points}:
            found = {p["cache"]: p[key] for p in points if p["weight"] == weight}
            own, norm = found.pop("gates"), found.pop("key norm")
            assert gates["full"][key] < min(found.values()) and max(found.values()) < own < norm


def test_the_kept_gates_come_out_again(gates):
    script, (model, tokenizer) = data_script("train_gates"), load_model("tiny")
    few = script.held_out(tokenizer)[: script.SETTINGS["few"]]
    loaded = load_gates(data_file("context_gates.safetensors"), model)
    again = script.measure(model, few, partial(prune_context, gates=loaded))
    for key, close in (("nll", {"abs": 2e-3}), ("tokens", {"abs": 0.5}), ("bytes", {"rel": 5e-3})):
        assert again[key] == pytest.approx(gates["of_few"][key], **close)


# needles
def test_every_map_was_made(needles):
    script = data_script("scan_needles")
    assert needles["settings"] == script.SETTINGS
    assert [{key: m[key] for key in ("policy", "question")} for m in needles["maps"]] == script.plan()
    for found in needles["maps"]:
        budgets = (
            [script.SETTINGS["length"]] if found["policy"] in script.WHOLE else script.SETTINGS["budgets"]
        )
        assert found["budgets"] == budgets
        for rows in (found["hits"], found["nll"]):
            assert [len(row) for row in rows] == [len(script.SETTINGS["depths"])] * len(budgets)


def hits(needles, policy, question):
    """Hit rates (budgets, depths)."""
    return one(needles["maps"], policy=policy, question=question)["hits"]


def test_the_whole_cache_finds_every_needle_and_two_bits_do_not(needles):
    for question in QUESTIONS:
        assert hits(needles, "full", question) == [[1.0] * len(needles["settings"]["depths"])]
        assert min(hits(needles, "4 bits", question)[0]) >= 0.8
        assert max(hits(needles, "2 bits", question)[0]) < 1


def test_sinks_and_the_newest_find_what_is_among_the_newest_and_nothing_else(needles):
    settings = needles["settings"]
    for question in QUESTIONS:
        for budget, row in zip(settings["budgets"], hits(needles, "StreamingLLM", question), strict=True):
            for depth, rate in zip(settings["depths"], row, strict=True):
                left = (1 - depth) * settings["length"]  # tokens from the needle on, at most one sentence off
                assert rate == 1 if left < 0.7 * budget else rate == 0 or left < 1.1 * budget


def test_what_loses_least_nll_loses_the_needle(needles):
    for question in QUESTIONS:
        whole = hits(needles, "H2O", question)
        assert all(rate == 0 for row in whole for rate in row[:-1])  # all but the needle at the end
        assert sum(map(sum, whole)) < sum(map(sum, hits(needles, "StreamingLLM", question)))


def test_a_policy_that_looks_at_the_last_queries_needs_the_question_among_them(needles):
    for policy in ("SnapKV", "TOVA"):
        after, within = (
            torch.tensor(one(needles["maps"], policy=policy, question=question)["nll"])
            for question in QUESTIONS
        )
        assert (within.mean(1) < 0.75 * after.mean(1)).all()
    assert sum(hits(needles, "TOVA", "within")[0]) > 3 > 1 > sum(hits(needles, "TOVA", "after")[0])


def test_four_bits_of_all_tokens_find_more_than_any_half_of_them(needles):
    settings = needles["settings"]
    for found in needles["maps"]:
        for budget, row in zip(found["budgets"], found["hits"], strict=True):
            assert budget > settings["length"] / 2 or sum(row) < sum(
                hits(needles, "4 bits", found["question"])[0]
            )


@pytest.mark.model
def test_a_needle_is_found_and_lost_again(needles):
    script, (model, tokenizer) = data_script("scan_needles"), load_model("smollm2-135m", dtype=torch.bfloat16)
    kept, place = one(needles["maps"], policy="StreamingLLM", question="after"), {"budgets": [128]}
    again = script.measure(model, tokenizer, "StreamingLLM", "after", depths=[0.5, 0.9], **place)
    row = needles["settings"]["budgets"].index(128)
    assert again["hits"][0] == [kept["hits"][row][2], kept["hits"][row][4]]
    assert again["nll"][0] == pytest.approx([kept["nll"][row][2], kept["nll"][row][4]], abs=0.15)
