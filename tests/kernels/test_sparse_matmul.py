"""Layouts bit by bit; every rung against float64, its own .cu file run on the CPU; what it compiles to."""

import re
import shutil
import subprocess
from functools import partial

import pytest
import torch

from lightlib.kernels import host
from lightlib.kernels.sparse_matmul import bitmap, csl
from lightlib.kernels.sparse_matmul.launch import HERE, bitmap_matmul, csl_matmul, splits_for, tokens_at_once
from lightlib.kernels.sparse_matmul.reference import matmul

SHAPES = [(1, 8), (63, 64), (65, 72), (128, 64), (257, 520)]
needs_compiler = pytest.mark.skipif(not host.compiler(), reason="no g++ to run kernels on the CPU")
RUNGS = [*(partial(csl_matmul, rung=f"csl_v{i}") for i in (1, 2, 3, 4)), bitmap_matmul]
NAMES = ["csl_v1", "csl_v2", "csl_v3", "csl_v4", "bitmap"]
every_layout = pytest.mark.parametrize("layout", [csl, bitmap], ids=["csl", "bitmap"])
every_rung = pytest.mark.parametrize("rung", RUNGS, ids=NAMES)


def weight(shape, sparsity, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=generator).to(dtype)
    return torch.where(torch.rand(shape, generator=generator) >= sparsity, W, torch.zeros((), dtype=dtype))


def encoded(rung, W):
    return bitmap.encode(W) if rung is bitmap_matmul else csl.encode(W)


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
    assert stored.tiles == (3, 3 if layout is csl else 2)


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
    slot = tile.words.long() >> 16
    fullest = (slot // 2 % 32).bincount(minlength=32).max().item()
    groups = len(slot) // 128 * 4 + 4 * (len(slot) % 128 > 0)
    assert csl.conflicts(tile) * groups <= 1.15 * max(fullest, groups)


# kernels, on the CPU
@needs_compiler
@every_rung
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "tokens", "sparsity"), [((128, 64), 8, 0.5), ((130, 136), 5, 0.7), ((33, 72), 17, 0.0)]
)
def test_a_rung_multiplies_right(rung, dtype, shape, tokens, sparsity):
    W, x = weight(shape, sparsity, dtype), torch.randn(tokens, shape[1]).to(dtype)
    y, exact = rung(encoded(rung, W), x, host.launch), matmul(W, x)
    # the sums are float32, so what is lost is the rounding of the output
    assert (y.double() - exact).norm() <= (1e-3 if dtype == torch.float16 else 6e-3) * exact.norm()
    worst = (y.double() - exact).abs() / exact.abs().clamp_min(exact.abs().mean() * 1e-2)
    assert worst.max() < (2e-3 if dtype == torch.float16 else 1e-2)


@needs_compiler
@pytest.mark.parametrize("rung", [RUNGS[3], bitmap_matmul], ids=["csl_v4", "bitmap"])
@pytest.mark.parametrize("splits", [2, 3, 5])
def test_split_columns_give_the_same_whole(rung, splits):
    W, x = weight((130, 584), 0.7), torch.randn(6, 584).bfloat16()
    stored = encoded(rung, W)
    whole, parts = rung(stored, x, host.launch), rung(stored, x, host.launch, splits=splits)
    torch.testing.assert_close(parts, whole, rtol=1e-2, atol=1e-2)
    assert same_bits(parts, rung(stored, x, host.launch, splits=splits))  # always in one order


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
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc to compile kernels with")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_compiles_without_spilling_registers(name, arch, tmp_path):
    macros = ["-DBN=16", "-DVECTORS=6", "-DCAPACITY=1184", "-DSTAGES=3", "-DBF16"]
    prelude = HERE.parent / "cuda" / "device.h"
    said = subprocess.run(
        ["nvcc", "-cubin", f"-arch={arch}", "-std=c++17", "-Xptxas=-v", f"-I{HERE}", "-include", str(prelude),
         *macros, "-o", str(tmp_path / "kernel.cubin"), str(HERE / f"{name}.cu")],
        capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said
    assert int(re.search(r"Used (\d+) registers", said)[1]) <= 128  # four blocks of 128 threads and more
