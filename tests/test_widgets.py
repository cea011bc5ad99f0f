"""Explorers: right at their limits, drawn once a setting, quick, and readable without a kernel."""

import base64

import ipywidgets as W
import pytest
import torch
from torch.testing import assert_close

from lightlib.decoder import parameters_by_part, use_linear_everywhere
from lightlib.measure import Roofline, flops
from lightlib.quantization.grid import Int
from lightlib.quantization.linear import QuantLinear
from lightlib.widgets.anatomy import FAMILIES, MODELS, Shape, flop_per_token, kv_cache_bytes, parameters
from lightlib.widgets.devices import DEVICES, this_machine
from lightlib.widgets.explorer import CUSTOM, WIDGET_MIME, Explorer
from lightlib.widgets.group_explorer import ZEROS, bits_per_weight, group_explorer, make_grid, round_matrix
from lightlib.widgets.guess import Guess
from lightlib.widgets.intervals import intervals
from lightlib.widgets.latency_dissector import dissect, latency_dissector
from lightlib.widgets.model_calculator import calculate, model_calculator
from lightlib.widgets.number_line import EXAMPLE, number_line, round_on_line
from lightlib.widgets.numbers import label, say
from lightlib.widgets.outlier_injector import (
    KINDS,
    grids,
    inject,
    outlier_injector,
    rounding_error,
    spoilt_errors,
)
from lightlib.widgets.plots import bars, frontier, pareto, roofline
from tests.explorers import is_the_same_twice, redraws_within_200_ms


def matrix(n_out=576, n_in=576):
    """Weights like a model's: normal, with one strong row and one strong column."""
    weight = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[n_out // 9] *= 3
    weight[:, n_in // 5] *= 4
    return weight


EXPLORERS = {
    "model_calculator": model_calculator,
    "latency_dissector": latency_dissector,
    "number_line": number_line,
    "group_explorer": lambda **options: group_explorer(matrix(), **options),
    "outlier_injector": lambda **options: outlier_injector(matrix(), **options),
}
every_explorer = pytest.mark.parametrize("make", EXPLORERS.values(), ids=list(EXPLORERS))


def simple(**options) -> Explorer:
    return Explorer(
        lambda k: {"power": k * 0.5, "list": [1, 2]},
        lambda fig, result: fig.add_axes((0.1, 0.1, 0.8, 0.8)).plot([0, result["power"]]),
        **{"k": W.IntSlider(3, 1, 9), **options},
    )


# the pattern
def test_a_moved_slider_changes_result_numbers_and_picture():
    ex = simple()
    before = bytes(ex._picture.value)
    ex.controls["k"].value = 5
    assert ex.result["power"] == 2.5 and ">2.5</b>" in ex._numbers.value
    assert bytes(ex._picture.value) != before and ex._png.startswith(b"\x89PNG")


def test_a_setting_is_drawn_once():
    ex = simple().warm(k=(4, 5))
    drawn = ex.renders
    for _ in range(3):
        ex.set(k=4).set(k=5).set(k=3)
    assert ex.renders == drawn == 3


def test_the_cache_forgets_the_oldest_setting_and_may_be_off():
    ex = simple(cache=2)
    for k in (4, 5, 3):
        ex.set(k=k)
    assert len(ex._frames) == 2 and ex.renders == 4
    assert not simple(cache=0)._frames


def test_no_figure_is_left_with_pyplot():
    import matplotlib.pyplot as plt

    ex = simple(cache=2)
    for k in range(1, 10):
        ex.set(k=k)
    bars({"a": 1.0})
    assert plt.get_fignums() == []


def test_the_saved_bundle_holds_a_picture_and_the_numbers():
    bundle = simple()._repr_mimebundle_()
    assert bundle["text/plain"] == "Explorer(k=3) -> power 1.5"
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG") and WIDGET_MIME in bundle


def test_an_explorer_without_a_figure_shows_its_numbers():
    ex = Explorer(lambda k: {"power": k, "says": "a < b"}, k=W.IntSlider(3, 1, 9))
    bundle = ex._repr_mimebundle_()
    assert "image/png" not in bundle and "a &lt; b" in bundle["text/html"] and len(ex.children) == 2


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"k": 99}, "goes from 1 to 9"),
        ({"k": "three"}, "does not fit"),
        ({"bits": 3}, "no control 'bits'; it has k"),
        ({"preset": "big"}, "no preset 'big'"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_and_changes_nothing(values, says):
    ex = simple()
    with pytest.raises(ValueError, match=says):
        ex.set(**values)
    assert ex.values == {"k": 3} and ex.result["power"] == 1.5


def test_an_error_of_compute_is_shown_to_who_moves_a_slider_and_raised_to_code():
    def compute(k):
        if k == 7:
            raise ValueError("seven is <odd>")
        return {"k": k}

    ex = Explorer(compute, k=W.IntSlider(3, 1, 9))
    with pytest.raises(ValueError, match="seven"):
        ex.set(k=7)
    assert ex.values == {"k": 3}
    ex.controls["k"].value = 7
    assert "role='alert'" in ex._numbers.value and "&lt;odd&gt;" in ex._numbers.value
    ex.controls["k"].value = 8
    assert ex.result == {"k": 8} and "alert" not in ex._numbers.value


def test_a_preset_sets_its_controls_and_a_control_moved_leaves_it():
    ex = simple(presets={"low": {"k": 1}, "high": {"k": 9}})
    assert ex._preset.value == CUSTOM
    ex._preset.value = "high"
    assert ex.values == {"k": 9} and repr(ex) == "Explorer(preset='high') -> power 4.5"
    ex.controls["k"].value = 8
    assert ex._preset.value == CUSTOM and ex.set(preset="low").values == {"k": 1}


# every explorer
@every_explorer
def test_two_of_a_kind_are_equal_and_every_description_is_wide_enough(make):
    is_the_same_twice(make)


@pytest.mark.alone
@every_explorer
def test_every_control_redraws_within_200_ms(make):
    redraws_within_200_ms(make)


# model calculator
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("SmolLM2-135M", 134_515_008),
        ("Qwen2.5-0.5B", 494_032_768),
        ("Qwen3-0.6B", 596_049_920),
        ("GPT-2", 124_439_808),
        ("Llama-2-7B", 6_738_415_616),
        ("LLaMA-3-8B", 8_030_261_248),
        ("LLaMA-3-70B", 70_553_706_496),
    ],
)
def test_a_preset_counts_the_parameters_of_the_real_model(name, count):
    assert sum(parameters(MODELS[name]).values()) == count
    with torch.device("meta"):
        model = hugging_face(MODELS[name])
    assert sum(p.numel() for p in model.parameters()) == count


def hugging_face(shape: Shape):
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

    if shape.family == "GPT-2":
        config = GPT2Config(
            n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, vocab_size=shape.vocabulary,
            n_inner=shape.d_ff, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    else:
        config = {"Llama": LlamaConfig, "Qwen2": Qwen2Config, "Qwen3": Qwen3Config}[shape.family](
            num_hidden_layers=shape.layers, hidden_size=shape.width, num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, intermediate_size=shape.d_ff,
            vocab_size=shape.vocabulary, tie_word_embeddings=shape.tied,
        )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_and_flops_are_those_of_the_library(family):
    shape = Shape(2, 64, 4, 4 if family == "GPT-2" else 2, 16, 96, 512, family == "GPT-2", family)
    model = use_linear_everywhere(hugging_face(shape))
    assert parameters(shape) == parameters_by_part(model)
    counted = flops(model, context=64)
    assert flop_per_token(shape, 64) == (counted.prefill_per_token, counted.decode_per_token)


def test_an_8b_model_in_16_bits_weighs_16_gb_and_a_70b_model_141():
    ex = model_calculator().set(preset="LLaMA-3-8B", bits=16)
    assert ex.result["weights_bytes"] == 8_030_261_248 * 2 and "weights 16.06 GB" in repr(ex)
    assert kv_cache_bytes(MODELS["LLaMA-3-8B"], 8192) == 2**30
    ex.set(preset="LLaMA-3-70B", device="A100 80GB")
    assert round(ex.result["weights_bytes"] / 1e9) == 141 and not ex.result["fits_in_memory"]
    assert ex.result["fastest_tokens_per_s"] is None and "too big by" in ex.result["says"]


def test_the_fastest_decode_is_the_roofline():
    shape, device = MODELS["Llama-2-7B"], DEVICES["RTX 4090"]
    result = calculate(shape, context=1024, device=device)
    read = (
        sum(parameters(shape).values()) * 2 - 32000 * 4096 * 2 - 65 * 4096 * 2 + kv_cache_bytes(shape, 1024)
    )
    assert result["bound_by"] == "memory"
    assert result["fastest_tokens_per_s"] == pytest.approx(1008e9 / read)
    many = calculate(shape, context=32, batch=512, bits=4, device=DEVICES["H100"])
    assert many["bound_by"] == "compute"
    assert many["fastest_tokens_per_s"] == pytest.approx(989.4e12 / many["decode_per_token_flop"])


def test_a_context_beyond_learned_positions_is_said():
    ex = model_calculator().set(preset="GPT-2", context=2048)
    assert ex.result["says"].endswith("But GPT-2 has positions for 1,024 tokens only.")
    assert "positions" not in ex.set(context=1024).result["says"]


def test_heads_that_kv_heads_cannot_share_are_not_on_offer():
    ex = model_calculator()
    ex.controls["heads"].value = 14
    assert ex.controls["kv_heads"].options == (1, 2, 7, 14) and ex.values["kv_heads"] == 2
    with pytest.raises(ValueError, match="kv_heads=3 does not fit; choose one of 1, 2, 7, 14"):
        ex.set(kv_heads=3)
    with pytest.raises(ValueError, match="must divide"):
        Shape(2, 64, 4, 3, 16, 96, 512, True)


def test_this_machine_can_be_one_of_the_devices():
    here = this_machine(Roofline(20.0, 22.0, 400.0, 5.0, "cpu", "bfloat16"), memory_gb=8)
    assert (here.gb_per_s, here.gflop_per_s) == (22.0, 400.0)
    ex = model_calculator(here).set(device="this machine")
    assert ex.result["fastest_tokens_per_s"] < 22e9 / 269e6
    assert latency_dissector(here).set(device="this machine").result["tpot_ms"] > 12


# latency dissector
def test_the_parts_of_a_request_add_up():
    knobs = {"prompt": 256, "new": 64, "batch": 1, "bytes_per_weight": 2.0, "overhead_us": 1000}
    result = dissect(MODELS["SmolLM2-135M"], DEVICES["laptop"], **knobs)
    assert result["total_ms"] == pytest.approx(result["ttft_ms"] + 64 * result["tpot_ms"])
    assert sum(result[f"{r}_share"] for r in ("overhead", "memory", "compute")) == pytest.approx(1)
    assert result["overhead_share"] > 0.8 and result["says"].startswith("Overhead dominates")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"overhead_us": 0}, "Memory"),
        ({"overhead_us": 0, "prompt": 8192, "new": 1}, "Compute"),
        ({"overhead_us": 2000}, "Overhead"),
    ],
)
def test_the_regime_that_dominates_is_named(changed, reason):
    assert latency_dissector().set(**changed).result["says"].startswith(f"{reason} dominates")


# number line
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_at_the_weights_own_ends_the_line_is_the_library_s_grid(bits, symmetric):
    row = torch.tensor([EXAMPLE])
    result = round_on_line(EXAMPLE, min(EXAMPLE), max(EXAMPLE), bits, symmetric)
    encoded = Int(bits, symmetric=symmetric).encode(row)
    assert_close(torch.tensor(result["rounded"]), encoded.dense()[0])
    assert result["scale"] == encoded.scale.item() and result["clipped_weights"] == 0
    assert result["max_error"] <= 0.51 * result["scale"]


def test_weights_on_the_grid_have_no_error():
    weights = [0.25 * k for k in range(-3, 5)]
    result = round_on_line(weights, -0.75, 1.0, 3, False)
    assert result["max_error"] == result["rms_error"] == 0 and result["zero_point"] == 3


def test_a_narrow_range_clips_and_a_wide_one_is_coarse():
    ex = number_line()
    own = ex.result["rms_error"]
    assert ex.set(low=-0.3, high=0.3).result["clipped_weights"] == 7
    assert ex.set(low=-1.9, high=1.9).result["rms_error"] > own
    assert ex.set(bits=8, low=-0.92, high=1.27).result["rms_error"] < 0.004


def test_a_line_without_a_range_or_without_weights_is_refused():
    with pytest.raises(ValueError, match="low end below"):
        number_line().set(low=0, high=0)
    for bad in ([], [0.0], [float("nan")], torch.ones(201)):
        with pytest.raises(ValueError, match="1 to 200 finite weights"):
            number_line(bad)


# group explorer
@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("group_size", ["row", 64, "matrix"])
def test_error_and_bits_are_the_library_s(zero, group_size):
    weight, grid = matrix(64, 128), make_grid(4, group_size, zero)
    result = round_matrix(weight, grid)
    encoded = grid.encode(weight)
    assert result["relative_error"] == pytest.approx(
        ((encoded.dense() - weight).norm() / weight.norm()).item()
    )
    # the file fills up the last byte of the zero points
    stored = QuantLinear(encoded).stored_bits() / weight.numel()
    assert bits_per_weight(grid, (64, 128)) == pytest.approx(stored, abs=0.004)


def test_eight_bits_lose_nearly_nothing_and_smaller_groups_lose_less():
    ex = group_explorer(matrix())
    assert ex.set(bits=8, group_size=16).result["relative_error"] < 0.005
    errors = [e for _, _, e in ex.set(bits=4).result["curve"]]
    assert errors == sorted(errors, reverse=True) and ex.result["relative_error"] == errors[-1]


def test_only_group_sizes_that_divide_are_on_offer_and_a_large_matrix_is_cut():
    ex = group_explorer(matrix(1000, 576))
    assert ex.controls["group_size"].options == ("matrix", "row", 192, 96, 64, 32, 16)
    assert ex.result["rows"] == "first 694 of 1000"
    for bad in (torch.zeros(4, 4), torch.ones(3), torch.full((4, 4), float("inf"))):
        with pytest.raises(ValueError, match="weight"):
            group_explorer(bad)


# outlier injector
def test_an_outlier_of_zero_changes_nothing():
    weight = matrix(96, 192)
    assert torch.equal(inject(weight, 0, 5, 7), weight)
    result = outlier_injector(weight).set(outlier=0).result
    assert {k: result[f"{k}_error"] for k in KINDS} == result["before"]


def test_rounding_only_the_outlier_s_row_anew_equals_rounding_all():
    weight, kinds = matrix(96, 192), grids(4, 64, False)
    without = {kind: rounding_error(weight, grid) for kind, grid in kinds.items()}
    quick = spoilt_errors(weight, 80, 5, 7, kinds, without)
    for kind, grid in kinds.items():
        assert torch.equal(quick[kind], rounding_error(inject(weight, 80, 5, 7), grid))


def test_an_outlier_harms_the_tensor_most_and_the_group_least():
    result = outlier_injector(matrix()).set(outlier=200).result
    harm = [result[f"{kind}_error"] / result["before"][kind] for kind in KINDS]
    assert harm[0] > 3 > harm[1] > harm[2] >= 1
    assert outlier_injector(matrix()[0]).set(outlier=0).result["per_group_error"] < 0.01


# guess
def test_a_guess_answers_how_close_it_was():
    guess = Guess("How many MB?", low=0, high=1000, unit="MB")
    assert repr(guess.reveal(269.0)).startswith("No guess yet: it is 269 MB.")
    assert repr(guess) == "How many MB? [0 to 1000 MB] no guess yet"
    assert guess.commit(260).reveal(269.0) == "You guessed 260 MB; it is 269 MB. Within 3.5 %: very close."
    assert "factor of 2.00" in guess.commit(538).reveal(269) and "right" in guess.commit(269).reveal(269)
    assert "Off by 5." in Guess("How much?", low=-1.0, high=1.0).commit(-2).reveal(3)


def test_a_choice_is_committed_by_choosing():
    guess = Guess("Which part?", ["attention", "the MLP"])
    guess.control.value = "attention"
    assert guess.reveal("the MLP") == "You guessed attention; it is the MLP."
    with pytest.raises(ValueError, match="not a choice"):
        guess.commit("neither")
    with pytest.raises(ValueError, match="either choices, or low and high"):
        Guess("Which?")
    assert "text/html" in guess._repr_mimebundle_()


# pictures and numbers
def test_a_picture_reads_as_its_numbers():
    picture = bars({"int8": {"before": 37.0, "after": 21.0}, "int4": {"after": 12.4}}, unit="ms")
    assert repr(picture) == "bars [ms]: int8 before 37, after 21; int4 after 12.4"
    assert picture._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        bars({})


def test_intervals_read_as_mean_and_bounds():
    picture = intervals({"soft": [1.1, 1.2, 1.3], "hard": [2.0, 2.0]}, x="nll (nats a token)")
    assert repr(picture) == "nll (nats a token): soft 1.2 (0.9516 to 1.448); hard 2 (2 to 2)"
    assert picture._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        intervals({}, x="nll")


def test_the_front_keeps_what_none_beats():
    points = [("dense", 200.0, 25.0), ("int4", 60.0, 30.0), ("pruned", 120.0, 60.0), ("same", 200.0, 26.0)]
    assert [name for name, *_ in frontier(points)] == ["int4", "dense"]
    assert "pruned 120 B 60 (beaten)" in repr(pareto(points, log=True))


def test_a_roofline_puts_a_point_without_a_speed_on_the_roof():
    said = repr(roofline(20e9, 400e9, [("decode", 1, None), ("prefill", 200, None), ("here", 1, 7e9)]))
    assert "ridge 20 FLOP/B; decode 1 FLOP/B 20.00 GFLOP/s; prefill 200 FLOP/B 400.0 GFLOP/s" in said
    assert said.endswith("here 1 FLOP/B 7.000 GFLOP/s")
    with pytest.raises(ValueError, match="must be positive"):
        roofline(0, 1)


@pytest.mark.parametrize(
    ("name", "value", "words", "number"),
    [
        ("weights_bytes", 16060522496, "weights", "16.06 GB"),
        ("kv_cache_bytes", 999, "KV cache", "999 B"),
        ("decode_per_token_flop", 999_980_000, "decode per token", "1.000 GFLOP"),
        ("ttft_ms", 95.4867, "TTFT", "95.49 ms"),
        ("fastest_tokens_per_s", 12345.6, "fastest", "12,346 tokens/s"),
        ("memory_share", 0.876, "memory", "88 %"),
        ("parameters", 8030261248, "parameters", "8,030,261,248"),
        ("fits", True, "fits", "yes"),
        ("rms_error", 0.0123456, "RMS error", "0.01235"),
    ],
)
def test_a_number_is_shown_with_the_unit_that_its_name_ends_in(name, value, words, number):
    assert (label(name), say(name, value)) == (words, number)
