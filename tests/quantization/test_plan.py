import copy
import itertools

import pytest
import torch

from lightlib.calibration import SquaredNorm, stream_blocks
from lightlib.measure import divergence, size
from lightlib.quantization.gptq import gptq
from lightlib.quantization.grid import Int
from lightlib.quantization.plan import plan
from lightlib.quantization.rtn import rtn
from lightlib.sensitivity import Choice, dense_linears, spend
from tests.conftest import random_model

KNOBS = dict(group_size=16, bits=(2, 3, 4, 8), progress=False)


def stored(model, bits):
    return size(rtn(model, grid=Int(bits, group_size=16), progress=False).model).stored_bytes


@pytest.mark.parametrize("share", [0.02, 0.3, 0.77, 1.0])
def test_the_budget_is_met_from_below_until_no_layer_can_have_more(model, calib, share):
    low, high = stored(model, 2), stored(model, 8)
    budget = low + share * (high - low)
    found = plan(model, calib, budget_bytes=budget, **KNOBS)
    light = rtn(model, grid=found.grids, progress=False).model
    assert size(light).stored_bytes == found.stored_bytes
    left = (budget - found.stored_bytes) * 8
    for choices in itertools.groupby(found.scan, key=lambda choice: choice.names):
        options = list(choices[1])
        here = next(c.cost for c in options if c.setting == found.grids[c.names[0]])
        more = [c.cost - here for c in options if c.cost > here]
        assert left >= 0 and all(left < cost for cost in more), "a layer could have had more bits"


def test_at_the_ends_all_layers_have_the_fewest_or_the_most_bits(llama, calib):
    for bits in (2, 8):
        found = plan(llama, calib, budget_bytes=stored(llama, bits), **KNOBS)
        assert found.layers_by_bits == {bits: 14}


def test_a_smaller_budget_is_refused_with_what_is_missing(llama, calib):
    with pytest.raises(ValueError, match=r"exceed the budget by 0\.01 MB"):
        plan(llama, calib, budget_bytes=stored(llama, 2) - 10_000, **KNOBS)


def test_the_layer_that_matters_gets_the_bits(llama, calib):
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight.mul_(1e-3)  # what this layer says is hardly heard
        llama.model.layers[0].mlp.down_proj.weight.mul_(8)
    budget = (stored(llama, 2) + stored(llama, 4)) / 2
    grids = plan(llama, calib, budget_bytes=budget, **KNOBS).grids
    assert grids["model.layers.1.mlp.down_proj"].bits == 2 < grids["model.layers.0.mlp.down_proj"].bits


def test_the_loss_is_the_divergence_with_that_layer_alone_rounded_and_grows_with_the_distance_that_inputs_see(
    llama, calib
):
    # the finest grid that all layers can have is measured
    found = plan(llama, calib, budget_bytes=stored(llama, 4) + 10, **KNOBS)
    layer, names = llama.model.layers[1].mlp.down_proj, ("model.layers.1.mlp.down_proj",)
    choices = {c.setting.bits: c for c in found.scan if c.names == names}
    light = copy.deepcopy(llama)
    light.model.layers[1].mlp.down_proj.weight.data = Int(4, group_size=16).encode(layer.weight).dense()
    assert choices[4].loss == pytest.approx(divergence(light, llama, calib).mean_kl, rel=1e-3)
    *_, last = stream_blocks(llama, calib, progress=False)
    norms = last.collect(SquaredNorm)["mlp.down_proj"].value
    moves = {b: Int(b, group_size=16).rounded(layer.weight) - layer.weight for b in choices}
    moved = {b: (move.square() * norms).sum().item() for b, move in moves.items()}
    for bits, choice in choices.items():
        assert choice.loss / choices[4].loss == pytest.approx(moved[bits] / moved[4], rel=1e-4)


def test_spending_finds_the_best_of_all_choices_where_steps_cost_the_same():
    generator = torch.Generator().manual_seed(0)
    scan = {}
    for name in "abcd":
        losses = torch.rand(3, generator=generator).cumsum(0).flip(0).tolist()
        saved = sorted(
            (losses[0] - losses[1], losses[1] - losses[2]), reverse=True
        )  # the first step saves most
        losses = [losses[0], losses[0] - saved[0], losses[0] - sum(saved)]
        scan[name] = [
            Choice((name,), Int(b), 10 * b, loss) for b, loss in zip((2, 3, 4), losses, strict=True)
        ]
    for budget in range(80, 165, 10):
        combinations = [c for c in itertools.product(*scan.values()) if sum(x.cost for x in c) <= budget]
        best = min(sum(x.loss for x in c) for c in combinations)
        assert sum(c.loss for c in spend(scan, budget).values()) == pytest.approx(best)


def test_the_plan_leaves_the_model_alone_and_speaks(calib):
    model = random_model("gpt2")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = plan(model, calib, budget_bytes=stored(model, 4), **KNOBS)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert "MB" in repr(found) and "layers in" in repr(found)
    assert found._repr_html_().count("<tr>") == 1 + len(found.grids) == 9


def test_other_methods_take_the_plan_and_a_missing_layer_is_named(llama, calib):
    found = plan(llama, calib, budget_bytes=stored(llama, 3), **KNOBS)
    light = gptq(llama, calib, grid=found.grids, progress=False).model
    assert {n: light.get_submodule(n).grid for n in found.grids} == found.grids
    del found.grids["model.layers.1.mlp.up_proj"]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: the plan has no grid for it"):
        rtn(llama, grid=found.grids, progress=False)


def test_a_compressed_model_is_refused(llama, calib):
    light = rtn(llama, grid=Int(4), progress=False).model
    with pytest.raises(ValueError, match="is a QuantLinear already"):
        dense_linears(light)
