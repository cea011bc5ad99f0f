import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lightlib.quantization.grid import Int
from lightlib.quantization.linear import QuantLinear

FAST = [
    Int(4, group_size=64),
    Int(4, group_size=32, float_zero=True),
    Int(4, group_size=32, symmetric=True),
    Int(4),
    Int(4, group_size=96),
    Int(4, per_tensor=True),
    Int(3, group_size=64),
    Int(2),
    Int(8),
    Int(8, symmetric=True),
    Int(8, float_zero=True),
    Int(6),
    Int(8, per_tensor=True),
]
SLOW = [Int(8, group_size=64), Int(4, group_size=48), Int(5, group_size=16)]


def layer(grid, n_out=48, n_in=192, bias=True, seed=0):
    torch.manual_seed(seed)
    return QuantLinear(grid.encode(torch.randn(n_out, n_in)), torch.randn(n_out) if bias else None)


@pytest.mark.parametrize("grid", FAST + SLOW, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_forward_is_the_dense_product(grid, rows):
    linear, x = layer(grid), torch.randn(2, rows, 192)
    assert_close(linear(x), F.linear(x, linear.dense(), linear.bias))


@pytest.mark.parametrize("grid", FAST, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_the_packed_matmul_agrees_within_bfloat16(grid, rows):
    linear, x = layer(grid), torch.randn(rows, 192).bfloat16()
    exact = F.linear(x.float(), linear.dense(), linear.bias)
    assert linear.fast_path(torch.bfloat16, x.device)[0].startswith("aten::")
    # 8 bits of mantissa in the inputs' products, the scales and the output
    assert_close(linear(x).float(), exact, rtol=2e-2, atol=6e-3 * exact.abs().max().item())
    assert linear.layout is not None and linear.codes is None


@pytest.mark.parametrize("grid", SLOW, ids=str)
def test_a_grid_that_no_packed_matmul_takes_says_so(grid):
    linear = layer(grid)
    path, reason = linear.fast_path(torch.bfloat16, torch.device("cpu"))
    assert path == "" and "ATen" in reason
    linear(torch.randn(1, 192).bfloat16())
    assert linear.codes is not None


def test_float32_inputs_are_told_what_would_make_them_fast():
    path, reason = layer(Int(4)).fast_path(torch.float32, torch.device("cpu"))
    assert path == "" and "bfloat16, not float32" in reason
    assert (
        "outputs in multiples of 16"
        in layer(Int(4), n_out=40).fast_path(torch.bfloat16, torch.device("cpu"))[1]
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
@pytest.mark.parametrize("grid", [Int(4), Int(8)])
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_without_the_operation_is_told_so(grid, device):
    path, reason = layer(grid).fast_path(torch.bfloat16, torch.device(device))
    assert path == "" and f"no aten::_weight_int{grid.bits}pack_mm for {device}" in reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("grid", FAST, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_on_a_gpu_the_packed_matmul_agrees_and_gives_the_codes_back(grid, rows):
    linear, x = layer(grid).cuda(), torch.randn(rows, 192, device="cuda").bfloat16()
    if not linear.fast_path(torch.bfloat16, x.device)[0]:
        pytest.skip(linear.fast_path(torch.bfloat16, x.device)[1])
    before, exact = linear.codes.clone(), F.linear(x.float(), linear.dense(), linear.bias)
    assert_close(linear(x).float(), exact, rtol=2e-2, atol=6e-3 * exact.abs().max().item())
    assert linear.codes is None and torch.equal(linear.stored()["codes"], before)


@pytest.mark.parametrize("grid", FAST, ids=str)
def test_the_codes_come_back_exactly_from_the_matmuls_layout(grid):
    linear = layer(grid)
    before, bits = {k: v.clone() for k, v in linear.stored().items()}, linear.stored_bits()
    linear(torch.randn(1, 192).bfloat16())
    assert linear.stored_bits() == bits
    assert all(torch.equal(linear.stored()[key], t) for key, t in before.items())
    linear.to("cpu")
    assert linear.layout is None and torch.equal(linear.codes, before["codes"])


@pytest.mark.parametrize("grid", FAST + SLOW, ids=str)
def test_stored_bits_count_codes_scales_and_zeros(grid):
    linear = layer(grid, bias=False)
    groups = linear.scale.numel()
    zero = 0 if grid.symmetric else 16 * groups if grid.float_zero else -(-groups // 8) * 8 * grid.bits
    assert linear.stored_bits() == 48 * 192 * grid.bits + 16 * groups + zero
    assert linear.stored_bits() == 8 * sum(t.nbytes for t in linear.stored().values())


def test_four_bits_in_groups_of_64_are_4_31_bits_a_weight():
    assert layer(Int(4, group_size=64), bias=False).stored_bits() / (48 * 192) == 4 + (16 + 4) / 64


def test_changing_the_models_precision_keeps_the_scales():
    linear = layer(Int(4, group_size=64))
    dense = linear.dense()
    assert torch.equal(linear.to(torch.bfloat16).dense(), dense)
    assert linear.bias.dtype == torch.bfloat16 and linear.scale.dtype == torch.float16


def test_a_float32_call_after_a_bfloat16_call_is_exact_again():
    linear, x = layer(Int(4, group_size=64)), torch.randn(3, 192)
    before = linear(x)
    linear(x.bfloat16())
    assert torch.equal(linear(x), before)


def test_a_copy_is_independent():
    linear = layer(Int(4, group_size=64))
    twin = copy.deepcopy(linear)
    twin.scale.zero_()
    assert twin.dense().abs().max() < linear.dense().abs().max()


def test_empty_has_the_same_structure():
    linear = layer(Int(3, group_size=16))
    twin = QuantLinear.empty(192, 48, torch.zeros(48), **linear.settings())
    assert {k: (v.shape, v.dtype) for k, v in twin.stored().items()} == {
        k: (v.shape, v.dtype) for k, v in linear.stored().items()
    }
    twin.load_state_dict(linear.state_dict())
    assert torch.equal(twin.dense(), linear.dense())
