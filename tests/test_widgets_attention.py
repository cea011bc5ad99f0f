"""The explorers of shared attention and of compressed caches: equal to real caches and to direct sums."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from lightlib.measure import flops
from lightlib.widgets.anatomy import MODELS, Shape, kv_cache_bytes, parameters
from lightlib.widgets.attention_map import MEAN, attention_map, weigh
from lightlib.widgets.cache_budget import (
    BUDGETS,
    DEVICES,
    LINKS,
    RESIDUAL,
    cache_budget,
    largest_batch,
    memory,
    plans,
    schemes,
    seconds,
)  # fmt: skip
from lightlib.widgets.cache_budget import SHAPES as BUDGETED
from lightlib.widgets.cache_strip import Trace, cache_strip, held_after
from lightlib.widgets.decode_intensity import ATTENTION, LINEAR, STEP, decode_intensity, step_parts
from lightlib.widgets.head_sharing import OWN, ROWS, SHAPES, head_sharing, named, reads, some
from lightlib.widgets.model_calculator import divisors
from lightlib.widgets.needle_map import HIT, NLL, enough, needle_map, summary
from lightlib.widgets.text_screen import COLUMNS, HIGH, WIDE, Page, letters_of, places, readable
from tests.explorers import is_the_same_twice, redraws_within_200_ms

TOKENS = 130
WORDS = [f" word{i % 37}" for i in range(TOKENS)]
TINY = Shape(3, 64, 8, 8, 16, 96, 128, True)


def some_weights(tokens: int = TOKENS) -> torch.Tensor:
    scores = 3 * torch.randn(2, 3, tokens, tokens, generator=torch.Generator().manual_seed(0))
    return scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf).softmax(-1).half()


def some_trace(layers: int | None = 2, tokens: int = TOKENS, first: int = 90, keep: int = 32) -> Trace:
    """`keep` newest tokens are held by all heads, and every fifth of the others by a quarter of them."""
    shape = (tokens - first + 1, *([layers] if layers else []), tokens)
    held = torch.full(shape, -1.0)
    for step in range(len(held)):
        seen = first + step
        held[step, ..., :seen] = 0
        held[step, ..., :seen:5] = 0.25
        held[step, ..., max(0, seen - keep) : seen] = 1
    return Trace(WORDS[:tokens], held, first)


def some_maps(scale: float = 1.0) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        key: scale * torch.rand(5, 9, generator=generator)
        for key in itertools.product(("H2O", "SnapKV", "recent only"), ("after", "within"))
    }


PLACES = ([32, 64, 128, 256, 512], [i / 8 for i in range(9)])


def on_weights(**options):
    return attention_map(some_weights(), WORDS, **options)


def on_traces(**options):
    traces = {"H2O": some_trace(), "recent only": some_trace(tokens=100)}
    return cache_strip(traces, bytes_per_token=1024, **options)


def on_maps(**options):
    return needle_map(some_maps(), *PLACES, nll=some_maps(6.0), **options)


every_explorer = pytest.mark.parametrize(
    "make", [head_sharing, decode_intensity, on_traces, on_weights, on_maps, cache_budget]
)


@every_explorer
def test_two_of_a_kind_are_equal_and_every_description_is_wide_enough(make):
    is_the_same_twice(make)


@pytest.mark.alone
@every_explorer
def test_every_control_redraws_within_200_ms(make):
    redraws_within_200_ms(make)


# heads that share
@pytest.mark.parametrize("kv_heads", divisors(8))
def test_bytes_of_a_token_are_those_of_a_real_cache(kv_heads):
    config = LlamaConfig(
        hidden_size=TINY.width, num_hidden_layers=TINY.layers, num_attention_heads=8, head_dim=TINY.head_dim,
        num_key_value_heads=kv_heads, intermediate_size=TINY.d_ff, vocab_size=TINY.vocabulary,
    )  # fmt: skip
    cache = DynamicCache(config=config)
    model = LlamaForCausalLM(config).bfloat16()
    with torch.no_grad():
        model(torch.zeros(2, 11, dtype=torch.long), past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    ex = head_sharing({OWN: TINY}).set(kv_heads=kv_heads, batch=2, context=1024)
    assert ex.result["kv_per_token_bytes"] * 22 == held
    assert ex.result["kv_cache_bytes"] * 22 == held * 2 * 1024
    attention = model.model.layers[0].self_attn
    assert ex.result["attention_weights_a_layer"] == sum(p.numel() for p in attention.parameters())


def test_neighbours_share_a_key_value_head_as_transformers_repeats_them():
    keys = torch.arange(3.0).view(1, 3, 1, 1)
    repeated = keys.repeat_interleave(12 // 3, dim=1).flatten()
    assert reads(12, 3) == repeated.int().tolist()
    assert reads(8, 8) == list(range(8)) and reads(8, 1) == [0] * 8


def test_names_and_bars_of_every_model():
    assert [named(8, g) for g in (8, 2, 1)] == ["MHA", "GQA-2", "MQA"] and named(1, 1) == "MHA"
    ex = head_sharing()
    for model, shape in SHAPES.items():
        assert ex.set(model=model).values["kv_heads"] == shape.kv_heads  # a model brings its own
        for kv_heads in divisors(shape.heads):
            bars = ex.set(kv_heads=kv_heads).result["by_kv_heads"]
            assert {shape.heads, kv_heads, 1} <= set(bars) and len(bars) <= ROWS
            assert bars[kv_heads] == ex.result["kv_cache_bytes"]


def test_bars_keep_the_ends_and_the_chosen_one():
    for kept in divisors(96):
        chosen = some(divisors(96), kept, 5)
        assert {1, 96, kept} <= set(chosen) and len(chosen) == 5 and chosen == sorted(chosen, reverse=True)


def test_a_group_that_does_not_divide_the_heads_is_refused_and_changes_nothing():
    ex = head_sharing().set(model="SmolLM2-135M")
    with pytest.raises(ValueError, match="kv_heads=2 does not fit"):
        ex.set(kv_heads=2)
    assert ex.values["kv_heads"] == 3
    with pytest.raises(ValueError, match="head_sharing: no model"):
        head_sharing(model="none")


def test_it_says_what_the_cache_takes_of_the_memory():
    ex = head_sharing().set(model="LLaMA-3-8B", context=131072, device="A100 80GB")
    assert "4 times less than MHA" in ex.result["says"] and "21.5 %" in ex.result["says"]
    assert "times as much as there is" in ex.set(batch=256).result["says"]


# a step under the roofline
@pytest.mark.parametrize("kv_heads", divisors(32))
def test_attention_multiplies_h_over_g_times_a_byte_at_any_batch(kv_heads):
    shape = replace(MODELS["LLaMA-3-8B"], kv_heads=kv_heads)
    for batch, context in itertools.product((1, 64), (256, 8192)):
        parts = step_parts(shape, context, batch, DEVICES["H100"])
        assert parts[ATTENTION].intensity == 32 / kv_heads
        assert parts[LINEAR].intensity == batch  # two operations for each weight of two bytes
    assert step_parts(shape, 512, 1, DEVICES["H100"], kv_bits=4)[ATTENTION].intensity == 4 * 32 / kv_heads


def test_the_parts_of_a_step_add_up_to_the_operations_of_a_real_model():
    config = LlamaConfig(
        hidden_size=TINY.width, num_hidden_layers=TINY.layers, num_attention_heads=8, head_dim=TINY.head_dim,
        num_key_value_heads=2, intermediate_size=TINY.d_ff, vocab_size=TINY.vocabulary,
        tie_word_embeddings=True,
    )  # fmt: skip
    context, shape = 16, replace(TINY, kv_heads=2)
    parts = step_parts(shape, context, 1, DEVICES["H100"])
    counted = flops(LlamaForCausalLM(config), context)
    assert parts[STEP].flop == parts[LINEAR].flop + parts[ATTENTION].flop == counted.decode_per_token
    assert parts[ATTENTION].read_bytes == kv_cache_bytes(shape, context)


def test_no_point_lies_above_the_roof_and_the_parts_lie_on_it():
    for model, batch, context in itertools.product(MODELS, (1, 32, 256), (256, 131072)):
        for device in DEVICES.values():
            parts = step_parts(MODELS[model], context, batch, device)
            for name, part in parts.items():
                roof = 1e9 * min(device.gflop_per_s, device.gb_per_s * part.intensity)
                assert part.rate <= roof * (1 + 1e-9)
                assert name == STEP or part.rate == pytest.approx(roof)


def test_the_split_of_a_step_and_what_to_do_about_it():
    ex = decode_intensity().set(batch=1, context=1024)
    assert (
        ex.result["cache_of_the_step_share"] < 0.1 and "a larger batch comes almost free" in ex.result["says"]
    )
    ex.set(batch=256, context=8192)
    assert ex.result["cache_of_the_step_share"] > 0.9 and "fewer KV heads" in ex.result["says"]
    assert "do not fit into 80 GB" in ex.result["says"]
    r = ex.result
    assert r["step_ms"] == pytest.approx(r["linear_ms"] + r["attention_ms"])
    assert r["fastest_tokens_per_s"] == pytest.approx(256 / r["step_ms"] * 1e3)
    assert r["attention_ms"] == pytest.approx(r["cache_read_bytes"] / 3350e9 * 1e3)


# the strip
def test_what_is_held_is_counted_over_heads_and_layers():
    trace = some_trace()
    trace.held[5, 1, :40] = 0
    held = held_after(trace, 5)
    row = trace.held[5]
    seen = int((row[0] >= 0).sum())
    assert len(held.share) == seen == 95
    assert held.mean == pytest.approx(row[:, :seen].mean(0).sum().item())
    assert held_after(trace, 5, 0).oldest == 0 and held_after(trace, 5, 1).oldest == 40
    assert held_after(trace, 5, 1).mean == pytest.approx(row[1, :seen].sum().item())


def test_nan_and_minus_one_both_mean_not_yet_written():
    trace = some_trace(layers=None)
    as_nan = Trace(trace.tokens, trace.held.where(trace.held >= 0, math.nan), trace.first)
    one, other = cache_strip({"a": trace}, cache=0), cache_strip({"a": as_nan}, cache=0)
    assert one.set(step=0)._png == other.set(step=0)._png and one.result["tokens_seen"] == 90


def test_the_strip_reports_the_caches_bytes_of_all_layers_or_one():
    ex = on_traces().set(step=5)
    share = held_after(some_trace(), 5)
    assert ex.result["tokens_held"] == share.mean and ex.result["in_every_cache"] == 32
    assert ex.result["held_bytes"] == share.mean * 1024 and ex.result["full_cache_bytes"] == 95 * 1024
    assert ex.set(layer=1).result["full_cache_bytes"] == 95 * 512
    assert ex.result["in_none"] == int((share.share == 0).sum())
    assert "held_bytes" not in cache_strip({"a": some_trace()}).result


def test_a_policy_with_fewer_steps_moves_the_slider_to_its_end():
    ex = on_traces()
    assert ex.values["step"] == 40
    assert ex.set(policy="recent only").values["step"] == 10 and ex.result["tokens_seen"] == 100


def test_no_token_is_broken_over_two_rows_and_all_of_them_are_on_the_page():
    page = Page([" a", "b" * (COLUMNS + 20), "\n", "", "漢", *WORDS])
    assert all(
        column + len(text) <= COLUMNS for (_, column), text in zip(page.places, page.texts, strict=True)
    )
    assert page.texts[1].endswith("…") and page.texts[2:5] == ["↵", "∅", "□"]
    assert set(np.unique(page.owner)) == {-1, *range(len(page.texts))}
    assert (page.owner >= 0).sum() == sum(map(len, page.texts))
    assert places(["ab", "c"]) == [(0, 0), (0, 2)] and readable("\tx") == "→x"


def test_a_letters_ink_is_its_own():
    alphabet = " .Wij|漢"[:6]
    ink = letters_of(alphabet)
    assert ink.shape == (6, HIGH, WIDE) and ink[0].max() == 0
    order = [alphabet.index(letter) for letter in " .W"]
    assert list(ink.sum((1, 2))[order]) == sorted(ink.sum((1, 2))[order])
    for i, letter in enumerate(alphabet):  # the neighbours leave nothing in its cell
        np.testing.assert_allclose(letters_of(letter)[0], ink[i], atol=0.02)


def test_the_colour_of_a_box_says_how_many_heads_hold_the_token():
    page = Page(["aaaa", "bbbb", "cccc", "dddd"])
    image = page.picture(np.array([1.0, 0.5, 0.0]), first=4)
    corner = [image[2, WIDE * 4 * i + 2] for i in range(4)]  # paper above the letters
    assert corner[0][0] < corner[1][0] < corner[2][0] == 1 and (corner[3] == 1).all()
    stroke = image[HIGH // 2, WIDE * 8 + 1 : WIDE * 12]
    assert (stroke < 0.6).all()  # struck out from end to end
    assert (image[:, WIDE * 12 :] == 1).all()  # not yet written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": WORDS[:-1]}, "129 tokens and held"),
        ({"first": 500}, "first=500"),
        ({"held": 2 * some_trace().held.clamp(min=0)}, "from 0 to 2"),
        ({"held": some_trace().held.flip(-1)}, "before an earlier one"),
        ({"held": torch.zeros(TOKENS)}, r"it must be \(steps, 130\)"),
    ],
)
def test_traces_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        cache_strip({"H2O": replace(some_trace(), **change)})


def test_policies_must_agree_on_their_layers():
    with pytest.raises(ValueError, match="as many layers"):
        cache_strip({"a": some_trace(), "b": some_trace(layers=None)})
    with pytest.raises(ValueError, match="cache_strip: give"):
        cache_strip({})


def test_what_was_generated_is_read_from_the_tokens():
    assert some_trace(first=128).written == WORDS[128] + WORDS[129]


# the map
def test_the_shares_are_direct_sums():
    A = some_weights()[1, 2].float()
    one = weigh(A, 16)
    recent = sum(A[q, k].item() for q in range(TOKENS) for k in range(max(1, q - 15), q + 1))
    assert one.sink == pytest.approx(A[:, 0].mean().item(), rel=1e-4)
    assert one.recent == pytest.approx(recent / TOKENS, rel=1e-4)
    columns = A.sum(0).sort(descending=True)
    assert one.heaviest == columns.indices[:13].tolist()
    assert one.heavy == pytest.approx(columns.values[:13].sum().item() / TOKENS, rel=1e-4)
    entropy = -(A[A > 0] * A[A > 0].log2()).sum().item() / TOKENS
    assert one.entropy == pytest.approx(entropy, rel=1e-4)


def test_equal_weights_and_pure_sinks_are_the_ends():
    T = 64
    equal = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    one = weigh(equal, T)
    assert one.entropy == pytest.approx(np.log2(np.arange(1, T + 1)).mean(), rel=1e-4)
    assert one.sink + one.recent == pytest.approx(1)
    sink = torch.zeros(T, T)
    sink[:, 0] = 1
    one = weigh(sink, 8)
    assert (one.sink, one.recent, one.heavy, one.entropy) == (1, 0, 1, 0) and one.heaviest[0] == 0
    local = weigh(torch.eye(T), 1)
    assert local.recent == pytest.approx((T - 1) / T) and local.entropy == 0


def test_a_head_and_the_mean_of_heads_name_their_heaviest_tokens():
    weights = some_weights()
    ex = on_weights().set(layer=0, head=1)
    top = int(weights[0, 1].float().sum(0).argmax())
    assert f"{WORDS[top]!r} (key {top})" in ex.result["says"]
    mean = ex.set(head=MEAN).result
    assert mean["first_token_share"] == pytest.approx(weights[0, :, :, 0].float().mean().item(), rel=1e-4)
    assert "the mean of its heads" in mean["says"]


def test_weights_of_a_real_model_are_taken_as_they_are():
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, vocab_size=128, attn_implementation="eager",
    )  # fmt: skip
    ids = torch.arange(40)[None]
    with torch.no_grad():
        found = LlamaForCausalLM(config)(ids, output_attentions=True).attentions
    ex = attention_map(torch.stack([a[0] for a in found]).half(), [str(i) for i in range(40)])
    sink = found[1][0, 3, :, 0].mean().item()
    assert ex.set(layer=1, head=3).result["first_token_share"] == pytest.approx(sink, rel=1e-2)


@pytest.mark.parametrize(
    ("weights", "tokens", "message"),
    [
        (some_weights()[0], WORDS, "do not fit 130 tokens"),
        (some_weights(), WORDS[1:], "do not fit 129 tokens"),
        (2 * some_weights(), WORDS, "misses a sum of 1"),
        (torch.full((1, 1, 20, 20), 0.05), WORDS[:20], "must be causal"),
        (some_weights(4), WORDS[:4], "give 10 to 512"),
    ],
)
def test_what_is_not_causal_attention_is_refused(weights, tokens, message):
    with pytest.raises(ValueError, match=message):
        attention_map(weights, tokens)


# needles
def test_the_mean_and_the_worst_cell_are_those_of_the_map():
    ex, maps = on_maps(), some_maps()
    for policy, question in maps:
        found, map_ = ex.set(policy=policy, question=question, metric=HIT).result, maps[policy, question]
        assert found["mean_hit_share"] == pytest.approx(map_.mean().item(), rel=1e-5)
        assert found["worst_hit_share"] == pytest.approx(map_.min().item(), rel=1e-5)
        row, column = divmod(int(map_.argmin()), 9)
        assert found["worst_budget"] == f"{PLACES[0][row]} tokens"
        assert found["worst_depth_share"] == PLACES[1][column]
    worst = ex.set(metric=NLL).result["worst_nll"]
    assert worst == some_maps(6.0)[policy, question].max().item()


def test_all_maps_of_a_metric_share_their_colours():
    ex = on_maps()
    ends = {ex.set(policy=p, question=q, metric=m).result["ends"] for p, q in some_maps() for m in (HIT, NLL)}
    assert ends == {(0, 100), (0, 6)}


def test_the_budget_that_is_enough_is_enough_from_there_on():
    hits = torch.tensor([[95.0, 91], [100, 80], [100, 90], [100, 100]])
    assert enough(hits, [64, 128, 256, 512], HIT, 0) == 256
    assert enough(hits.flip(0), [512, 256, 128, 64], HIT, 0) == 256  # in any order of the rows
    assert enough(torch.zeros(2, 2), [64, 128], HIT, 0) is None
    assert enough(torch.tensor([[1.0, 2], [1, 1.4]]), [64, 128], NLL, 1.0) == 128
    assert summary(torch.tensor([[1.0, 2], [3, 0]]), NLL) == {"mean": 1.5, "worst": 3, "row": 1, "column": 0}


def test_budgets_may_be_shares_of_the_tokens():
    ex = needle_map({("a", "after"): torch.tensor([[0.5], [1.0]])}, [0.1, 1.0], [0.5])
    assert (ex.result["worst_budget"], ex.result["enough_everywhere"]) == ("10 %", "100 %")
    assert "with 10 % kept. From 100 % on" in ex.result["says"]


def test_one_metric_needs_no_control_and_extremes_can_be_drawn():
    for value in (0.0, 1.0):
        ex = needle_map({("a", "after"): torch.full((2, 3), value)}, [16, 32], [0, 0.5, 1])
        assert list(ex.controls) == ["policy", "question"] and len(ex._png) > 3000
    assert ex.result["enough_everywhere"] == "16 tokens" and "From 16 tokens on" in ex.result["says"]


@pytest.mark.parametrize(
    ("hits", "nll", "message"),
    [
        ({}, None, "give {"),
        ({("a", "x"): torch.zeros(5, 8)}, None, r"must be \(5, 9\)"),
        ({("a", "x"): torch.full((5, 9), 100.0)}, None, "from 0 to 1"),
        ({("a", "x"): torch.zeros(5, 9), ("b", "y"): torch.zeros(5, 9)}, None, "has no map of"),
        ({("a", "x"): torch.zeros(5, 9)}, {("b", "x"): torch.zeros(5, 9)}, "same policies"),
        ({("a", "x"): torch.full((5, 9), math.nan)}, None, "not finite"),
    ],
)
def test_maps_that_do_not_fit_are_refused(hits, nll, message):
    with pytest.raises(ValueError, match=message):
        needle_map(hits, *PLACES, nll=nll)


# budgets
def test_opt_has_as_many_weights_as_its_own_model():
    from transformers import OPTConfig, OPTForCausalLM

    shape = BUDGETED["OPT-30B"]
    config = OPTConfig(
        hidden_size=shape.width, word_embed_proj_dim=shape.width, ffn_dim=shape.d_ff,
        vocab_size=shape.vocabulary, num_attention_heads=shape.heads, num_hidden_layers=shape.layers,
        max_position_embeddings=2048,
    )  # fmt: skip
    with torch.device("meta"):
        real = sum(p.numel() for p in OPTForCausalLM(config).parameters())
    positions = (2050 - 1024) * shape.width
    assert real == sum(parameters(shape).values()) + positions and positions / real < 3e-4


@pytest.mark.parametrize("model", BUDGETED)
def test_every_scheme_takes_the_budget_that_its_text_was_made_for(model):
    for scheme in schemes(BUDGETED[model], 0.2):
        for budget in (1e6, 1e9, 64e9):
            assert scheme.bytes_of(scheme.tokens_in(budget)) == pytest.approx(budget)


def test_schemes_count_scales_windows_and_heads():
    by_name = {scheme.name: scheme for scheme in schemes(MODELS["Llama-2-7B"], 0.2)}
    full = kv_cache_bytes(MODELS["Llama-2-7B"], 1000)
    numbers = full / 2
    assert by_name["full, 16 bits"].bytes_of(1000) == full
    new = RESIDUAL / 1000
    scales = numbers / 32 * 4 * (1 - new)  # a scale and a zero point of 16 bits each for 32 numbers
    assert by_name["int4"].bytes_of(1000) == pytest.approx(full * new + numbers / 2 * (1 - new) + scales)
    assert by_name["int2"].bytes_of(RESIDUAL) == by_name["full, 16 bits"].bytes_of(RESIDUAL)
    assert by_name["evict to 20 %"].bytes_of(1000) == pytest.approx(full / 5)
    assert by_name["GQA-8"].bytes_of(1000) == full / 4


@pytest.mark.parametrize(("model", "device"), list(itertools.product(BUDGETED, DEVICES)))
def test_the_largest_batch_fits_and_one_more_does_not(model, device):
    shape, gpu = BUDGETED[model], DEVICES[device]
    where = memory(shape, gpu)
    for context, kept in itertools.product((512, 8192), (0.2, 1)):
        n = largest_batch(shape, context, kept, gpu)
        cache = kv_cache_bytes(shape, context) * kept
        assert n * cache <= where.room_bytes * (1 + 1e-9) < (n + 1) * cache * (1 + 1e-6)


def test_a_step_waits_for_what_travels():
    shape, gpu = BUDGETED["OPT-30B"], DEVICES["T4"]
    few, whole, away, less, fits = plans(shape, 1024, 144, 4, 0.2, gpu)
    weights, cache = 2 * sum(parameters(shape).values()), kv_cache_bytes(shape, 1024, 144)
    assert seconds(few, shape, 1024, gpu, 12)["link"] == pytest.approx(weights / 12e9)
    assert seconds(away, shape, 1024, gpu, 12)["link"] == pytest.approx((weights + cache) / 12e9)
    assert seconds(less, shape, 1024, gpu, 12)["link"] == pytest.approx((weights + cache / 5) / 12e9)
    assert seconds(away, MODELS["SmolLM2-135M"], 64, gpu, 12)["link"] == pytest.approx(
        kv_cache_bytes(MODELS["SmolLM2-135M"], 64, 144) / 12e9
    )  # these weights stay
    assert (few.batch, fits.kept, fits.away) == (4, 0.2, False) and fits.batch > 5 * whole.batch


def test_the_claim_of_29_times_is_batch_first_and_eviction_second():
    result = cache_budget().result
    few, many, less = (result[f"{k}_tokens_per_s"] for k in ("few_full", "link_full", "link_evicted"))
    assert 20 < less / few < 35 and many / few > 8 and 2 < less / many < 3.5
    assert f"eviction {less / many:.4g} more" in result["says"]


def test_keeping_everything_gains_nothing():
    result = cache_budget().set(keep=100).result
    assert result["link_evicted_tokens_per_s"] == result["link_full_tokens_per_s"]
    assert result["evicted_that_fit"] == result["full_that_fit"] and "eviction 1 more" in result["says"]


def test_where_not_one_cache_fits_it_says_so():
    result = cache_budget().set(context=131072).result
    assert result["full_that_fit"] == 0 and "not one whole cache fits" in result["says"]


def test_a_budget_in_bytes_is_shared_by_all_schemes():
    ex = cache_budget()
    for budget in BUDGETS[1:]:
        held = ex.set(budget=budget).result["held"]
        assert held["full, 16 bits"] == pytest.approx(budget * 1e9 / ex.result["kv_per_token_bytes"])
        assert held["evict to 20 %"] == pytest.approx(5 * held["full, 16 bits"])
    assert set(LINKS.values()) == {12, 24, 48}
    with pytest.raises(ValueError, match="cache_budget: no 'none'"):
        cache_budget("none")
