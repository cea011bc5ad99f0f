"""The limits at which a pruning method must equal a simpler one, or the algebra."""

import itertools

import pytest
import torch

from lightlib.calibration import Gram, SquaredNorm, stream_blocks
from lightlib.report import relative_error
from lightlib.sparsity.magnitude import magnitude
from lightlib.sparsity.masks import keep_largest, mask_of
from lightlib.sparsity.obs import obd_saliency, obs, obs_weight
from lightlib.sparsity.sparsegpt import sparsegpt, sparsegpt_weight
from lightlib.sparsity.wanda import wanda, wanda_score
from lightlib.sparsity.wrp import recovered, wrp


def layer(n_out=6, n_in=12, tokens=64, seed=0):
    """A weight (out, in) and the gram of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, n_in, generator=generator) @ torch.randn(n_in, n_in, generator=generator)
    return torch.randn(n_out, n_in, generator=generator), X.T @ X


def loss(before, after, gram):
    gone = before - after
    return (gone @ gram * gone).sum(1)  # (out)


def best_within(weight, mask, gram):
    """The least-squares weight that is zero outside the mask: each row solved for what stays of it."""
    best = torch.zeros_like(weight)
    for row, stays in enumerate(mask):
        best[row, stays] = torch.linalg.solve(gram[stays][:, stays], gram[stays] @ weight[row])
    return best


def test_wanda_with_equal_norms_is_magnitude_within_each_row():
    W, _ = layer()
    scores = wanda_score(W, torch.full((12,), 3.7))
    for sparsity in (0.25, 0.5, "2:4"):
        assert torch.equal(mask_of(scores, sparsity), mask_of(W.abs(), sparsity))


def test_wanda_keeps_a_small_weight_whose_input_is_large():
    scores = wanda_score(torch.tensor([[0.1, 1.0]]), torch.tensor([400.0, 1.0]))
    assert scores.tolist() == [[pytest.approx(2.0), pytest.approx(1.0)]]
    assert keep_largest(scores, 0.5).tolist() == [[True, False]]


def test_wanda_on_a_model_keeps_the_weights_and_their_values(llama, calib):
    block = next(stream_blocks(llama, calib, progress=False))
    norm = block.collect(SquaredNorm, of=("self_attn.q_proj",))["self_attn.q_proj"].value
    W = llama.model.layers[0].self_attn.q_proj.weight
    light, _ = wanda(llama, calib, sparsity=0.5, progress=False)
    expected = W * mask_of(wanda_score(W, norm), 0.5)
    assert torch.equal(light.model.layers[0].self_attn.q_proj.dense(), expected)


def test_sparsegpt_at_sparsity_0_changes_nothing():
    W, G = layer()
    pruned, mask = sparsegpt_weight(W, G, 0.0)
    assert torch.equal(pruned, W) and mask.all()


def test_sparsegpt_with_uncorrelated_inputs_drops_the_smallest_and_moves_nothing():
    W, _ = layer()
    pruned, _ = sparsegpt_weight(W, torch.eye(12), 0.5)
    assert torch.equal(pruned, W * mask_of(W.abs(), 0.5, "layer"))
    pruned, _ = sparsegpt_weight(W, torch.eye(12), "2:4")
    assert torch.equal(pruned, W * mask_of(W.abs(), "2:4"))


def test_sparsegpt_that_drops_the_first_column_is_the_brain_surgeon():
    W, G = layer(n_out=1)
    W[0, 0] = 1e-3  # so that both drop it
    by_columns, mask = sparsegpt_weight(W, G, 1 / 12, damping=0.01)
    by_surgeon, same = obs_weight(W, G, 1 / 12, damping=0.01)
    assert not mask[0, 0] and torch.equal(mask, same)
    torch.testing.assert_close(by_columns, by_surgeon)


@pytest.mark.parametrize("block_size", [4, 6, 12, 128])
def test_sparsegpt_compensates_whatever_its_blocks(block_size):
    W, G = layer(n_out=32)
    for sparsity in (0.5, "2:4"):
        pruned, mask = sparsegpt_weight(W, G, sparsity, block_size=block_size)
        assert (pruned[~mask] == 0).all()
        assert loss(W, pruned, G).sum() < 0.7 * loss(W, W * mask, G).sum()
        # no choice of the values that stay does better than least squares
        assert (loss(W, best_within(W, mask, G), G) <= loss(W, pruned, G) + 1e-3).all()
    share = (~sparsegpt_weight(W, G, 0.5, block_size=block_size)[1]).float().mean()
    assert share == 0.5


def test_the_surgeon_takes_the_weight_whose_loss_costs_least_when_the_others_may_move():
    W, G = layer()
    _, mask = obs_weight(W, G, 1 / 12)
    for row in range(len(W)):
        costs = []
        for j in range(12):
            without = torch.ones_like(mask[:1])
            without[0, j] = False
            costs.append(loss(W[row : row + 1], best_within(W[row : row + 1], without, G), G).item())
        assert not mask[row, torch.tensor(costs).argmin()]


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_the_surgeon_leaves_the_rest_at_the_optimum_of_the_quadratic(sparsity):
    W, G = layer()
    pruned, mask = obs_weight(W, G, sparsity)
    assert ((~mask).sum(1) == int(12 * sparsity)).all()
    torch.testing.assert_close(pruned, best_within(W, mask, G), rtol=1e-3, atol=1e-3)


def test_the_surgeon_is_near_the_best_of_all_masks():
    W, G = layer(n_out=3, n_in=8)
    pruned, _ = obs_weight(W, G, 0.5)
    best = torch.full((3,), torch.inf)
    for stays in itertools.combinations(range(8), 4):
        mask = torch.zeros(3, 8, dtype=torch.bool)
        mask[:, list(stays)] = True
        best = torch.minimum(best, loss(W, best_within(W, mask, G), G))
    found = loss(W, pruned, G)
    assert (found >= best * 0.999).all() and found.sum() < 1.5 * best.sum()


def test_damage_is_surgery_where_inputs_are_uncorrelated():
    W, _ = layer()
    G = torch.diag(torch.rand(12) + 0.5)
    pruned, mask = obs_weight(W, G, 0.5)
    assert torch.equal(mask, keep_largest(obd_saliency(W, G), 0.5))
    torch.testing.assert_close(pruned, W * mask)


def test_the_surgeon_loses_far_less_than_all_that_look_once():
    W, G = layer(n_out=64, n_in=48, tokens=400)
    pruned = {
        "magnitude": W * mask_of(W.abs(), 0.5),
        "wanda": W * mask_of(wanda_score(W, G.diagonal()), 0.5),
        "sparsegpt": sparsegpt_weight(W, G, 0.5)[0],
        "obs": obs_weight(W, G, 0.5)[0],
    }
    errors = {name: relative_error(W, after, G) for name, after in pruned.items()}
    assert errors["sparsegpt"] < errors["magnitude"] and errors["wanda"] < errors["magnitude"]
    assert errors["obs"] < 0.6 * errors["sparsegpt"]


def test_the_callers_weight_stays_as_it_is_even_where_it_is_one_row():
    for n_out, n_in in ((1, 12), (6, 12)):
        W, G = layer(n_out, n_in)
        before = W.clone()
        for prune in (sparsegpt_weight, obs_weight):
            prune(W, G, 0.5)
            assert torch.equal(W, before)


def test_rows_are_pruned_alike_whatever_their_chunk(monkeypatch):
    W, G = layer(n_out=7)
    whole = obs_weight(W, G, 0.5)
    monkeypatch.setattr("lightlib.sparsity.obs.LARGEST", 3 * 12**2)
    assert all(torch.equal(a, b) for a, b in zip(whole, obs_weight(W, G, 0.5), strict=True))


def test_wrp_brings_back_what_the_pattern_took_of_the_best_and_nothing_else():
    W, G = layer(n_in=16)
    scores = wanda_score(W, G.diagonal())
    regular = mask_of(scores, "2:4")
    assert not recovered(scores, regular, 0.0).any()
    back = recovered(scores, regular, 0.25)
    best = keep_largest(scores, 0.75)
    assert not (back & regular).any() and torch.equal((back | regular) & best, best)
    assert not (back & ~best).any()


def test_wrp_at_alpha_0_is_wanda_in_its_pattern_and_more_comes_back_with_alpha(llama, calib):
    plain, _ = wanda(llama, calib, sparsity="2:4", progress=False)
    errors = []
    for alpha in (0.0, 0.25, 0.5):
        light, report = wrp(llama, calib, alpha=alpha, progress=False)
        errors.append(report.rows[0].error)
        part = light.model.layers[0].self_attn.q_proj
        if alpha == 0:
            assert torch.equal(part.dense(), plain.model.layers[0].self_attn.q_proj.dense())
    assert errors == sorted(errors, reverse=True) and part.layouts == ("2:4", "csr")
    assert report.rows[0].notes.endswith("% recovered")


@pytest.mark.parametrize("method", [wanda, sparsegpt, obs, wrp])
def test_no_batches_are_answered_with_what_works_without(method, llama):
    with pytest.raises(ValueError, match=r"needs batches .* magnitude prunes without them"):
        method(llama, [], progress=False)


def test_the_report_tells_the_error_of_the_outputs(llama, calib):
    block = next(stream_blocks(llama, calib, progress=False))
    gram = block.collect(Gram, of=("mlp.up_proj",))["mlp.up_proj"].value
    light, report = sparsegpt(llama, calib, progress=False)
    row = next(r for r in report if r.name == "model.layers.0.mlp.up_proj")
    after = light.get_submodule(row.name).dense()
    W = llama.model.layers[0].mlp.up_proj.weight.detach()
    assert row.error == pytest.approx(relative_error(W, after, gram), rel=1e-4)
    less, _ = magnitude(llama, calib, progress=False)
    assert row.error < relative_error(W, less.get_submodule(row.name).dense(), gram)


def test_obs_knows_no_patterns(llama, calib):
    with pytest.raises(ValueError, match=r"q_proj: obs takes a share of zeros, not 2:4; see sparsegpt"):
        obs(llama, calib, sparsity="2:4", progress=False)
