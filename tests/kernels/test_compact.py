"""What is compact Tiled-CSL's own: windows, bytes, the order of values."""

import pytest
import torch

from lightlib.kernels import host
from lightlib.kernels.sparse_matmul import compact
from lightlib.kernels.sparse_matmul.launch import compact_matmul
from lightlib.kernels.sparse_matmul.reference import matmul
from tests.kernels.test_sparse_matmul import needs_compiler, same_bits, weight


@pytest.mark.parametrize("rows", [(0, 4), (60, 64), (126, 128), (0, 127)])
def test_a_dense_part_of_a_tile_fills_its_windows(rows):
    W = torch.zeros(128, 64, dtype=torch.float16)
    W[slice(*rows)] = weight((rows[1] - rows[0], 64), 0.0, torch.float16)
    W[rows[1] - 1, 5:] = 0  # the last group is not full
    stored = compact.encode(W)
    assert same_bits(stored.dense(), W)
    kept = int((W != 0).sum())
    assert stored.stored_bits() == 8 * 16 * -(-25 * -(-kept // 8) // 16) + 32 * 2


@pytest.mark.parametrize(
    ("sparsity", "most"), [(0.0, 3.125), (0.5, 3.132), (0.7, 3.136), (0.8, 3.14), (0.9, 3.16), (0.95, 3.22)]
)
def test_bytes_are_those_of_the_formula(sparsity, most):
    W = weight((512, 1024), sparsity)
    kept, stored = int((W != 0).sum()), compact.encode(W)
    groups = len(stored.groups()[0])
    in_tiles = stored.stored_bits() // 8 - 4 * (32 * 2 + 1)
    assert 0 <= in_tiles - 25 * groups < 16 * 64  # each of 64 tiles is filled up to 16 bytes
    assert kept <= 8 * groups <= kept + 7 * 32 * 64  # no more than 32 groups of a tile are not full
    assert 3.125 <= in_tiles / kept <= most


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
def test_a_value_is_stored_once_and_repeated_in_its_own_group_only(sparsity):
    stored = compact.encode(weight((256, 192), sparsity))
    tile, _, slot, _ = stored.groups()
    # two threads must not write to one place
    group = torch.arange(len(tile))[:, None].expand_as(slot)
    places = torch.stack([tile[:, None] * 8192 + slot, group]).flatten(1).unique(dim=1)[0]
    assert len(places) == len(places.unique()) == int((stored.dense() != 0).sum())
    assert (slot.amax(1) - slot.amin(1)).max() < 256


@pytest.mark.parametrize(
    ("sparsity", "most"), [(0.0, 1.0), (0.5, 1.4), (0.6, 1.5), (0.7, 1.6), (0.8, 1.75), (0.9, 1.9)]
)
def test_the_order_of_values_spares_most_bank_conflicts(sparsity, most):
    W = weight((256, 512), sparsity)
    ordered, plain = compact.encode(W), compact.encode(W, reorder=False)
    assert compact.conflicts(ordered) <= most < 2.9 <= compact.conflicts(plain)
    assert same_bits(ordered.dense(), plain.dense())
    assert torch.equal(ordered.offsets, plain.offsets)


def test_conflicts_are_those_of_a_warp_counted_one_by_one():
    stored = compact.encode(weight((200, 130), 0.8))
    tile, number, slot, _ = stored.groups()
    worst = []
    for t in range(len(stored.offsets) - 1):
        for lanes in slot[tile == t].split(32):
            for step in lanes.T.tolist():
                banks = [cell % 32 for cell in {s // 2 for s in step}]
                worst.append(max(map(banks.count, banks)))
    assert compact.conflicts(stored) == pytest.approx(sum(worst) / len(worst))
    assert compact.conflicts(compact.encode(torch.zeros(8, 8).half())) == 0
    assert torch.equal(number[tile == 1], torch.arange(int((tile == 1).sum())))


# kernel, on the CPU
@needs_compiler
def test_every_weight_reaches_its_own_place():
    # with the inputs of an identity, y is the weight itself, and nothing is rounded
    for sparsity in (0.3, 0.99, 1.0):
        W = weight((140, 64), sparsity)
        stored, halves = compact.encode(W), torch.eye(64).bfloat16().split(32)
        y = torch.cat([compact_matmul(stored, x, host.launch, vectors=3) for x in halves])
        assert torch.equal(y.T, W)


@needs_compiler
def test_a_tile_with_more_groups_than_a_thread_can_hold_is_read_late_and_right():
    W, x = weight((128, 128), 0.0), torch.randn(8, 128).bfloat16()
    stored, exact = compact.encode(W), matmul(W, x)
    assert stored.ahead == 8
    few, all_ahead = (compact_matmul(stored, x, host.launch, vectors=n) for n in (1, None))
    assert (few.double() - exact).norm() <= 6e-3 * exact.norm()
    assert same_bits(few, all_ahead)
