import pytest
import torch

from lightlib.decoder import linears
from lightlib.quantization.awq import awq, awq_clip, awq_scale, balanced, lost_output
from lightlib.quantization.float_grids import NF4
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from lightlib.report import relative_error

torch.manual_seed(0)
W = torch.randn(24, 64)
SALIENT = torch.ones(64).index_fill(0, torch.tensor([3, 40]), 30.0)


def gram_of(scale):
    X = torch.randn(500, 64, generator=torch.Generator().manual_seed(1)) * scale
    return X.T @ X / 500


def test_inputs_of_equal_size_need_no_scale():
    scale, losses = awq_scale([W], torch.eye(64), torch.ones(64), [Int(4, group_size=16)])
    assert torch.equal(scale, torch.ones(64))
    assert losses == [losses[0]] * 20


def test_the_loss_at_exponent_zero_is_that_of_plain_rounding():
    G, grid = gram_of(SALIENT), Int(3, group_size=16)
    _, losses = awq_scale([W], G, G.diagonal().sqrt(), [grid])
    assert losses[0] == pytest.approx(lost_output(W - grid.encode(W).dense(), G), rel=1e-5)
    X = torch.linalg.cholesky(G).T  # any X with this gram
    assert losses[0] == pytest.approx((X @ (W - grid.encode(W).dense()).T).square().sum().item(), rel=1e-4)


@pytest.mark.parametrize(
    "grid", [Int(3, group_size=16), Int(4), Int(4, group_size=32, symmetric=True), NF4(16)], ids=str
)
def test_channels_that_carry_most_are_stretched_and_the_output_errs_less(grid):
    G = gram_of(SALIENT)
    scale, losses = awq_scale([W], G, G.diagonal().sqrt(), [grid])
    assert min(losses) < 0.5 * losses[0]
    assert scale[[3, 40]].min() > 2 * scale[SALIENT == 1].max()
    assert lost_output(W - grid.encode(W * scale).dense() / scale, G) == pytest.approx(min(losses), rel=1e-4)


def test_layers_that_read_one_input_share_the_scale_that_is_best_for_their_sum():
    G, grids = gram_of(SALIENT), [Int(3, group_size=16), Int(8)]
    pair = [W, torch.randn(8, 64)]
    _, losses = awq_scale(pair, G, G.diagonal().sqrt(), grids)
    singles = [awq_scale([w], G, G.diagonal().sqrt(), [g])[1] for w, g in zip(pair, grids, strict=True)]
    assert losses == pytest.approx([a + b for a, b in zip(*singles, strict=True)], rel=1e-5)


def test_scales_lie_around_one():
    scale = balanced(torch.tensor([0.01, 1.0, 100.0]), 0.5)
    assert scale.tolist() == pytest.approx([0.1, 1.0, 10.0])
    assert balanced(torch.tensor([0.0, 5.0]), 0.0).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "grid", [Int(3, group_size=16), Int(2), Int(4, group_size=32, symmetric=True)], ids=str
)
def test_clipping_never_errs_more_in_the_groups_own_output_and_pays_at_low_bits(grid):
    G = gram_of(1.0)
    clipped = awq_clip(W, G, grid)
    group = grid.group_size or 64

    def own_loss(weight):
        D = (W - grid.encode(weight).dense()).view(24, -1, group)
        return torch.stack(
            [
                ((D[:, g] @ G[g * group : (g + 1) * group, g * group : (g + 1) * group]) * D[:, g]).sum(-1)
                for g in range(D.shape[1])
            ]
        )

    assert (own_loss(clipped) <= own_loss(W) * (1 + 1e-5)).all()
    assert own_loss(clipped).sum() < 0.98 * own_loss(W).sum()
    assert (clipped.abs() <= W.abs()).all()


def test_a_weight_on_the_grid_is_not_clipped():
    grid = Int(4, symmetric=True)
    on_grid = torch.randint(-7, 8, (8, 64)).float()
    on_grid[:, 0] = 7
    assert torch.equal(awq_clip(on_grid, torch.eye(64), grid), on_grid)


def test_with_one_step_and_no_clip_it_is_plain_rounding(model, calib):
    grid = Int(3, group_size=16)
    light = awq(model, calib, grid=grid, steps=1, clip=False, progress=False).model
    plain = rtn(model, grid=grid, progress=False).model
    for name, layer in linears(light).items():
        if name != "lm_head" and name != "embed_out":
            assert torch.equal(layer.dense(), linears(plain)[name].dense())


def test_on_a_model_whose_channels_differ_it_errs_less_than_rounding(llama, calib):
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.input_layernorm.weight[3] = 25.0
            layer.post_attention_layernorm.weight[7] = 25.0
    grid = Int(3, group_size=16)
    light, plain = (f(llama, calib, grid=grid, progress=False).reports for f in (awq, rtn))
    assert light.mean_error < 0.8 * plain.mean_error


def test_the_reported_error_counts_what_the_fold_undoes(llama, calib):
    """q's stored weight is stretched; over the norm's divided output it must stand for the original."""
    light, report = awq(llama, calib[:1], grid=Int(8), progress=False)
    assert all(row.error < 0.02 for row in report)
    block = light.model.layers[0]
    ratio = block.input_layernorm.weight / llama.model.layers[0].input_layernorm.weight
    undone = block.self_attn.q_proj.dense() * ratio
    assert relative_error(llama.model.layers[0].self_attn.q_proj.weight.detach(), undone) < 0.02


def test_without_data_it_says_what_to_do(llama):
    with pytest.raises(ValueError, match="awq needs batches"):
        awq(llama, None)
