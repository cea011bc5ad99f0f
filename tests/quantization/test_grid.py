import pytest
import torch
from torch.testing import assert_close

from lightlib.packing import pack, unpack
from lightlib.quantization.grid import Int

GRIDS = [
    Int(b, group_size=g, symmetric=s, float_zero=f)
    for b in range(2, 9)
    for g in (None, 16)
    for s, f in ((False, False), (True, False), (False, True))
]
W = torch.randn(8, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_weight_on_the_grid_comes_back_unchanged(grid):
    q = grid.encode(W)
    again = grid.round_to_codes(q.dense(), q.scale, q.zero)
    assert torch.equal(again, q.codes)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_no_weight_moves_by_more_than_half_a_step(grid):
    q = grid.encode(W)
    step = q.scale.repeat_interleave(48 // q.scale.shape[1], 1)
    # zero points are rounded too, so an end of the range may lie a half step outside the grid
    slack = 0.5 if grid.symmetric or grid.float_zero else 1.0
    assert ((q.dense() - W).abs() <= slack * step * 1.001 + 1e-3).all()


def test_symmetric_int8_by_hand():
    q = Int(8, symmetric=True).encode(torch.tensor([[-1.27, 0.0, 0.005, 1.0]]))
    assert q.scale.item() == pytest.approx(0.01, rel=1e-3)
    assert (q.codes.int() - 128).tolist() == [[-127, 0, 0, 100]] or (q.codes.int() - 128).tolist() == [
        [-127, 0, 1, 100]
    ]


def test_asymmetric_by_hand():
    q = Int(2).encode(torch.tensor([[-1.0, 0.0, 1.0, 2.0]]))
    assert (q.scale.item(), q.zero.item(), q.codes.tolist()) == (1.0, 1.0, [[0, 1, 2, 3]])


def test_symmetric_codes_leave_the_lowest_out():
    codes = Int(4, symmetric=True).encode(W).codes
    assert codes.min() >= 1 and codes.max() <= 15


def test_groups_of_one_row_are_per_channel_and_one_scale_is_per_tensor():
    assert torch.equal(Int(4, group_size=48).encode(W).dense(), Int(4).encode(W).dense())
    assert Int(4, per_tensor=True).encode(W).scale.shape == (1, 1)
    assert torch.equal(
        Int(4, per_tensor=True).encode(W).dense(), Int(4).encode(W.reshape(1, -1)).dense().view(8, 48)
    )


def test_finer_grids_err_less():
    def error(grid):
        return (grid.encode(W).dense() - W).norm().item()

    by_bits = [error(Int(b)) for b in range(2, 9)]
    assert by_bits == sorted(by_bits, reverse=True)
    # halving the step quarters the squared error: 6 dB a bit
    assert by_bits[4] / by_bits[5] == pytest.approx(2, rel=0.1)
    assert error(Int(4, group_size=16)) < error(Int(4)) < error(Int(4, per_tensor=True))


def test_a_minimum_in_16_bits_gives_back_what_ggufs_q4_1_stored():
    generator = torch.Generator().manual_seed(1)
    d, m = (torch.rand(8, 2, 1, generator=generator).half().float() for _ in range(2))
    codes = torch.randint(0, 16, (8, 2, 32), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15
    stored = (codes * d - m).reshape(8, 64)
    assert_close(Int(4, group_size=32, float_zero=True).encode(stored).dense(), stored, rtol=0, atol=1e-3)


@pytest.mark.parametrize("grid", [*GRIDS, Int(8, per_tensor=True)], ids=str)
def test_rounding_without_codes_gives_what_the_codes_stand_for(grid):
    assert torch.equal(grid.rounded(W), grid.encode(W).dense())


def test_constant_and_zero_groups_survive():
    flat = torch.zeros(2, 16)
    flat[1] = 0.75
    assert torch.equal(Int(4).encode(torch.zeros(2, 16)).dense(), torch.zeros(2, 16))
    assert_close(Int(4, float_zero=True).encode(flat).dense(), flat)
    assert_close(Int(4).encode(flat).dense(), flat, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 8), (7, 9)])
def test_packing_is_without_gaps_and_without_loss(bits, shape):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert packed.numel() == -(-codes.numel() // 8) * bits
    assert torch.equal(unpack(packed, bits, shape), codes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bits": 1}, "2 to 8"),
        ({"bits": 9}, "2 to 8"),
        ({"group_size": 0}, "group_size=0"),
        ({"symmetric": True, "float_zero": True}, "float_zero"),
        ({"group_size": 8, "per_tensor": True}, "per_tensor"),
    ],
)
def test_grids_that_cannot_be_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Int(**arguments)


def test_errors_name_the_layer_the_number_and_the_way_out():
    with pytest.raises(
        ValueError, match=r"h\.0\.q: in_features 48 is not a multiple of group_size 36; try 12 or None"
    ):
        Int(4, group_size=36).encode(W, "h.0.q")
    with pytest.raises(ValueError, match=r"h\.0\.q: 1 weights are NaN or infinite"):
        Int(4).encode(torch.tensor([[1.0, float("nan")]]), "h.0.q")
    with pytest.raises(ValueError, match="need a scale beyond 16 bits"):
        Int(4).encode(torch.tensor([[1e7, 0.0]]))
