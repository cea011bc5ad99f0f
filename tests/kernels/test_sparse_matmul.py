"""Layouts bit by bit; every rung against float64, its own .cu file run on the CPU; what it compiles to."""

from functools import partial

import pytest
import torch

from lightlib.kernels import host
from lightlib.kernels.sparse_matmul import bitmap, compact, csl
from lightlib.kernels.sparse_matmul.launch import (
    HERE,
    bitmap_matmul,
    compact_matmul,
    csl_matmul,
    splits_for,
    tokens_at_once,
)
from lightlib.kernels.sparse_matmul.reference import matmul
from tests.kernels.sass import compiled, main_loop, no_compiler, opcodes, resources

SHAPES = [(1, 8), (63, 64), (65, 72), (128, 64), (257, 520)]
needs_compiler = pytest.mark.skipif(not host.compiler(), reason="no g++ to run kernels on the CPU")
RUNGS = {f"csl_v{i}": (csl, partial(csl_matmul, rung=f"csl_v{i}")) for i in (1, 2, 3, 4)}
RUNGS |= {"csl_v5": (compact, compact_matmul), "bitmap": (bitmap, bitmap_matmul)}
LAYOUTS = [csl, compact, bitmap]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=["csl", "compact", "bitmap"])
every_rung = pytest.mark.parametrize(("layout", "product"), RUNGS.values(), ids=RUNGS)


def weight(shape, sparsity, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=generator).to(dtype)
    return torch.where(torch.rand(shape, generator=generator) >= sparsity, W, torch.zeros((), dtype=dtype))


def same_bits(a, b) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


# layouts
@every_layout
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (129, 65), (5, 1000)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95, 1.0])
def test_a_weight_comes_back_bit_by_bit(layout, shape, sparsity):
    for dtype in (torch.float16, torch.bfloat16):
        W = weight(shape, sparsity, dtype)
        assert same_bits(layout.encode(W).dense(), W)


@every_layout
def test_odd_values_and_an_explicit_mask_are_kept(layout):
    W = weight((130, 72), 0.8)
    W[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-40])
    W[1, 5] = -0.0
    mask = W != 0
    mask[1, 5] = mask[7, 7] = True
    assert same_bits(layout.encode(W, mask).dense(), W)
    dropped = mask & (torch.arange(72) % 3 > 0)
    assert same_bits(
        layout.encode(W, dropped).dense(), torch.where(dropped, W, torch.zeros((), dtype=W.dtype))
    )


@every_layout
def test_one_dense_tile_among_empty_ones(layout):
    W = torch.zeros(384, 192, dtype=torch.float16)
    W[128:256, 64:128] = weight((128, 64), 0.0, torch.float16)
    stored = layout.encode(W)
    assert same_bits(stored.dense(), W)
    assert stored.tiles == (3, 2 if layout is bitmap else 3)


@every_layout
def test_values_of_another_size_are_refused(layout):
    with pytest.raises(TypeError, match="16-bit values, not"):
        layout.encode(torch.zeros(8, 8))


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_bytes_are_those_of_the_formula(sparsity):
    W = weight((512, 1024), sparsity)
    kept, tiled, bits = int((W != 0).sum()), csl.encode(W), bitmap.encode(W)
    # a tile is filled up with at most 3 words of 32 bits, or 7 values of 16
    assert 0 <= tiled.stored_bits() - 32 * (kept + 64 + 1) <= 64 * 3 * 32
    starts = 32 * 16 * 8  # 16 bits for each of 8 strips of 32 tiles
    assert 0 <= bits.stored_bits() - 16 * kept - W.numel() - starts - 32 * (32 + 1) <= 32 * 7 * 16


def test_a_slot_is_a_place_and_eight_rows_of_a_chunk_lie_in_eight_banks():
    row, column = torch.arange(128)[:, None], torch.arange(64)
    slot = csl.slots(row, column)
    assert torch.equal(slot.flatten().sort().values, torch.arange(128 * 64))
    back = csl.place(slot)
    assert (back[0] == row).all() and (back[1] == column).all()
    for chunk in range(0, 64, 8):
        banks = slot[8:16, chunk] // 2 % 32 // 4  # groups of four banks, 16 bytes
        assert len(set(banks.tolist())) == 8


@pytest.mark.parametrize(
    ("sparsity", "most"), [(0.0, 1.0), (0.5, 1.25), (0.7, 1.35), (0.8, 1.45), (0.9, 1.6)]
)
def test_the_order_of_words_spares_most_bank_conflicts(sparsity, most):
    W = weight((256, 512), sparsity)
    ordered, plain = csl.encode(W), csl.encode(W, reorder=False)
    assert csl.conflicts(ordered) <= most < 1.95 <= csl.conflicts(plain)
    assert same_bits(ordered.dense(), plain.dense())
    assert torch.equal(ordered.offsets, plain.offsets)


def test_the_least_conflicts_there_can_be_are_reached():
    # a warp's store takes as long as its fullest bank, and a tile at least as long as its fullest bank
    W = weight((128, 64), 0.75)
    tile = csl.encode(W)
    slot = tile.words.long() >> 17
    fullest = (slot // 2 % 32).bincount(minlength=32).max().item()
    groups = len(slot) // 128 * 4 + 4 * (len(slot) % 128 > 0)
    assert csl.conflicts(tile) * groups <= 1.15 * max(fullest, groups)


def test_bitmap_reads_meet_the_conflicts_of_random_places():
    found = [bitmap.conflicts(bitmap.encode(weight((256, 512), sparsity))) for sparsity in (0.5, 0.7, 0.9)]
    assert found == pytest.approx([2.6, 1.8, 1.15], rel=0.06)
    # where all is stored, each lane begins 32 banks after the one before; with a value each, they share cells
    assert bitmap.conflicts(bitmap.encode(torch.ones(128, 128).half())) == 32
    first = bitmap.from_lanes(torch.eye(64)[0].short().expand(8, 32, 64).contiguous(), (1, 1))
    assert bitmap.conflicts(bitmap.encode(first.half())) == 1


# kernels, on the CPU
@needs_compiler
@every_rung
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "tokens", "sparsity"), [((128, 64), 8, 0.5), ((130, 136), 5, 0.7), ((33, 72), 17, 0.0)]
)
def test_a_rung_multiplies_right(layout, product, dtype, shape, tokens, sparsity):
    W, x = weight(shape, sparsity, dtype), torch.randn(tokens, shape[1]).to(dtype)
    y, exact = product(layout.encode(W), x, host.launch), matmul(W, x)
    # the sums are float32, so what is lost is the rounding of the output
    assert (y.double() - exact).norm() <= (1e-3 if dtype == torch.float16 else 6e-3) * exact.norm()
    worst = (y.double() - exact).abs() / exact.abs().clamp_min(exact.abs().mean() * 1e-2)
    assert worst.max() < (2e-3 if dtype == torch.float16 else 1e-2)


@needs_compiler
@pytest.mark.parametrize("name", ["csl_v4", "csl_v5", "bitmap"])
@pytest.mark.parametrize("splits", [2, 3, 5])
def test_split_columns_give_the_same_whole(name, splits):
    W, x = weight((130, 584), 0.7), torch.randn(6, 584).bfloat16()
    layout, product = RUNGS[name]
    stored = layout.encode(W)
    whole, parts = product(stored, x, host.launch), product(stored, x, host.launch, splits=splits)
    torch.testing.assert_close(parts, whole, rtol=1e-2, atol=1e-2)
    assert same_bits(parts, product(stored, x, host.launch, splits=splits))  # always in one order


@needs_compiler
def test_a_tile_with_more_words_than_a_thread_can_hold_is_read_late_and_right():
    W, x = weight((128, 128), 0.0), torch.randn(8, 128).bfloat16()
    y = csl_matmul(csl.encode(W), x, host.launch, vectors=1)
    exact = matmul(W, x)
    assert (y.double() - exact).norm() <= 6e-3 * exact.norm()


@needs_compiler
def test_too_little_shared_memory_is_noticed():
    W, x = weight((128, 64), 0.5), torch.randn(8, 64).bfloat16()

    def short(*args, shared_bytes):
        host.launch(*args, shared_bytes=shared_bytes - 128)

    with pytest.raises(RuntimeError, match="beyond the"):
        csl_matmul(csl.encode(W), x, short, rung="csl_v2")


def test_inputs_that_no_kernel_reads_are_refused():
    stored = csl.encode(weight((128, 64), 0.5))
    with pytest.raises(ValueError, match=r"takes \(tokens, 64\)"):
        csl_matmul(stored, torch.zeros(4, 72).bfloat16(), host.launch)
    with pytest.raises(ValueError, match="cast one of them"):
        csl_matmul(stored, torch.zeros(4, 64).half(), host.launch)
    with pytest.raises(ValueError, match="not a multiple of 8"):
        csl_matmul(csl.encode(weight((8, 12), 0.5)), torch.zeros(4, 12).bfloat16(), host.launch)


def test_the_grid_fills_a_gpu_and_no_part_is_empty():
    assert [tokens_at_once(n) for n in (1, 8, 9, 16, 33, 64, 100)] == [8, 8, 16, 16, 64, 64, 64]
    assert (
        splits_for(32, 1, 64, 132) == 13
        and splits_for(32, 1, 4, 132) == 4
        and splits_for(500, 1, 64, 132) == 1
    )


# what the compiler makes of them
KNOBS = {"VECTORS": 5, "CAPACITY": 1184, "STAGES": 3, "BF16": 1}
needs_nvcc = pytest.mark.skipif(bool(no_compiler()), reason=no_compiler())


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("tokens", [8, 16, 32, 64])
@pytest.mark.parametrize("name", RUNGS)
def test_a_kernel_compiles_without_spilling_registers(name, tokens, arch):
    used = resources(compiled(HERE / f"{name}.cu", arch, BN=tokens, **KNOBS))
    if name != "csl_v1" or tokens < 64:  # the plain rung keeps a sum for each token
        assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] <= (128 if tokens <= 32 else 168)  # four or three blocks of 128 threads


# instructions a weight in the loop over tiles, as counted, for so many loads ahead: about 70 % zeros
@needs_nvcc
@pytest.mark.parametrize(
    ("name", "weights", "ahead", "counted"),
    [("csl_v4", 64, 5, 3.6), ("csl_v4", 64, 4, 3.4), ("csl_v5", 64, 3, 5.5), ("bitmap", 128, 0, 7.0)],
)
def test_a_weight_costs_few_instructions(name, weights, ahead, counted):
    cubin = compiled(HERE / f"{name}.cu", "sm_90", **(KNOBS | {"BN": 16, "VECTORS": ahead}))
    names = opcodes(main_loop(cubin))
    assert sum("HMMA" in each for each in names) == weights // 4
    assert len(names) / weights <= 1.1 * counted
    if name != "bitmap":  # a value is stored by two instructions, where it goes and that it goes
        assert sum(each.startswith("STS.U16") for each in names) >= 4 * ahead
