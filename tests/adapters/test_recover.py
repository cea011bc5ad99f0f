import copy
from functools import partial

import pytest
import torch
from torch import nn

from lightlib.adapters.recover import next_token_loss, recover
from lightlib.compact import compact_layers
from lightlib.decoder import cast
from lightlib.quality import perplexity
from lightlib.quantization.grid import Int
from lightlib.quantization.llm_int8 import llm_int8
from lightlib.quantization.rtn import rtn
from lightlib.recipe import compress
from lightlib.sparsity.magnitude import magnitude
from lightlib.sparsity.wrp import wrp
from tests.conftest import random_model


def masks(model):
    return {n: p.mask() for n, p in model.named_modules() if hasattr(p, "layouts")}


def flags(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("sparsity", [0.7, "2:4"])
def test_what_was_pruned_learns_and_its_zeros_stay(model, calib, sparsity, rank):
    light, _ = magnitude(model, sparsity=sparsity, progress=False)
    before, wanted, losses = {n: t.clone() for n, t in light.state_dict().items()}, flags(light), []
    better, report = recover(
        light, calib, steps=8, lr=3e-3, rank=rank, watch=lambda *x: losses.append(x), progress=False
    )
    assert len(report) == 0 and [step for step, _ in losses] == list(range(8))
    assert perplexity(better, calib) < perplexity(light, calib)
    assert all(torch.equal(m, masks(light)[n]) for n, m in masks(better).items())
    assert all(
        ((p.dense() != 0) <= masks(light)[n]).all() for n, p in better.named_modules() if n in masks(light)
    )
    assert all(torch.equal(t, before[n]) for n, t in light.state_dict().items())
    assert flags(light) == flags(better) == wanted and not any(
        p.grad is not None for p in better.parameters()
    )
    head = better.get_output_embeddings().weight
    assert torch.equal(head, light.get_output_embeddings().weight)


def test_a_step_of_size_zero_changes_nothing_and_the_first_loss_is_the_models(llama, calib):
    light, losses = wrp(llama, calib, progress=False).model, []
    same, _ = recover(
        light, calib, steps=2, lr=0.0, watch=lambda _, loss: losses.append(loss), progress=False
    )
    assert all(torch.equal(a, b) for a, b in zip(light.parameters(), same.parameters(), strict=True))
    with torch.no_grad():
        assert losses[0] == pytest.approx(next_token_loss(light, calib[0]).item())


def test_it_is_a_step_of_a_recipe(llama, calib):
    steps = [
        partial(magnitude, sparsity=0.5, progress=False),
        partial(recover, steps=3, lr=1e-3, progress=False),
        partial(rtn, grid=Int(8), progress=False),
    ]
    light, report = compress(llama, steps, calib)
    assert {row.method for row in report} == {"magnitude", "rtn"}
    layer = light.model.layers[0].mlp.up_proj
    assert (layer.dense() == 0).float().mean() == pytest.approx(0.5, abs=0.02)


def test_updates_of_low_rank_move_the_weights_by_no_more_than_that_rank(llama, calib):
    light, _ = wrp(llama, calib, progress=False)
    layer = light.model.layers[0].mlp.up_proj
    before, dense = layer.dense(), light.model.layers[1].mlp.down_proj
    light.model.layers[1].mlp.set_submodule(
        "down_proj", nn.Linear(dense.in_features, dense.out_features, bias=False)
    )
    left = light.model.layers[1].mlp.down_proj.weight.detach().clone()
    better, _ = recover(light, calib, steps=4, lr=1e-2, rank=2, progress=False)
    moved = better.model.layers[1].mlp.down_proj.weight.detach() - left
    assert torch.linalg.matrix_rank(moved, rtol=1e-4) == 2  # a dense layer shows it bare
    now = better.model.layers[0].mlp.up_proj
    assert not torch.equal(now.dense(), before) and torch.equal(now.mask(), layer.mask())
    assert type(now) is type(layer) and now.stored_bits() == layer.stored_bits()
    assert list(better.state_dict()) == list(light.state_dict())
    norms = [m.model.layers[0].input_layernorm.weight for m in (light, better)]
    assert torch.equal(*norms)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_through_layers_that_round_their_inputs_it_learns_as_through_dense_ones(family, calib):
    light = llm_int8(random_model(family), calib, progress=False).model
    dense = copy.deepcopy(light)
    for name, part in compact_layers(dense).items():
        linear = torch.nn.Linear(part.in_features, part.out_features)
        linear.weight, linear.bias = torch.nn.Parameter(part.dense()), part.bias
        linear.weight.requires_grad_(False)
        dense.set_submodule(name, linear)
    moved = []
    for model in (light, dense):
        inside = {n: p for n, p in model.named_parameters() if ".layers." in n and p.dim() == 1}
        before = {n: p.detach().clone() for n, p in inside.items()}
        model.requires_grad_(False)
        after = dict(recover(model, calib, steps=1, lr=1e-3, progress=False).model.named_parameters())
        moved.append(torch.cat([(after[n] - p).flatten() for n, p in before.items()]))
    # Adam's first step is the sign of a gradient: nearly all agree, though the inputs were rounded
    assert (moved[0].sign() == moved[1].sign()).float().mean() > 0.95
    assert (moved[0] != 0).float().mean() > 0.9


def test_a_rank_that_no_layer_can_have_is_refused(llama, calib):
    with pytest.raises(ValueError, match=r"self_attn.q_proj: rank=33 does not lie from 1 to 32"):
        recover(llama, calib, steps=1, rank=33, progress=False)


@pytest.mark.parametrize("rank", [None, 2])
def test_broken_off_in_place_it_leaves_the_values_as_they_were(llama, calib, rank):
    light = magnitude(llama, progress=False).model
    before, wanted = [p.detach().clone() for p in light.parameters()], flags(light)

    def interrupt(step, _):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(light, calib, steps=5, lr=1e-2, rank=rank, watch=interrupt, progress=False, inplace=True)
    assert all(torch.equal(p, old) for p, old in zip(light.parameters(), before, strict=True))
    assert flags(light) == wanted


def test_what_cannot_be_trained_is_refused(llama, calib):
    with pytest.raises(ValueError, match="needs batches to train on"):
        recover(llama, [], progress=False)
    with pytest.raises(ValueError, match="parameters in bfloat16 lose small updates"):
        recover(cast(llama, torch.bfloat16), calib, progress=False)
