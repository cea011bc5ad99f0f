"""Pruned, then rounded: zeros stay zeros, and what stays is stored once."""

from functools import partial

import pytest
import torch

from lightlib import load, save
from lightlib.compact import compact_layers
from lightlib.cost import size
from lightlib.decoder import cast
from lightlib.quantization.awq import awq
from lightlib.quantization.gptq import gptq, gptq_weight
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from lightlib.recipe import compress
from lightlib.report import relative_error
from lightlib.sparsity.magnitude import magnitude
from lightlib.sparsity.masks import mask_of
from lightlib.sparsity.sparsegpt import sparsegpt

ROUNDINGS = [
    partial(rtn, grid=Int(4, group_size=16)),
    partial(rtn, grid=Int(8)),
    partial(gptq, grid=Int(4)),
    partial(gptq, grid=Int(3, group_size=16), act_order=True),
    partial(gptq, grid=Int(4, group_size=16), act_order=True, static_groups=True),
    partial(gptq, grid=Int(4, group_size=16, symmetric=True), true_sequential=True),
    partial(awq, grid=Int(4, group_size=16)),
]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_zeros_stay_and_what_stays_is_stored_once(rounding, model, calib, tmp_path):
    rounding = partial(rounding, progress=False)
    sparse, _ = sparsegpt(model, calib, sparsity=0.5, progress=False)
    steps = [partial(sparsegpt, sparsity=0.5, progress=False), rounding]
    light, report = compress(model, steps, calib)
    layers = compact_layers(light)
    assert len(report) == 2 * len(layers)
    for row in report.rows[len(layers) :]:
        layer, before = layers[row.name], sparse.get_submodule(row.name)
        assert (layer.dense()[~before.mask()] == 0).all()
        grid, weights = layer.grid, layer.in_features * layer.out_features
        scales = grid.stored_bits(layer.out_features, layer.in_features) - weights * grid.bits
        order = 0 if layer.order is None else 32 * layer.in_features
        # half of the codes, a bit for each weight, scales as ever
        assert row.bits_after == weights / 2 * grid.bits + weights + scales + order
        assert row.bits_before == before.stored_bits() - (0 if before.bias is None else 32 * len(before.bias))
    again = load(save(light, tmp_path / "light"))
    assert size(again).stored_bytes == size(light).stored_bytes
    with torch.no_grad():
        assert torch.equal(again(calib[0]).logits, light(calib[0]).logits)


def test_gptq_within_a_mask_is_gptq_where_the_mask_is_whole():
    torch.manual_seed(0)
    W, X = torch.randn(8, 32), torch.randn(100, 32)
    for knobs in ({}, {"act_order": True}, {"act_order": True, "static_groups": True}):
        whole = gptq_weight(W, X.T @ X, Int(3, group_size=16), mask=torch.ones_like(W).bool(), **knobs)
        assert torch.equal(whole.dense(), gptq_weight(W, X.T @ X, Int(3, group_size=16), **knobs).dense())


def test_within_a_mask_gptq_loses_less_than_rounding_to_nearest():
    torch.manual_seed(0)
    W, X = torch.randn(16, 64), torch.randn(400, 64) @ torch.randn(64, 64)
    mask = mask_of(W.abs(), 0.5)
    W, G, grid = W * mask, X.T @ X, Int(3, group_size=32)
    light = gptq_weight(W, G, grid, mask=mask)
    assert (light.dense()[~mask] == 0).all()
    assert relative_error(W, light.dense(), G) < 0.95 * relative_error(W, grid.encode(W).dense(), G)


def test_the_packed_product_multiplies_pruned_codes_too(llama, calib):
    steps = [partial(magnitude, sparsity=0.5, progress=False), partial(rtn, grid=Int(8), progress=False)]
    light = cast(compress(llama, steps).model, torch.bfloat16)
    layer = light.model.layers[0].mlp.up_proj
    x, stored = torch.randn(3, 32).bfloat16(), layer.stored()
    assert layer.fast_path(torch.bfloat16, x.device)[0]
    expected = x.float() @ layer.dense().T
    assert relative_error(expected, layer(x).float()) < 0.02
    assert all(torch.equal(tensor, stored[name]) for name, tensor in layer.stored().items())


def test_a_grid_without_an_exact_zero_is_refused_with_the_layers_name(llama):
    sparse, _ = magnitude(llama, progress=False)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: a float_zero grid"):
        rtn(sparse, grid=Int(4, group_size=16, float_zero=True), progress=False, inplace=True)
    assert sparse.model.layers[0].self_attn.q_proj.layouts == ("bitmap",)
