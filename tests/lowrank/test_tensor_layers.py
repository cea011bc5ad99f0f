"""Layers of tensor networks: equal to their dense form, differentiable, saved and loaded, shared."""

import copy

import pytest
import torch

from lightlib import load, save
from lightlib.calibration import Gram, stream_blocks
from lightlib.compact import compact_layers
from lightlib.cost import size
from lightlib.decoder import find_blocks, linears
from lightlib.lowrank.cp import als
from lightlib.lowrank.multilinear import distance
from lightlib.lowrank.shared_tucker import shared_tucker, tucker_across_layers
from lightlib.lowrank.tensor_layers import TTLinear
from lightlib.lowrank.tensor_methods import cp, tensor_train, tucker
from lightlib.lowrank.tt_matrix import bonds, tt_matrix
from lightlib.lowrank.tucker import hooi, hosvd
from lightlib.lowrank.tucker_layers import CPLinear, TuckerLinear
from lightlib.lowrank.work import DENSE, Work, cheapest, contraction_flops, cp_flops, tucker_flops
from lightlib.report import relative_error
from tests.conftest import random_model

METHODS = [tensor_train, tucker, cp]
OUT, IN = (3, 4, 2), (2, 5, 3)


def layers(bias=None):
    """One of each kind, of a weight (24, 30)."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(24, 30, generator=generator)
    return {
        "train": TTLinear(tt_matrix(W, OUT, IN, 3), bias),
        "tucker": TuckerLinear(hooi(W.view(4, 6, 30), (None, 3, 7)), 2, bias),
        "tucker of four modes": TuckerLinear(hosvd(W.view(4, 6, 5, 6), (2, 3, 4, 5)), 2, bias),
        "cp": CPLinear(als(W.view(4, 6, 30), 5, sweeps=3), 2, bias),
        "cp of four modes": CPLinear(als(W.view(4, 6, 5, 6), 5, sweeps=3), 2, bias),
    }


@pytest.fixture(params=layers())
def layer(request):
    return layers(bias=torch.linspace(-1, 1, 24))[request.param]


def test_each_order_gives_what_the_dense_weight_gives(layer):
    x = torch.randn(2, 5, 30)
    expected = x @ layer.dense().T
    for order in layer.flops:
        if order != DENSE:
            torch.testing.assert_close(layer.contract(x, order), expected, rtol=1e-5, atol=1e-5)
    for tokens in (1, 1000):
        x = torch.randn(tokens, 30)
        torch.testing.assert_close(layer(x), x @ layer.dense().T + layer.bias, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_factors_and_the_input_in_each_order(layer):
    x = torch.randn(3, 30, requires_grad=True)
    factors = {n: p.requires_grad_() for n, p in layer.named_parameters() if n != "bias"}
    for order in layer.flops:
        y = x @ layer.dense().T if order == DENSE else layer.contract(x, order)
        found = torch.autograd.grad(y.square().sum(), [x, *factors.values()])
        if order == next(iter(layer.flops)):
            expected = found
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert all(g.abs().max() > 0 for g in expected)


def test_it_learns_what_it_lost():
    layer = layers()["train"]
    W = torch.randn(24, 30, generator=torch.Generator().manual_seed(0))
    x, before = torch.randn(200, 30), distance(W, layer.dense())
    layer.requires_grad_()
    steps = torch.optim.Adam(layer.parameters(), 0.01)
    y = x @ W.T + x @ (0.3 * torch.ones(30, 24))  # another weight than it was made of
    losses = []
    for _ in range(40):
        loss = (layer(x) - y).square().mean()
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and distance(W, layer.dense()) != before


def test_an_empty_layer_has_the_same_parameters(layer):
    bias = torch.zeros(24)
    empty = type(layer).empty(30, 24, bias, **layer.settings())
    assert {n: p.shape for n, p in empty.named_parameters()} == {
        n: p.shape for n, p in layer.named_parameters()
    }
    assert empty.settings() == layer.settings() and layer.stored_bits() == 32 * (
        24 + sum(p.numel() for n, p in layer.named_parameters() if n != "bias")
    )


def test_in_bfloat16_it_is_built_in_float32_and_rounded_once():
    layer = layers()["train"].to(torch.bfloat16)
    exact = TTLinear(layer.matrix(torch.float32)).dense()
    assert torch.equal(layer.dense(torch.bfloat16), exact.to(torch.bfloat16))
    assert layer(torch.randn(2, 30, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_what_a_product_costs_is_what_its_contractions_multiply():
    ranks = bonds(OUT, IN, 3)
    found = contraction_flops(OUT, IN, ranks)
    W = tt_matrix(torch.randn(24, 30), OUT, IN, 3)
    for order in ("left to right", "right to left"):
        assert found[order].of(7) == counted(lambda o=order: W.times(torch.randn(7, 30), o))
    assert found[DENSE].once == counted(W.to_matrix)
    for name, layer in layers().items():
        if name != "train":
            order = next(iter(layer.flops))
            once, token = layer.flops[order].once, layer.flops[order].token
            matmuls = counted(lambda layer=layer, order=order: layer.contract(torch.randn(7, 30), order))
            assert matmuls == 7 * token, f"{name}: {once}"


def counted(work):
    """FLOPs of the matrix products that torch runs."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


def test_the_cheapest_order_depends_on_the_tokens():
    orders = {"a": Work(0, 100), DENSE: Work(1000, 10)}
    assert [cheapest(orders, tokens) for tokens in (1, 11, 12)] == ["a", "a", DENSE]
    narrow_first = contraction_flops((2, 16), (16, 2), (4,))
    assert narrow_first["left to right"].token != narrow_first["right to left"].token
    # of rank 1 it multiplies less than a dense weight does; of high ranks far more
    assert cp_flops((24, 24), (24, 24), 1)["factor by factor"].token < 2 * 576 * 576
    assert contraction_flops((24, 24), (24, 24), (230,))["left to right"].token > 10 * 2 * 576 * 576
    whole = tucker_flops((4, 8), (32,), (None, None, None))
    assert whole["factor by factor"] == Work(0, 2 * 32 * 32) == whole[DENSE]


def test_the_path_is_real_while_factors_are_passed():
    layer = layers()["train"]
    assert layer.fast_path(torch.float32, "cpu") == ("contraction of 3 cores", "")
    layer = TuckerLinear(hosvd(torch.randn(24, 30), (24, 24)), 1)
    layer.flops = {"factor by factor": Work(0, 10), DENSE: Work(2, 3)}
    path, reason = layer.fast_path(torch.float32, "cpu")
    assert not path and "even for one token" in reason


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_models_are_smaller_as_told_and_come_back_bit_equal(method, family, calib, tmp_path):
    model = random_model(family)
    light, report = method(model, calib, fraction=0.3, progress=False)
    changed = compact_layers(light)
    assert len(changed) == sum(len(linears(block)) for block in find_blocks(light).values())
    for row in report:
        assert row.bits_after <= 0.7 * row.bits_before and row.bits_after > 0.4 * row.bits_before
        assert "rank" in row.notes and 0 < row.error < 1
    again = load(save(light, tmp_path / "light"))
    with torch.no_grad():
        assert torch.equal(again(calib[0]).logits, light(calib[0]).logits)
        assert torch.isfinite(light(calib[0]).logits).all()


@pytest.mark.parametrize("method", METHODS)
def test_without_batches_the_layers_are_the_same_and_errors_are_those_of_weights(method, llama, calib):
    light, report = method(llama, progress=False)
    seeing, seen = method(llama, calib, progress=False)
    name = "model.layers.0.self_attn.q_proj"
    W, after = (m.get_submodule(name) for m in (llama, light))
    assert torch.equal(after.dense(), seeing.get_submodule(name).dense())
    gram = next(stream_blocks(llama, calib, progress=False)).collect(Gram)["self_attn.q_proj"].value
    assert report.rows[0].name == name and "error of the weights alone" in report.rows[0].notes
    assert report.rows[0].error == pytest.approx(relative_error(W.weight.detach(), after.dense()))
    assert seen.rows[0].error == pytest.approx(
        relative_error(W.weight.detach(), after.dense(), gram), rel=1e-4
    )


def test_more_numbers_leave_less_error(llama):
    for method in (tensor_train, tucker):
        errors = [method(llama, fraction=f, progress=False).reports.mean_error for f in (0.1, 0.4, 0.8)]
        assert errors == sorted(errors)


def test_heads_stay_whole_and_a_matrix_is_its_svd(llama):
    light, _ = tucker(llama, progress=False)
    block, dense = light.model.layers[0], llama.model.layers[0]
    assert block.self_attn.q_proj.out_shape == (4, 8) and block.self_attn.q_proj.ranks[0] is None
    assert block.self_attn.o_proj.in_shape == (4, 8) and block.self_attn.o_proj.ranks[1] is None
    W, up = dense.mlp.up_proj.weight.detach(), block.mlp.up_proj
    S, rank = torch.linalg.svdvals(W), up.ranks[1]
    assert rank == int(0.8 * 64 * 32) // (64 + 32)
    assert distance(W, up.dense()) == pytest.approx((S[rank:].norm() / S.norm()).item(), rel=1e-4)
    split, _ = tucker(llama, heads=False, order=2, progress=False)
    assert split.model.layers[0].self_attn.q_proj.out_shape == (4, 8)
    assert split.model.layers[0].mlp.up_proj.out_shape == (8, 8)


def test_slices_share_their_factors_and_differ_in_a_diagonal(llama):
    light, _ = cp(llama, slices=7, sweeps=2, progress=False)
    q, up, down = (
        light.model.layers[0].get_submodule(n) for n in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    )
    assert (q.out_shape, q.in_shape) == ((4, 8), (32,))
    assert up.out_shape == (8, 8) and (down.out_shape, down.in_shape) == ((32,), (8, 8))
    A, B, C = q.factor1, q.factor2, q.factor0
    for W, c in zip(q.dense().view(4, 8, 32), C, strict=True):
        torch.testing.assert_close(W, A @ c.diag() @ B.T, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused(llama):
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.q_proj: .* takes 36 numbers at rank 1, 20 may"
    ):
        tensor_train(llama, fraction=0.98, progress=False)
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.q_proj: 4 x 8 x 32 takes 44 numbers at ranks of 1"
    ):
        tucker(llama, fraction=0.98, progress=False)
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.q_proj: 4 x 8 x 32 takes 44 numbers at rank 1"
    ):
        cp(llama, fraction=0.98, progress=False)
    for method in (*METHODS, tucker_across_layers):
        with pytest.raises(ValueError, match="fraction=1: give a number from 0 to below 1"):
            method(llama, fraction=1, progress=False)


class TestAcrossLayers:
    def test_the_bases_are_those_of_the_stack(self):
        weights = [torch.randn(12, 10).double() for _ in range(4)]
        found, expected = (
            shared_tucker(weights, 5, 4, sweeps=40),
            hooi(torch.stack(weights), (None, 5, 4), 40),
        )
        errors = [distance(torch.stack(weights), t.to_tensor()) for t in (found, expected)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-4)
        worse = shared_tucker(weights, 5, 4, sweeps=0)
        assert distance(torch.stack(weights), worse.to_tensor()) >= errors[0]
        assert distance(torch.stack(weights), shared_tucker(weights, 12, 10).to_tensor()) < 1e-12

    def test_weights_with_shared_bases_are_recovered(self):
        U, V = torch.randn(12, 3), torch.randn(10, 2)
        weights = [U @ torch.randn(3, 2) @ V.T for _ in range(4)]
        assert distance(torch.stack(weights), shared_tucker(weights, 3, 2).to_tensor()) < 1e-5

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_what_is_shared_is_stored_once_and_comes_back_bit_equal(self, family, calib, tmp_path):
        model = random_model(family)
        light, report = tucker_across_layers(model, calib, fraction=0.3, progress=False)
        first, second = (list(find_blocks(light).values())[i] for i in (0, 1))
        numbers = sum(p.numel() for p in model.parameters())
        for row in report.rows[: len(report) // 2]:
            name = row.name.split(".", 3)[3]
            one, other = first.get_submodule(name), second.get_submodule(name)
            assert one.reduce is other.reduce and one.expand is other.expand and one.core is not other.core
            assert type(one.reduce) is torch.nn.Linear or type(one.expand) is torch.nn.Linear
            n_out, n_in = row.shape
            r_out, r_in = one.ranks
            stored = 2 * one.core.weight.numel() + n_out * (r_out or 0) + n_in * (r_in or 0)
            assert stored <= 0.7 * 2 * n_out * n_in
            numbers += stored - 2 * n_out * n_in
        assert size(light).stored_bytes == 4 * numbers + size(model).stored_bytes - 4 * sum(
            p.numel() for p in model.parameters()
        )
        folder = save(light, tmp_path / "light")
        overhead = (folder / "lightlib.safetensors").stat().st_size - size(light).stored_bytes
        assert 0 < overhead < 20_000, "names and shapes"
        again = load(folder)
        parts = list(find_blocks(again).values())
        assert parts[0].get_submodule(name).reduce is parts[1].get_submodule(name).reduce
        with torch.no_grad():
            assert torch.equal(again(calib[0]).logits, light(calib[0]).logits)
        copied = copy.deepcopy(light)
        assert size(copied) == size(light)

    def test_a_row_counts_a_core_and_its_share_of_the_rest(self, llama):
        light, report = tucker_across_layers(llama, fraction=0.3, progress=False)
        layer, row = light.model.layers[1].self_attn.q_proj, report.rows[len(report) // 2]
        assert row.name == "model.layers.1.self_attn.q_proj" and "2 x 32 x 32, rank whole" in row.notes
        own, shared = (sum(p.numel() for p in parts) for parts in (
            [layer.core.weight], [*layer.reduce.parameters(), *layer.expand.parameters()]
        ))  # fmt: skip
        assert layer.stored_bits() == 32 * own + 32 * shared // 2
        before, after = (sum(getattr(r, k) for r in report) for k in ("bits_before", "bits_after"))
        assert size(llama).stored_bytes - size(light).stored_bytes == (before - after) // 8

    def test_with_all_directions_nothing_changes(self, llama, calib):
        from lightlib.lowrank.shared_tucker import shared_layers

        parts = [block.self_attn.q_proj for block in llama.model.layers]
        found = shared_tucker([p.weight.detach() for p in parts], 32, 32)
        for C, part in zip(found.core, parts, strict=True):
            torch.testing.assert_close(found.factors[1] @ C @ found.factors[2].T, part.weight.detach())
        new = shared_layers("q_proj", parts, 0.3, 3, None)
        x = torch.randn(5, 32)
        torch.testing.assert_close(new[1](x), x @ new[1].dense().T, rtol=1e-5, atol=1e-5)

    def test_blocks_that_differ_are_refused(self, llama):
        llama.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 48, bias=False)
        with pytest.raises(
            ValueError, match=r"layers\.1\.mlp\.up_proj is not of the size .*64 x 32 and 48 x 32"
        ):
            tucker_across_layers(llama, progress=False)

    def test_packed_blocks_are_refused(self, llama):
        light, _ = tensor_train(llama, progress=False)
        with pytest.raises(ValueError, match=r"q_proj is a TTLinear; share the layers before packing"):
            tucker_across_layers(light, progress=False)

    def test_broken_off_in_place_it_leaves_the_model_as_it_was(self, llama, calib, monkeypatch):
        from lightlib.calibration import Block

        replace, before = Block.replace, {name: id(part) for name, part in llama.named_modules()}

        def interrupted(self, *args, **named):
            if self.name.endswith("1"):
                raise KeyboardInterrupt
            return replace(self, *args, **named)

        monkeypatch.setattr(Block, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tucker_across_layers(llama, progress=False, inplace=True)
        assert {name: id(part) for name, part in llama.named_modules()} == before
        assert not hasattr(llama, "structure")
