"""Matrices and models of low rank: exact at full rank, best at each other, smaller as the formula says."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightlib import load, save
from lightlib.adapters.recover import recover
from lightlib.calibration import stream_blocks
from lightlib.cost import flops, size
from lightlib.decoder import find_blocks, linears, roles, use_linear_everywhere
from lightlib.explain import explain
from lightlib.low_rank import LowRankLinear
from lightlib.lowrank.budget import sensitive
from lightlib.lowrank.correction import correct
from lightlib.lowrank.linear import low_rank_linear
from lightlib.lowrank.pca import pca
from lightlib.lowrank.ranks import rank_for, rank_for_energy, stored
from lightlib.lowrank.svd import low_rank, output_directions, spectra, svd
from lightlib.quality import divergence, perplexity
from lightlib.quantization.gptq import gptq
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from lightlib.recipe import compress
from lightlib.report import relative_error
from lightlib.slicing.slicegpt import slicegpt
from lightlib.sparsity.magnitude import magnitude
from lightlib.sparsity.sparsegpt import sparsegpt
from lightlib.structured.llm_pruner import llm_pruner
from tests.conftest import random_model

SHAPES = [(12, 12), (20, 8), (8, 20)]


@pytest.fixture
def inputs():
    """X (tokens, in) with strong directions, as a function of the number of inputs."""

    def make(n_in):
        generator = torch.Generator().manual_seed(n_in)
        mix = torch.randn(n_in, n_in, generator=generator) * torch.logspace(1, -2, n_in)
        return torch.randn(300, n_in, generator=generator) @ mix

    return make


def random(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestMatrix:
    @pytest.mark.parametrize("pivot", [True, False])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_full_rank_is_the_matrix(self, shape, pivot, inputs):
        W, X = random(shape), inputs(shape[1])
        for gram in (None, X.T @ X, (X.T @ X).diagonal()):
            assert_close(low_rank(W, min(shape), gram, pivot=pivot).to_tensor(), W, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_pivots_change_how_it_is_stored_and_nothing_else(self, shape, inputs):
        W, X = random(shape), inputs(shape[1])
        for rank in range(1, min(shape) + 1):
            thin, pivoted = (low_rank(W, rank, X.T @ X, pivot=p) for p in (False, True))
            assert_close(pivoted.to_tensor(), thin.to_tensor(), rtol=1e-4, atol=1e-4)
            assert thin.shape == pivoted.shape == shape
            assert thin.rank == pivoted.rank == rank
            assert thin.stored - pivoted.stored == rank**2
            assert pivoted.stored == stored(shape, rank, pivot=True)

    def test_pivoted_at_full_rank_takes_what_the_matrix_takes(self):
        assert low_rank(random((8, 20)), 8).stored == 160

    def test_without_a_gram_the_error_is_the_tail_of_the_singular_values(self):
        W = random((12, 9))
        singular = torch.linalg.svdvals(W)
        for rank in range(1, 9):
            error = relative_error(W, low_rank(W, rank).to_tensor())
            assert error == pytest.approx(singular[rank:].norm().item() / singular.norm().item(), rel=1e-4)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_with_the_gram_the_outputs_error_is_the_tail_of_their_energy_and_below_plain_svds(
        self, shape, inputs
    ):
        W, X = random(shape), inputs(shape[1])
        gram = X.T @ X
        _, energy = output_directions(W, gram)
        errors = []
        for rank in range(1, min(shape)):
            weighed, norms, plain = (
                relative_error(W, low_rank(W, rank, g).to_tensor(), gram)
                for g in (gram, gram.diagonal(), None)
            )
            assert weighed == pytest.approx((energy[rank:].sum() / energy.sum()).sqrt().item(), rel=1e-2)
            assert weighed <= min(norms, plain)
            errors.append(weighed)
        assert errors == sorted(errors, reverse=True)

    def test_it_is_pca_of_the_outputs(self, inputs):
        W, X = random((12, 20)), inputs(20)
        found = pca((X @ W.T).double(), 3, center=False).directions
        expected = found.T @ found @ W.double()
        assert_close(low_rank(W, 3, X.T @ X).to_tensor().double(), expected, rtol=1e-3, atol=1e-4)

    def test_equal_uncorrelated_inputs_give_the_plain_svd(self):
        W = random((10, 14))
        plain, weighed = (low_rank(W, 4, gram).to_tensor() for gram in (None, 7 * torch.eye(14)))
        assert_close(weighed, plain)

    def test_inputs_that_never_vary_cost_no_rank(self):
        W, gram = random((6, 6)), torch.diag(torch.tensor([1.0, 1, 1, 0, 0, 0]))
        assert relative_error(W, low_rank(W, 3, gram).to_tensor(), gram) < 1e-6

    def test_ranks_by_weights_are_the_highest_that_fit(self):
        for shape in ((12, 12), (64, 48), (7, 31)):
            for pivot in (True, False):
                for weights in range(sum(shape), shape[0] * shape[1], 17):
                    rank = rank_for(shape, weights, pivot)
                    assert stored(shape, rank, pivot) <= weights
                    assert rank == min(shape) or stored(shape, rank + 1, pivot) > weights

    def test_ranks_by_energy(self):
        values = torch.tensor([3.0, 2.0, 0.1])
        assert [rank_for_energy(values, share) for share in (0.5, 0.69, 0.99, 1.0)] == [1, 1, 2, 3]


class TestLayer:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("pivot", [True, False])
    def test_forward_is_that_of_the_dense_form_with_its_bias(self, pivot, bias):
        found, b = low_rank(random((20, 12)), 5, pivot=pivot), random((20,)) if bias else None
        layer, x = low_rank_linear(found.reduce, found.expand, found.order, b), random((3, 4, 12), 1)
        expected = nn.functional.linear(x, found.to_tensor(), b)
        assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
        assert_close(layer.dense(), found.to_tensor())
        order = 32 * 20 if pivot else 0
        assert layer.stored_bits() == 32 * found.stored + order


def test_full_rank_changes_no_logits(model, calib):
    full = {n: min(p.weight.shape) for b in find_blocks(model) for n, p in named(model, b).items()}
    light, report = svd(model, calib, rank=full, progress=False)
    assert len(report) == 0, "at full rank nothing becomes smaller, so all stays as it is"
    with torch.no_grad():
        assert torch.equal(light(calib[0]).logits, model(calib[0]).logits)


def named(model, block):
    return {f"{block}.{n}": p for n, p in linears(use_linear_everywhere(model).get_submodule(block)).items()}


@pytest.mark.parametrize("pivot", [True, False])
def test_the_light_model_computes_with_its_layers_dense_form(pivot, model, calib):
    light, report = svd(model, calib, fraction=0.3, pivot=pivot, progress=False)
    dense = svd(model, calib, fraction=0.3, pivot=pivot, progress=False).model
    for row in report:
        part = dense.get_submodule(row.name)
        whole = nn.Linear(part.in_features, part.out_features, bias=False)
        whole.weight = nn.Parameter(part.dense())
        zero = part(torch.zeros(1, part.in_features))[0].detach()
        whole.bias = nn.Parameter(zero)
        dense.set_submodule(row.name, whole)
    with torch.no_grad():
        assert_close(light(calib[0]).logits, dense(calib[0]).logits, rtol=1e-4, atol=1e-5)


def test_a_fraction_takes_so_many_weights_of_each_layer_and_flops_fall_with_them(llama, calib):
    light, report = svd(llama, calib, fraction=0.3, progress=False)
    for row in report:
        part = light.get_submodule(row.name)
        assert isinstance(part, LowRankLinear)
        assert stored(row.shape, part.rank, True) <= 0.7 * row.shape[0] * row.shape[1]
        assert stored(row.shape, part.rank + 1, True) > 0.7 * row.shape[0] * row.shape[1]
    ranks = {row.name: light.get_submodule(row.name).rank for row in report}
    gone = sum(math.prod(row.shape) - stored(row.shape, ranks[row.name], True) for row in report)
    assert flops(llama).decode_per_token - flops(light).decode_per_token == 2 * gone
    order = sum(4 * row.shape[0] for row in report)
    assert size(llama).stored_bytes - size(light).stored_bytes == 4 * gone - order


def test_more_rank_moves_the_model_less(llama, calib):
    moved = [divergence(svd(llama, calib, fraction=f, progress=False).model, llama, calib).mean_kl
             for f in (0.6, 0.3, 0.1)]  # fmt: skip
    assert moved == sorted(moved, reverse=True)


def test_energy_chooses_the_rank_of_each_layer(llama, calib):
    _, report = svd(llama, calib, energy=0.9, progress=False)
    assert all(row.error <= (1 - 0.9) ** 0.5 + 1e-3 for row in report)
    assert len({row.notes for row in report}) > 2


def test_rounded_ranks_let_groups_of_their_size_fit_when_the_factors_are_rounded(llama, calib):
    light, report = svd(llama, calib, fraction=0.2, round_to=8, progress=False)
    ranks = {light.get_submodule(row.name).rank for row in report}
    assert all(rank % 8 == 0 for rank in ranks) and max(ranks) <= 17
    both, rows = rtn(light, grid=Int(4, group_size=8), progress=False)
    assert {row.name.rpartition(".")[2] for row in rows} >= {"reduce", "expand"}
    assert size(both).stored_bytes < size(light).stored_bytes


@pytest.mark.parametrize("pivot", [True, False])
def test_a_budget_of_bytes_is_met_from_below(pivot, llama, calib):
    budget = 0.8 * size(llama).stored_bytes
    light, _ = svd(llama, calib, budget_bytes=budget, pivot=pivot, progress=False)
    assert 0.9 * budget < size(light).stored_bytes <= budget


def test_ranks_by_sensitivity_meet_the_same_budget_and_move_the_model_less(calib):
    model = random_model("llama")
    with torch.no_grad():  # a layer that hardly matters, and one that does
        model.model.layers[0].mlp.up_proj.weight.mul_(0.01)
        model.model.layers[1].mlp.down_proj.weight.mul_(4)
    ranks = sensitive(model, calib, fraction=0.4, progress=False)
    uniform, _ = svd(model, calib, fraction=0.4, progress=False)
    chosen, _ = svd(model, calib, rank=ranks, progress=False)
    weights = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    assert sum(p.numel() for p in chosen.model.layers.parameters() if p.dim() == 2) <= 0.6 * weights
    assert divergence(chosen, model, calib).mean_kl < divergence(uniform, model, calib).mean_kl


def test_stages_name_what_reads_one_input(llama, calib):
    light, _ = svd(llama, calib, rank=4, progress=False)
    block = next(stream_blocks(light, calib, progress=False))
    assert block.stages[:4] == [
        ("self_attn.q_proj.reduce", "self_attn.k_proj.reduce", "self_attn.v_proj.reduce"),
        ("self_attn.q_proj.expand",), ("self_attn.k_proj.expand",), ("self_attn.v_proj.expand",),
    ]  # fmt: skip
    assert sorted(name for stage in block.stages for name in stage) == sorted(block.linears)
    before = block.run()
    found = block.collect(lambda n, device: Seen())
    assert {name: seen.width for name, seen in found.items()} == {
        name: part.in_features for name, part in block.linears.items()
    }
    assert all(torch.equal(a, b) for a, b in zip(before, block.run(), strict=True))


class Seen:
    def add(self, x):
        self.width = x.shape[1]


class TestWithOtherMethods:
    @pytest.mark.parametrize(
        "step",
        [
            partial(rtn, grid=Int(8)),
            partial(gptq, grid=Int(8)),
            partial(magnitude, sparsity=0.2),
            partial(sparsegpt, sparsity=0.2),
        ],
    )
    def test_factors_are_rounded_or_pruned_next_and_come_back_from_a_file(self, step, model, calib, tmp_path):
        first = svd(model, calib, fraction=0.3, progress=False)
        both = step(first.model, calib, progress=False)
        names = roles(both.model)
        block = next(iter(find_blocks(both.model).values()))
        assert isinstance(block.get_submodule(names.mlp_out), LowRankLinear)
        assert size(both.model).stored_bytes < size(first.model).stored_bytes
        again = load(save(both.model, tmp_path / "light"))
        with torch.no_grad():
            assert torch.equal(again(calib[0]).logits, both.model(calib[0]).logits)

    def test_what_takes_whole_matrices_says_so(self, llama, calib):
        light, _ = svd(llama, calib, rank=4, progress=False)
        for method in (svd, slicegpt, llm_pruner):
            with pytest.raises(ValueError, match=r"0\.self_attn\.q_proj is a LowRankLinear, and this"):
                method(light, calib, progress=False)

    def test_factors_are_trained_to_recover(self, llama, calib):
        light, _ = svd(llama, calib, fraction=0.5, progress=False)
        better, _ = recover(light, calib, steps=20, lr=1e-2, progress=False)
        assert perplexity(better, calib) < perplexity(light, calib)
        again = better.model.layers[0].mlp.up_proj
        assert again.rank == light.model.layers[0].mlp.up_proj.rank

    def test_explain_speaks_of_each_factor(self, llama, calib):
        light, _ = svd(llama, calib, rank=4, progress=False)
        said = explain(light, context=8, steps=2)
        found = {layer.name: layer for layer in said.layers}
        mega = [f"{size(each).stored_bytes / 1e6:.4g}" for each in (light, llama)]
        assert said.sentence.startswith("Smaller, really: {} MB where whole matrices take {}".format(*mega))
        factor = found["model.layers.0.mlp.up_proj.reduce"]
        assert factor.stored_bytes == 4 * 4 * 32 and factor.speed == "dense"


class TestCorrection:
    @pytest.mark.parametrize(
        "step", [partial(rtn, grid=Int(2, group_size=16)), partial(magnitude, sparsity=0.6)]
    )
    def test_at_full_rank_the_dense_model_is_back(self, step, model, calib, tmp_path):
        light = step(model, calib, progress=False).model
        full = {name: min(part.out_features, part.in_features) for name, part in linears(light).items()
                if name.startswith(roles(light).blocks)}  # fmt: skip
        whole, _ = correct(light, calib, dense=model, rank=full, progress=False)
        with torch.no_grad():
            assert_close(whole(calib[0]).logits, model(calib[0]).logits, rtol=1e-3, atol=1e-4)
        again = load(save(whole, tmp_path / "whole"))
        with torch.no_grad():
            assert torch.equal(again(calib[0]).logits, whole(calib[0]).logits)

    def test_errors_fall_with_the_rank_and_bytes_grow_as_counted(self, llama, calib):
        light = rtn(llama, grid=Int(3, group_size=16), progress=False).model
        errors, bits = [], []
        for rank in (1, 4, 16):
            better, report = correct(light, calib, dense=llama, rank=rank, progress=False)
            errors.append(report.mean_error)
            extra = sum(rank * sum(row.shape) * 4 for row in report)
            assert size(better).stored_bytes == size(light).stored_bytes + extra
            bits.append(sum(row.bits_after - row.bits_before for row in report))
            assert bits[-1] == 8 * extra
        assert errors == sorted(errors, reverse=True)
        assert flops(better).decode_per_token > flops(light).decode_per_token

    def test_as_the_last_step_of_a_recipe(self, llama, calib):
        steps = [
            partial(sparsegpt, sparsity=0.6, progress=False),
            partial(correct, dense=llama, progress=False),
        ]
        both, report = compress(llama, steps, calib)
        alone = steps[0](llama, calib).model
        assert divergence(both, llama, calib).mean_kl < divergence(alone, llama, calib).mean_kl
        assert {row.method for row in report} == {"sparsegpt", "correct"}

    def test_it_says_what_is_missing(self, llama, calib):
        with pytest.raises(ValueError, match="no layer of the model is packed"):
            correct(llama, calib, dense=llama, progress=False)
        light = rtn(llama, grid=Int(4, group_size=16), progress=False).model
        with pytest.raises(ValueError, match="it has no model"):
            correct(light, calib, dense=random_model("gpt2"), progress=False)
        with pytest.raises(ValueError, match="needs batches"):
            correct(light, [], dense=llama, progress=False)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"fraction": 0.2, "rank": 3}, "fraction and rank are given"),
        ({"weighing": "gramm"}, "weighing='gramm'"),
        ({"rank": 33}, r"q_proj: rank=33 does not lie from 1 to 32"),
        ({"rank": {"x": 3}}, "q_proj: no rank for it"),
        ({"fraction": 1.0}, "leaves it no rank"),
        ({"fraction": 1.5}, "fraction=1.5"),
        ({"budget_bytes": 10}, "budget_bytes=10"),
        ({"round_to": 0}, "round_to=0"),
    ],
)
def test_bad_settings_are_named(settings, says, llama, calib):
    with pytest.raises(ValueError, match=says):
        svd(llama, calib, progress=False, **settings)


def test_without_batches_errors_are_those_of_the_weights(llama):
    with pytest.raises(ValueError, match="weighing=None does not"):
        svd(llama)
    _, report = svd(llama, weighing=None, progress=False)
    assert all("rank" in row.notes and 0 < row.error < 1 for row in report)


def test_spectra_are_shares_of_the_weights_and_of_the_outputs_energy(llama, calib):
    found = spectra(llama, calib, progress=False)
    assert set(found) == {f"{b}.{n}" for b, block in find_blocks(llama).items() for n in linears(block)}
    for name, (plain, weighed) in found.items():
        singular = torch.linalg.svdvals(llama.get_submodule(name).weight.detach())
        assert_close(plain, singular.square() / singular.square().sum(), rtol=1e-3, atol=1e-5)
        assert weighed.sum().item() == pytest.approx(1) and (weighed.diff() <= 0).all()
    _, report = svd(llama, calib, rank=4, pivot=False, progress=False)
    row = report.rows[0]  # of the first block, whose inputs no change has reached
    assert row.error**2 == pytest.approx(found[row.name][1][4:].sum().item(), rel=1e-3)
    assert len(spectra(llama, calib, every=2, progress=False)) == len(found) / 2
