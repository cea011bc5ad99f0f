"""The explorers of sparse kernels: equal to the layouts, to the arithmetic of rooflines, and quick."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from lightlib.kernels.results import file_for
from lightlib.kernels.sparse_matmul import bitmap, compact, csl, ell
from lightlib.kernels.sparse_matmul.launch import HERE
from lightlib.widgets.bank_conflicts import bank_conflicts, packed, stores, turns_of, words_by_bank
from lightlib.widgets.devices import DEVICES, GPUS
from lightlib.widgets.pipeline_timeline import TILES, at, pipeline_timeline, schedule, stage_us, tile_us
from lightlib.widgets.sparse_roofline import (
    LANES_A_CLOCK,
    SHAPES,
    SPARSITIES,
    STORAGES,
    TOKENS,
    break_even,
    instructions_per_s,
    sparse_roofline,
    speed,
    times_us,
)
from tests.explorers import is_the_same_twice, redraws_within_200_ms
from tests.kernels.sass import compiled, main_loop, opcodes
from tests.kernels.test_sparse_matmul import needs_nvcc

GATE_UP, OPT = "Llama-7B gate+up, 22016 x 4096", "OPT-30B fc1, 28672 x 7168"
every_explorer = pytest.mark.parametrize("make", [pipeline_timeline, sparse_roofline, bank_conflicts])


@every_explorer
def test_two_of_a_kind_are_equal_and_every_description_is_wide_enough(make):
    is_the_same_twice(make)


@pytest.mark.alone
@every_explorer
def test_every_control_redraws_within_200_ms(make):
    redraws_within_200_ms(make)


def test_an_h200_is_an_h100_with_a_wider_memory_and_models_are_not_weighed_on_it():
    assert replace(GPUS["H200"], name="H100", memory_gb=80, gb_per_s=3350) == DEVICES["H100"]
    assert set(GPUS) - set(DEVICES) == {"H200"} and all(gpu.multiprocessors for gpu in GPUS.values())


@pytest.mark.parametrize(("name", "flop_a_clock"), [("A100 80GB", 2048), ("RTX 4090", 1024 / 2)])
def test_the_clock_of_a_sheet_gives_its_peak(name, flop_a_clock):
    gpu = GPUS[name]
    peak = gpu.multiprocessors * gpu.ghz * flop_a_clock
    assert peak == pytest.approx(gpu.gflop_per_s, rel=1e-3)


# pipeline timeline
TIMES = [(3.0, 1.0, 0.5), (1.0, 2.0, 4.0), (1.0, 1.0, 1.0), (0.25, 4.0, 0.0)]  # load, extract, multiply
every_way = pytest.mark.parametrize(("buffers", "held"), [(1, 1), (1, 2), (2, 1), (2, 2)])


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("held", [1, 2])
def test_with_one_buffer_a_product_takes_the_sum_of_all(times, held):
    spans = schedule(*times, 1, 5, held)
    assert max(end for *_, end in spans) == pytest.approx(5 * sum(times))


@pytest.mark.parametrize("times", TIMES)
def test_with_two_buffers_every_tile_but_the_edges_takes_the_longer_of_both(times):
    load, extract, multiply = times
    end = max(end for *_, end in schedule(*times, 2, 7))
    assert end == pytest.approx(load + 6 * max(load, extract + multiply) + extract + multiply)


@pytest.mark.parametrize("times", TIMES)
def test_with_room_for_the_words_of_one_tile_only_the_multiplication_is_covered(times):
    load, extract, multiply = times
    end = max(end for *_, end in schedule(*times, 2, 7, held=1))
    assert end == pytest.approx(load + 6 * (extract + max(load, multiply)) + extract + multiply)


@pytest.mark.parametrize("times", TIMES)
@every_way
def test_no_unit_does_two_things_at_once_and_a_tile_goes_through_its_stages_in_turn(times, buffers, held):
    spans = schedule(*times, buffers, 6, held)
    assert len(spans) == 18
    for stage, length in zip(("load", "extract", "multiply"), times, strict=True):
        mine = sorted((begin, end) for name, _, begin, end in spans if name == stage)
        assert all(end - begin == pytest.approx(length) for begin, end in mine)
        assert all(one[1] <= other[0] + 1e-9 for one, other in pairwise(mine))
    for tile in range(6):
        steps = {name: (begin, end) for name, t, begin, end in spans if t == tile}
        assert steps["load"][1] <= steps["extract"][0] and steps["extract"][1] <= steps["multiply"][0]
    # one block's threads extract and multiply, so never both at a time
    ours = sorted((begin, end) for name, _, begin, end in spans if name != "load")
    assert all(one[1] <= other[0] + 1e-9 for one, other in pairwise(ours))
    # a tile's words go where those of the tile `held` before it were
    loads, extracts = ({t: s for s in spans if s[0] == n for t in [s[1]]} for n in ("load", "extract"))
    assert all(loads[t][2] >= extracts[t - held][3] - 1e-9 for t in range(held, 6))


def test_no_tiles_take_no_time_and_a_single_one_cannot_overlap():
    assert schedule(1, 1, 1, 2, 0) == []
    assert schedule(1, 2, 3, 2, 1) == schedule(1, 2, 3, 1, 1) == [
        ("load", 0, 0.0, 1), ("extract", 0, 1, 3), ("multiply", 0, 3, 6),
    ]  # fmt: skip


def test_with_all_weights_kept_four_bytes_take_twice_as_long_as_two():
    for device in GPUS:
        result = pipeline_timeline().set(sparsity=0, device=device).result
        assert result["times_dense"] == pytest.approx(0.5) and result["memory_waits_share"] == 0


@pytest.mark.parametrize(("device", "bytes_a_clock"), [("H100", 13.0), ("H200", 18.6), ("RTX 4090", 2.9)])
def test_a_multiprocessor_gets_its_share_of_the_bandwidth(device, bytes_a_clock):
    gpu = GPUS[device]
    clocks = stage_us(gpu, 0.5, 64, 16)["load"] * gpu.ghz * 1e3
    assert 128 * 64 / 2 * 4 / clocks == pytest.approx(bytes_a_clock, rel=0.04)


def test_extraction_takes_the_clocks_of_its_instructions():
    gpu = GPUS["H100"]
    for sparsity, instructions in ((0.5, 4.25), (0.7, 3.55), (0.8, 3.2)):
        clocks = stage_us(gpu, sparsity, 128, 16)["extract"] * gpu.ghz * 1e3 - 100
        assert clocks * LANES_A_CLOCK * 0.7 / (128 * 128) == pytest.approx(instructions, rel=0.01)


@needs_nvcc
@pytest.mark.parametrize(
    ("name", "kernel", "weights", "ahead", "density"),
    [
        ("csl", "csl_v4", 64, 2, 1 / 8), ("csl", "csl_v4", 64, 9, 9 / 16),
        ("compact", "csl_v5", 64, 1, 1 / 8), ("compact", "csl_v5", 64, 5, 5 / 8),
        ("bitmap", "bitmap", 128, 1, 0.5),
    ],
)  # fmt: skip
def test_instructions_are_those_of_the_compiled_kernels(name, kernel, weights, ahead, density):
    knobs = {"BN": 16, "VECTORS": ahead, "CAPACITY": 1184, "STAGES": 3, "BF16": 1}
    counted = len(opcodes(main_loop(compiled(HERE / f"{kernel}.cu", "sm_90", **knobs)))) / weights
    storage = STORAGES[name]
    assert storage.weight_work + storage.value_work * density == pytest.approx(counted, rel=0.05)


def test_wider_tiles_are_quicker_a_weight_and_tokens_below_eight_cost_as_many_as_eight():
    gpu = GPUS["H100"]
    each = [stage_us(gpu, 0.9, columns, 16)["extract"] / columns for columns in (32, 64, 128)]
    assert each == sorted(each, reverse=True)
    assert stage_us(gpu, 0.9, 64, 1) == stage_us(gpu, 0.9, 64, 8)
    assert stage_us(gpu, 0.9, 64, 16)["multiply"] == pytest.approx(2 * stage_us(gpu, 0.9, 64, 8)["multiply"])


@every_way
def test_the_timeline_shows_what_its_numbers_say(buffers, held):
    ex = pipeline_timeline().set(sparsity=80, buffers=buffers, held=held)
    result, stages = ex.result, ex.result["stages"]
    three = [stages[name] for name in ("load", "extract", "multiply")]
    ends = [max(e for *_, e in schedule(*three, buffers, n, held)) for n in (TILES, TILES - 1)]
    assert result["tile_us"] == pytest.approx(ends[0] - ends[1])
    assert result["times_dense"] == pytest.approx(stages["dense"] / result["tile_us"])
    assert result["memory_waits_share"] == pytest.approx(1 - stages["load"] / result["tile_us"])
    assert result["shared_memory_bytes"] == buffers * (128 * 64 * 2 + 16 * 64 * 2)  # a tile and its inputs


def test_the_cursor_walks_from_the_first_load_to_the_end():
    ex = pipeline_timeline()
    assert (
        ex.set(moment=0)
        .result["says"]
        .startswith("At 0 µs: memory loads tile 1, cores idle, tensor cores idle.")
    )
    assert ex.set(moment=100).result["moment"][0] == pytest.approx(ex.result["spans"][-1][3])
    assert at(schedule(1, 2, 3, 2, 2), 1.5) == "memory loads tile 2, cores extract tile 1, tensor cores idle"
    assert at(schedule(1, 2, 3, 1, 2), 3.5) == "memory idle, cores idle, tensor cores multiply tile 1"


def test_it_says_why_memory_waits():
    ex = pipeline_timeline().set(sparsity=50)
    assert "Memory never waits" in ex.result["says"]
    assert "one thing happens at a time" in ex.set(buffers=1).result["says"]
    assert "no room until" in ex.set(buffers=2, held=1).result["says"]
    assert "take longer than loading" in ex.set(sparsity=95, held=2).result["says"]
    # a load that the multiplication covers needs no more room
    assert "take longer than loading" in ex.set(sparsity=85, tokens=64, held=1).result["says"]


def test_play_moves_the_moment_in_the_browser():
    ex = pipeline_timeline()
    play = ex.children[0].children[-1]
    assert (play.min, play.max) == (ex.controls["moment"].min, ex.controls["moment"].max)
    assert set(ex.controls) == set(ex.values) and "moment=40" in repr(ex)


def test_two_buffers_are_never_slower_than_one():
    for sparsity in (0, 0.5, 0.9):
        stages = stage_us(GPUS["H100"], sparsity, 64, 16)
        one, held_1, held_2 = (tile_us(stages, *way) for way in ((1, 1), (2, 1), (2, 2)))
        assert one >= held_1 >= held_2 >= stages["load"]


# sparse roofline
def where(tokens, device="H100", shape=GATE_UP, decode=False):
    return GPUS[device], SHAPES[shape], tokens, decode


def test_no_bytes_but_those_of_inputs_and_outputs_and_no_work_take_the_time_of_the_arithmetic():
    nothing = replace(STORAGES["bitmap"], weight_bytes=0, value_bytes=0, weight_work=0)
    gpu, shape, *_ = where(1)
    times = times_us(gpu, shape, 1, 0)
    assert (
        times["memory"] == pytest.approx(2 * (22016 + 4096) / (0.9 * 3350e9) * 1e6) and not times["decoding"]
    )
    assert speed(nothing, 1.0, *where(64))[1] == "tensor cores"
    dense = replace(STORAGES["csl"], weight_bytes=2, value_bytes=0)
    for tokens in TOKENS:
        assert speed(dense, 0.3, *where(tokens))[0] == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "share"), [("csl", 0.5), ("compact", 0.36), ("ell", 0.35), ("bitmap", 0.065)]
)
@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_for_few_tokens_a_storage_pays_where_its_bytes_are_those_of_dense(name, share, tokens):
    for device in GPUS:
        for shape in SHAPES:
            even = break_even(STORAGES[name], *where(tokens, device, shape))
            assert even == pytest.approx(share, abs=5e-3)
            assert speed(STORAGES[name], even - 0.01, *where(tokens, device, shape))[0] < 1


TABLE = {  # the best possible over dense for few tokens, at 50, 60, 70, 80, 90 % zeros
    "csl": (1.00, 1.25, 1.67, 2.5, 5.0),
    "compact": (1.28, 1.6, 2.13, 3.19, 6.3),
    "ell": (1.31, 1.63, 2.18, 3.27, 6.5),
    "bitmap": (1.77, 2.15, 2.75, 3.8, 6.1),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_speeds_are_those_of_the_bytes(name):
    for shape in (GATE_UP, OPT):
        found = [
            speed(STORAGES[name], s, *where(1 if name == "ell" else 16, shape=shape))
            for s in (0.5, 0.6, 0.7, 0.8, 0.9)
        ]
        assert [times for times, _ in found] == pytest.approx(TABLE[name], rel=0.02)
        assert {limit for _, limit in found} == {"memory"}


def test_the_times_are_those_of_a_reachable_bandwidth():
    gpu = GPUS["H100"]  # 3.0 TB/s, 16 tokens, microseconds
    for shape, stored, us in ((GATE_UP, 2, 60), (GATE_UP, 1.125, 34), (GATE_UP, 1.2, 36), (OPT, 0.8, 55)):
        assert times_us(gpu, SHAPES[shape], 16, stored)["memory"] == pytest.approx(us, rel=0.02)


@pytest.mark.parametrize(
    ("device", "budget"), [("H100", 19.7), ("H200", 13.8), ("A100 80GB", 22.9), ("RTX 4090", 88)]
)
def test_so_many_instructions_a_weight_fit_into_the_time_of_its_two_bytes(device, budget):
    gpu = GPUS[device]
    fit = instructions_per_s(gpu) / 0.7 * 2 / (gpu.gb_per_s * 1e9 * 0.9)
    assert fit == pytest.approx(budget, rel=0.08)  # the A100 was taken to reach 0.83 of its sheet, not 0.9


@pytest.mark.parametrize("device", GPUS)
def test_with_4096_tokens_every_curve_is_one_and_nothing_pays(device):
    result = sparse_roofline().set(tokens=4096, device=device).result
    for name, curve in result["curves"].items():
        np.testing.assert_allclose(curve, 1, err_msg=name)
    assert set(result["even"].values()) == {1.0} and "the limit: tensor cores" in result["says"]


@pytest.mark.parametrize(
    ("name", "module"), [("csl", csl), ("compact", compact), ("bitmap", bitmap), ("ell", ell)]
)
def test_the_bytes_of_a_storage_are_those_of_its_encoder(name, module):
    W = torch.randn(128, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = W.abs().argsort(1).argsort(1) >= 2048  # as many in every row, so row-ELL fills nothing up
    stored = module.encode(W, mask).stored_bits() / 8 / W.numel()
    storage = STORAGES[name]
    assert stored == pytest.approx(storage.weight_bytes + storage.value_bytes / 2, rel=5e-3)


def test_decoding_lowers_a_speed_and_never_raises_it():
    for name, storage in STORAGES.items():
        for sparsity in SPARSITIES[::5]:
            free, worked = (speed(storage, sparsity, *where(1, decode=d)) for d in (False, True))
            assert worked[0] <= free[0]
            assert (worked[1] == "decoding") == (worked[0] < free[0]), name
    # on a slow memory there is time for every instruction
    slow = where(1, "RTX 4090", decode=True)
    assert speed(STORAGES["bitmap"], 0.8, *slow)[1] == "memory"
    assert speed(STORAGES["bitmap"], 0.8, *where(1, decode=True)) == (
        pytest.approx(1.97, rel=0.01),
        "decoding",
    )


def test_row_ell_is_offered_for_one_or_two_tokens_only():
    ex = sparse_roofline().set(tokens=2)
    assert ex.result["ell_times_dense"] > 1 and "ell" in ex.result["curves"]
    assert "ell_times_dense" not in ex.set(tokens=4).result and "row-ELL" not in repr(ex)


def test_it_names_the_best_storage_its_limit_and_what_four_bits_reach():
    ex = sparse_roofline().set(sparsity=50)
    assert ex.result["says"].startswith(
        "Best with 50 % zeros: bitmap, at most 1.77 times dense, limited by memory"
    )
    assert "less than int4 with all weights (3.83)" in ex.result["says"]
    said = ex.set(sparsity=95, tokens=1, limit="decoding too").result["says"]
    assert "row-ELL" in said and "more than int4" in said
    assert "L2 cache (50 MB)" in ex.set(shape="Llama-7B o, 4096 x 4096").result["says"]
    assert "L2" not in ex.set(shape=OPT).result["says"]


def test_without_results_it_says_that_nothing_was_measured(tmp_path):
    ex = sparse_roofline(tmp_path)
    assert ex.result["says"].endswith("Arithmetic, not yet measured on a GPU.") and ex.result["rows"] == []
    assert sparse_roofline(tmp_path / "none").result["rows"] == []


def test_measured_rows_of_the_shown_layer_tokens_and_device_are_drawn(tmp_path):
    row = {
        "layout": "bitmap",
        "n_out": 22016,
        "n_in": 4096,
        "tokens": 16,
        "sparsity": 0.6,
        "times_cublas": 1.5,
    }
    other = {"tokens": 8}, {"n_out": 4096}, {"layout": "another"}
    rows = [
        row,
        {**row, "layout": "csl", "sparsity": 0.7, "times_cublas": 1.4},
        *({**row, **o} for o in other),
    ]
    file = {"device": "NVIDIA H100 80GB HBM3", "rows": rows}
    file_for(file["device"], tmp_path).write_text(json.dumps(file))
    ex, without = sparse_roofline(tmp_path), sparse_roofline(tmp_path / "none")
    assert [(r["layout"], r["times_cublas"]) for r in ex.result["rows"]] == [("bitmap", 1.5), ("csl", 1.4)]
    assert "measured on NVIDIA H100 80GB HBM3" in ex.result["says"] and ex._png != without._png
    for elsewhere in ({"device": "A100 80GB"}, {"shape": OPT}, {"tokens": 64}):
        shown = sparse_roofline(tmp_path).set(**elsewhere)
        assert shown.result["rows"] == []
        assert shown.result["says"].endswith("not yet measured at this setting.")


# bank conflicts
@pytest.mark.parametrize("sparsity", range(30, 96, 5))
def test_the_average_is_that_of_the_encoded_tile_and_by_banks_is_never_slower(sparsity):
    means = []
    for reorder in (False, True):
        tile = packed(sparsity, reorder)
        turns = [words_by_bank(cells).max() for cells in stores(tile)]
        assert np.mean(turns) == pytest.approx(csl.conflicts(tile))
        means.append(csl.conflicts(tile))
    result = bank_conflicts().set(sparsity=sparsity).result
    assert [result["row_by_row_turns"], result["by_banks_turns"]] == means
    assert 1 <= means[1] <= means[0]


@pytest.mark.parametrize("order", ["row by row", "by banks"])
def test_the_banks_hold_each_cell_of_the_store_once(order):
    ex = bank_conflicts().set(sparsity=50, order=order)
    for store in (1, 17, ex.result["stores"]):
        result = ex.set(store=store).result
        assert result["banks"].sum() == len(np.unique(result["cells"])) <= result["words"] <= 32
        assert result["turns"] == result["banks"].max() == result["turn"].max() + 1
        assert result["banks_hit"] == (result["banks"] > 0).sum()


def test_words_that_share_a_bank_take_different_turns_and_halves_of_one_cell_the_same():
    assert turns_of(np.array([0, 32, 64, 1, 33])).tolist() == [0, 1, 2, 0, 1]
    assert turns_of(np.array([7, 7, 39])).tolist() == [0, 0, 1]
    assert words_by_bank(np.array([7, 7, 39]))[7] == 2
    assert turns_of(np.arange(32)).tolist() == [0] * 32


def test_all_words_of_the_tile_are_stored_once():
    tile = packed(70, True)
    groups = stores(tile)
    assert sum(map(len, groups)) == len(tile.words) and max(map(len, groups)) == 32
    cells = np.sort(np.concatenate(groups))
    assert np.array_equal(cells, np.sort((tile.words.long() >> 17).numpy() // 2))


def test_a_tile_with_more_zeros_has_fewer_stores_and_the_slider_follows():
    ex = bank_conflicts().set(sparsity=30, store=184)
    assert ex.set(sparsity=95).values["store"] == ex.controls["store"].max == ex.result["stores"] == 16
    with pytest.raises(ValueError, match="store=17 does not fit; it goes from 1 to 16"):
        ex.set(store=17)
    assert ex.set(sparsity=30).controls["store"].max == 184


def test_it_says_how_many_turns_the_store_takes():
    ex = bank_conflicts()
    assert ex.result["says"] == "Bank 2 holds 3 of these words, so the store takes 3 turns, not 1."
    assert (
        ex.set(order="by banks").result["says"] == "No two words share a bank, so all are stored in one turn."
    )
