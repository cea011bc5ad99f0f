import pytest
import torch
from torch.testing import assert_close

from lightlib.quantization.float_grids import FP8, NF4, nf4_table
from lightlib.quantization.grid import Int
from lightlib.quantization.linear import QuantLinear

W = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
GRIDS = [
    NF4(),
    NF4(None),
    NF4(16),
    FP8(),
    FP8(group_size=None),
    FP8("e5m2"),
    FP8(group_size=None, per_tensor=True),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_weight_on_the_grid_comes_back_unchanged(grid):
    q = grid.encode(W)
    assert torch.equal(grid.round_to_codes(q.dense(), q.scale, q.zero), q.codes)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_weight_goes_to_its_nearest_value(grid):
    q = grid.encode(W)
    scale = q.scale.repeat_interleave(128 // q.scale.shape[1], 1).expand(16, -1)
    all_codes = torch.arange(2**grid.bits, dtype=torch.uint8)
    values = grid.value(all_codes, torch.tensor(1.0), torch.tensor(0.0))
    values = values[values.isfinite()]
    nearest = values[(W[..., None] / scale[..., None] - values).abs().argmin(-1)] * scale
    # ties and the last bit of a quotient may go either way; no other value is nearer
    assert_close((q.dense() - W).abs(), (nearest - W).abs(), rtol=1e-5, atol=1e-6)


def test_the_table_is_that_of_the_paper():
    # Appendix E of arXiv:2305.14314
    paper = [-1.0, -0.6961928, -0.5250730, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    paper += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    assert_close(nf4_table(), torch.tensor(paper), rtol=0, atol=2e-6)


def test_on_normal_weights_nf4_errs_less_than_four_even_bits():
    def error(grid):
        return (grid.encode(W).dense() - W).square().mean().item()

    assert error(NF4(64)) < error(Int(4, group_size=64, symmetric=True))
    assert error(FP8("e4m3")) < error(FP8("e5m2"))


def test_eight_bit_floats_keep_small_weights_beside_a_large_one():
    row = torch.full((1, 128), 0.01)
    row[0, 0] = 10.0
    kept = FP8("e4m3", group_size=None).encode(row).dense()[0, 1:]
    assert_close(kept, row[0, 1:], rtol=0.07, atol=0)
    assert Int(8, symmetric=True).encode(row).dense()[0, 1:].eq(0).all()


def test_the_codes_of_eight_bit_floats_are_their_bits():
    q = FP8("e4m3", group_size=None).encode(torch.tensor([[448.0, 1.0, -2.0, 0.0]]))
    assert q.scale.item() == 1.0
    assert q.codes.tolist() == [[0x7E, 0x38, 0xC0, 0x00]]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_zero_groups_survive(grid):
    assert torch.equal(grid.encode(torch.zeros(4, 128)).dense(), torch.zeros(4, 128))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_layer_packs_them_without_gaps_and_multiplies(grid):
    q, x = grid.encode(W), torch.randn(3, 128)
    layer = QuantLinear(q)
    assert layer.stored_bits() == 16 * 128 * grid.bits + 16 * q.scale.numel()
    assert torch.equal(layer.dense(), q.dense())
    assert_close(layer(x), x @ q.dense().T)
    path, reason = layer.fast_path(torch.bfloat16, x.device)
    assert path == "" and type(grid).__name__ in reason


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="'e3m4': 8-bit floats are e4m3 or e5m2"):
        FP8("e3m4")
    with pytest.raises(ValueError, match="group_size=128"):
        FP8(per_tensor=True)
    with pytest.raises(ValueError, match=r"q: in_features 128 is not a multiple of group_size 48; try 16"):
        NF4(48).encode(W, "q")
