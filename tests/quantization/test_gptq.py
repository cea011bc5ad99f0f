import pytest
import torch
from torch.testing import assert_close

from lightlib.calibration import Gram, stream_blocks
from lightlib.quantization.float_grids import FP8, NF4
from lightlib.quantization.gptq import gptq, gptq_weight
from lightlib.quantization.grid import Int
from lightlib.quantization.linear import QuantLinear
from lightlib.quantization.rtn import rtn, rtn_weight
from lightlib.report import relative_error
from lightlib.second_order import inverse_factor

GRIDS = [
    *(Int(b, group_size=g, symmetric=s) for b in (2, 3, 4, 8) for g in (None, 16, 48) for s in (False, True)),
    Int(4, group_size=12, float_zero=True),
    Int(8, per_tensor=True),
    NF4(group_size=16),
    FP8(group_size=16),
    FP8(group_size=None, per_tensor=True),
]


def problem(n_out=24, n_in=96, tokens=400, seed=0):
    """A weight, and the gram of inputs that are correlated, as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(n_out, n_in, generator=generator)
    mix = torch.randn(n_in, n_in, generator=generator) / n_in**0.5
    X = torch.randn(tokens, n_in, generator=generator) @ (mix + 0.3 * torch.eye(n_in))
    return W, X.T @ X


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("static_groups", [False, True])
def test_with_an_identity_gram_it_is_plain_rounding_bit_for_bit(grid, act_order, static_groups):
    W, _ = problem()
    light = gptq_weight(W, torch.eye(96), grid, act_order=act_order, static_groups=static_groups)
    plain = rtn_weight(W, grid)
    assert torch.equal(light.dense(), plain.dense())
    assert torch.equal(light.codes, plain.codes) and torch.equal(light.scale, plain.scale)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("grid", [Int(3), Int(4, group_size=16), Int(2, group_size=48), NF4(16)], ids=str)
def test_the_layers_output_errs_less_than_with_plain_rounding(grid, act_order, static_groups):
    W, G = problem()
    light = gptq_weight(W, G, grid, act_order=act_order, static_groups=static_groups).dense()
    assert relative_error(W, light, G) < 0.85 * relative_error(W, rtn_weight(W, grid).dense(), G)


def test_blocks_change_the_order_of_the_sums_and_nothing_else():
    W, G = problem()
    column_by_column = gptq_weight(W, G, Int(4, group_size=16), block_size=1)
    for block_size in (5, 16, 32, 96, 1000):
        light = gptq_weight(W, G, Int(4, group_size=16), block_size=block_size)
        assert (light.codes != column_by_column.codes).float().mean() < 0.002
        assert_close(light.scale, column_by_column.scale, rtol=2e-3, atol=0)


def test_it_is_the_optimal_update_of_the_columns_to_come():
    """After the first column is rounded, the others must minimise ||(W - W')X|| given that column."""
    W, G = problem(n_out=3, n_in=6)
    grid = Int(2)
    scale, zero = grid.fit(W)
    first = grid.value(grid.nearest(W[:, 0], scale[:, 0], zero[:, 0]), scale[:, 0], zero[:, 0])
    best = W[:, 1:] - torch.linalg.solve(G[1:, 1:], G[1:, :1] * (first - W[:, 0])).T
    U = inverse_factor(G, damping=0.0)
    error = (W[:, 0] - first) / U[0, 0]
    assert_close(W[:, 1:] - torch.outer(error, U[0, 1:]), best, rtol=1e-3, atol=1e-4)


def test_the_factor_gives_the_inverse_of_the_damped_gram():
    _, G = problem()
    U = inverse_factor(G, damping=0.05)
    damped = G + 0.05 * G.diagonal().mean() * torch.eye(96)
    assert torch.equal(U, U.triu())
    assert_close(U.T @ U @ damped, torch.eye(96), rtol=0, atol=1e-3)


def test_a_gram_without_a_factor_is_damped_more_with_a_warning_that_names_the_layer():
    x = torch.randn(1, 64)
    with pytest.warns(UserWarning, match=r"h\.3\.q: the gram has no Cholesky factor; damping grows to"):
        U = inverse_factor(x.T @ x, damping=0.0, name="h.3.q")
    assert torch.isfinite(U).all()


def test_inputs_that_never_vary_leave_plain_rounding():
    W, _ = problem()
    assert torch.equal(gptq_weight(W, torch.zeros(96, 96), Int(4)).dense(), rtn_weight(W, Int(4)).dense())


def test_act_order_keeps_the_largest_inputs_most_precise():
    W, G = problem()
    scale = torch.ones(96)
    scale[80:] = 20  # the last columns carry most of the output
    G = scale[:, None] * G * scale
    plain = gptq_weight(W, G, Int(3), act_order=False).dense()
    ordered = gptq_weight(W, G, Int(3), act_order=True).dense()
    assert relative_error(W, ordered, G) < 0.8 * relative_error(W, plain, G)


def test_groups_in_the_order_of_the_inputs_size_are_stored_with_it_and_multiply_right():
    W, G = problem(n_out=32, n_in=128)
    G = G * torch.linspace(0.1, 3, 128).outer(torch.linspace(0.1, 3, 128))
    weight = gptq_weight(W, G, Int(4, group_size=32), act_order=True)
    assert sorted(weight.order.tolist()) == list(range(128))
    layer, x = QuantLinear(weight), torch.randn(5, 128)
    assert torch.equal(layer.dense(), weight.dense())
    assert layer.stored_bits() == 32 * 128 * 4 + 32 * 4 * (16 + 4) + 128 * 32
    assert_close(layer(x), x @ weight.dense().T)
    assert layer.fast_path(torch.bfloat16, x.device)[0]
    exact = x.bfloat16().float() @ weight.dense().T
    assert_close(layer(x.bfloat16()).float(), exact, rtol=2e-2, atol=1e-2 * exact.abs().max().item())


@pytest.mark.parametrize("sequential", [False, True])
def test_on_a_model_every_layer_errs_no_more_than_rounded(llama, calib, sequential):
    grid = Int(3, group_size=16)
    light = gptq(llama, calib, grid=grid, true_sequential=sequential, progress=False).reports
    plain = rtn(llama, calib, grid=grid, progress=False).reports
    assert {row.name for row in light} == {row.name for row in plain}
    assert light.mean_error < 0.8 * plain.mean_error


def test_a_layer_sees_what_comes_through_the_rounded_layers_before_it(llama, calib):
    """The error that GPTQ reports for o is over inputs that rounded q, k and v made."""
    grid = Int(2, group_size=16)
    light, report = gptq(llama, calib, grid=grid, true_sequential=True, progress=False)
    block = next(stream_blocks(light, calib, progress=False))
    gram = block.collect(Gram, of=("self_attn.o_proj",))["self_attn.o_proj"].value
    W = llama.model.layers[0].self_attn.o_proj.weight.detach()
    row = next(r for r in report if r.name.endswith("0.self_attn.o_proj"))
    assert row.error == pytest.approx(
        relative_error(W, block.linears["self_attn.o_proj"].dense(), gram), rel=1e-4
    )


def test_without_data_it_says_what_to_do(llama):
    with pytest.raises(ValueError, match="gptq needs batches"):
        gptq(llama, None)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: in_features 32"):
        gptq(llama, [torch.ones(1, 4, dtype=torch.long)], grid=Int(4, group_size=24), progress=False)


def test_overflowing_inputs_are_named():
    with pytest.raises(ValueError, match=r"h\.0\.q: its inputs hold NaN"):
        gptq_weight(torch.randn(4, 4), torch.full((4, 4), float("inf")), Int(4), name="h.0.q")
