from functools import partial

import pytest
import torch

from lightlib.adapters.recover import next_token_loss, recover
from lightlib.decoder import cast
from lightlib.quality import perplexity
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from lightlib.recipe import compress
from lightlib.sparsity.magnitude import magnitude
from lightlib.sparsity.wrp import wrp


def masks(model):
    return {n: p.mask() for n, p in model.named_modules() if hasattr(p, "layouts")}


def flags(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("sparsity", [0.7, "2:4"])
def test_what_was_pruned_learns_and_its_zeros_stay(model, calib, sparsity):
    light, _ = magnitude(model, sparsity=sparsity, progress=False)
    before, wanted, losses = {n: t.clone() for n, t in light.state_dict().items()}, flags(light), []
    better, report = recover(
        light, calib, steps=8, lr=3e-3, watch=lambda *x: losses.append(x), progress=False
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


def test_broken_off_in_place_it_leaves_the_values_as_they_were(llama, calib):
    light = magnitude(llama, progress=False).model
    before, wanted = [p.detach().clone() for p in light.parameters()], flags(light)

    def interrupt(step, _):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(light, calib, steps=5, lr=1e-2, watch=interrupt, progress=False, inplace=True)
    assert all(torch.equal(p, old) for p, old in zip(light.parameters(), before, strict=True))
    assert flags(light) == wanted


def test_what_cannot_be_trained_is_refused(llama, calib):
    with pytest.raises(ValueError, match="needs batches to train on"):
        recover(llama, [], progress=False)
    with pytest.raises(ValueError, match="parameters in bfloat16 lose small updates"):
        recover(cast(llama, torch.bfloat16), calib, progress=False)
