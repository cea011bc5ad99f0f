"""CFSP: how far blocks turn the stream, how many neurons that leaves them, and which."""

import copy

import pytest
import torch

from lightlib import load, save
from lightlib.calibration import Block
from lightlib.cost import size
from lightlib.decoder import find_blocks, linear_shapes, roles, use_linear_everywhere
from lightlib.structured.angular import angular_distance, block_importance
from lightlib.structured.cfsp import block_shares, cfsp, importances, neuron_counts, neuron_scores
from lightlib.units import members, unit_counts
from tests.conftest import inputs_of, random_model


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def neurons_left(model):
    return [counts["neurons"] for counts in unit_counts(model).values()]


def test_equal_opposite_and_orthogonal_vectors_have_the_distances_0_1_and_a_half():
    x = torch.randn(50, 576)
    turned = torch.stack([-x[:, 1::2], x[:, ::2]], -1).flatten(1)
    assert torch.equal(angular_distance(x, x), torch.zeros(50))
    torch.testing.assert_close(angular_distance(x, -3 * x), torch.ones(50))
    torch.testing.assert_close(angular_distance(x, turned), torch.full((50,), 0.5))


def test_a_small_angle_keeps_its_digits_where_the_arccos_loses_them_all():
    x = torch.tensor([[1.0, 0.0, 0.0]])
    y = torch.tensor([[1.0, 1e-5, 0.0]])
    assert torch.nn.functional.cosine_similarity(x, y).arccos() == 0
    torch.testing.assert_close(angular_distance(x, y), torch.tensor([1e-5 / torch.pi]))


def test_nearly_equal_vectors_and_vectors_of_zeros_give_a_number():
    x = 100 * torch.randn(20000, 64)
    y = x * (1 + 1e-7 * torch.randn(20000, 1))
    cosines = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    assert cosines.arccos().isnan().any(), "rounding lifts some cosine above 1"
    assert (angular_distance(x, y) < 1e-6).all()
    assert angular_distance(torch.zeros(1, 4), torch.ones(1, 4)) == 0.5


def test_a_blocks_importance_is_the_mean_angle_from_its_input_to_its_output(model, calib):
    found, (_, second) = block_importance(model, calib, progress=False), find_blocks(model).values()
    names, (inputs, ends) = roles(model), ([], [])
    hooks = [second.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))]
    norm = model.get_submodule(names.final_norm)
    hooks.append(norm.register_forward_pre_hook(lambda _, args: ends.append(args[0].flatten(0, -2))))
    for ids in calib:
        logits(model, ids)
    for hook in hooks:
        hook.remove()
    expected = angular_distance(torch.cat(inputs), torch.cat(ends)).mean().item()
    assert found[list(found)[1]] == pytest.approx(expected, rel=1e-5)
    assert list(found) == list(find_blocks(model))


def test_equal_importance_or_no_sharpness_gives_equal_shares():
    torch.testing.assert_close(block_shares(torch.full((5,), 0.3), 0.2, 9.0), torch.full((5,), 0.8).double())
    torch.testing.assert_close(block_shares(torch.rand(5), 0.3, 0.0), torch.full((5,), 0.7).double())


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("sharpness", [1.6384, 13.1, 200.0])
def test_shares_leave_what_was_asked_for_rise_with_importance_and_never_exceed_one(fraction, sharpness):
    importance, sizes = torch.tensor([0.5, 0.18, 0.08, 0.07, 0.09, 0.21]), [64, 64, 32, 64, 16, 64]
    shares = block_shares(importance, fraction, sharpness)
    assert shares.mean().item() == pytest.approx(1 - fraction)
    assert shares.min() > 0 and shares.max() <= 1
    assert (shares[importance.argsort()].diff() >= 0).all()
    uneven = block_shares(importance, fraction, sharpness, sizes)
    assert (uneven @ torch.tensor(sizes).double()).item() == pytest.approx((1 - fraction) * sum(sizes))


def test_shares_are_those_of_the_released_codes_sum_over_tokens_divided_by_ten_thousand():
    angles, tokens, keep = torch.rand(6, dtype=torch.float64) / 10, 32 * 512, 0.8
    sums = angles * tokens
    a = 1 / (1 + torch.exp(-(sums - sums.mean()) / 1e4))
    torch.testing.assert_close(block_shares(angles, 0.2, 1.6384), a / a.mean() * keep, rtol=1e-9, atol=1e-9)


def test_the_weights_of_the_released_code_cancel_and_leave_the_activations_norm():
    gate, up, down = torch.randn(3, 1536, 576).abs().unbind()
    norm = torch.rand(1536) * 10
    weighted = down * norm[:, None]
    literal = (  # (neurons, d_model): each divided by its sum over the axis that is then averaged
        weighted / weighted.sum(1, keepdim=True)
        + up / up.sum(1, keepdim=True)
        + gate / gate.sum(1, keepdim=True)
    ) * norm[:, None]
    ours = 3 / 576 * neuron_scores([gate, up, down], norm.square(), "activation")
    torch.testing.assert_close(ours, literal.mean(1), rtol=0, atol=2e-7)
    assert not torch.allclose(neuron_scores([gate, up, down], norm.square(), "weights"), ours, rtol=0.1)


def test_with_equal_weights_both_scores_rank_alike_and_with_equal_norms_weights_decide():
    norm, ones = torch.rand(40) + 0.1, torch.ones(40, 8)
    for power in (0.5, 1.0, 2.0):
        by_weights = neuron_scores([ones, ones, ones], norm.square(), "weights", power)
        torch.testing.assert_close(by_weights, (2 / 40 + norm / norm.sum()) * norm**power)
    gate = torch.ones(40, 8)
    gate[7] = 3.0
    scores = neuron_scores([gate, ones, ones], torch.ones(40), "weights")
    assert scores.argmax() == 7 and scores.sort().values[:-1].unique().numel() == 1


def test_scores_come_from_the_inputs_of_the_layer_that_reads_the_neurons(model, calib):
    dense = use_linear_everywhere(copy.deepcopy(model))
    importance, scores = importances(dense, calib, "activation", progress=False)
    assert importance == pytest.approx(block_importance(model, calib, progress=False), rel=1e-4)
    for name, block in find_blocks(dense).items():
        X = inputs_of(block.get_submodule(roles(dense).mlp_out), dense, calib)
        torch.testing.assert_close(scores[name], X.norm(dim=0))


@pytest.mark.parametrize("score", ["activation", "weights"])
def test_dead_neurons_go_first_and_then_nothing_changes(model, calib, score):
    model = use_linear_everywhere(model)
    for block in find_blocks(model).values():
        parts = members(model, block)["neurons"]
        dead = torch.randperm(len(parts[-1].index), generator=torch.Generator().manual_seed(0))[:16]
        for member in parts[:-1]:
            linear = block.get_submodule(member.linear)
            linear.weight.data[member.index[dead].flatten()] = 0
            if linear.bias is not None:
                linear.bias.data[member.index[dead].flatten()] = 0
    share = 16 * 2 / sum(neurons_left(model))
    light, _ = cfsp(model, calib, fraction=share, sharpness=0.0, score=score, round_to=1, progress=False)
    assert sum(neurons_left(light)) == sum(neurons_left(model)) - 32
    torch.testing.assert_close(logits(light, calib[0]), logits(model, calib[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("round_to", [1, 8, 100, 128])
@pytest.mark.parametrize("fraction", [0.0, 0.13, 0.2, 0.5, 0.8])
def test_counts_are_multiples_whose_sum_is_within_one_of_what_was_asked(round_to, fraction):
    sizes, importance = [1536, 1536, 1500, 700, 1536], torch.tensor([0.5, 0.1, 0.1, 0.2, 0.11])
    shares = block_shares(importance, fraction, 13.1, sizes).tolist()
    counts = neuron_counts(sizes, shares, round_to)
    assert abs(sum(counts) - (1 - fraction) * sum(sizes)) <= max(round_to / 2, 0.5)
    pairs = list(zip(counts, sizes, strict=True))
    assert all(min(round_to, n) <= count <= n and (count % round_to == 0 or count == n) for count, n in pairs)
    if fraction == 0:
        assert counts == sizes


def test_a_block_that_has_less_neurons_than_a_multiple_stays_whole():
    assert neuron_counts([64, 64], [0.5, 0.5], 128) == [64, 64]
    assert neuron_counts([256, 100], [0.1, 0.1], 128) == [128, 100]


@pytest.mark.parametrize("score", ["activation", "weights"])
def test_it_cuts_what_it_says_on_every_family_and_leaves_the_callers_model(model, calib, tmp_path, score):
    before, expected = copy.deepcopy(model.state_dict()), logits(model, calib[0])
    light, report = cfsp(model, calib, fraction=0.25, score=score, round_to=8, progress=False)
    total = sum(neurons_left(model))
    assert sum(neurons_left(light)) == round(0.75 * total / 8) * 8
    cut = [name for name, shape in linear_shapes(light).items() if shape != linear_shapes(model)[name]]
    assert sorted(row.name for row in report) == sorted(cut)
    assert all(row.bits_after < row.bits_before and row.method == "cfsp" for row in report)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(logits(model, calib[0]), expected)
    again = load(save(light, tmp_path / "light"))
    assert torch.equal(logits(again, calib[0]), logits(light, calib[0]))


def test_fraction_0_changes_nothing(model, calib):
    light, report = cfsp(model, calib, fraction=0.0, round_to=8, progress=False)
    torch.testing.assert_close(logits(light, calib[0]), logits(model, calib[0]))
    assert len(report) == 0


def test_the_block_that_turns_the_stream_more_keeps_more(llama, calib):
    importance = block_importance(llama, calib, progress=False)
    light, _ = cfsp(llama, calib, fraction=0.5, sharpness=200.0, round_to=1, progress=False)
    counts = [n["neurons"] for n in unit_counts(light).values()]
    assert counts.index(max(counts)) == list(importance.values()).index(max(importance.values()))
    assert sum(counts) == 64 and min(counts) < 32


def test_a_second_cut_takes_its_share_of_what_is_left(llama, calib):
    light, _ = cfsp(llama, calib, fraction=0.25, sharpness=200.0, round_to=1, progress=False)
    assert len(set(neurons_left(light))) == 2
    twice, _ = cfsp(light, calib, fraction=0.5, sharpness=200.0, round_to=1, progress=False)
    assert sum(neurons_left(twice)) == 48


def test_a_budget_in_bytes_is_met_by_the_least_cut(llama, calib):
    whole = size(llama).stored_bytes
    neuron = 3 * 32 * 4
    light, _ = cfsp(llama, calib, budget_bytes=whole - 10 * neuron, round_to=1, progress=False)
    assert size(light).stored_bytes == whole - 10 * neuron
    with pytest.raises(ValueError, match="budget_bytes=100"):
        cfsp(llama, calib, budget_bytes=100, progress=False)


def test_broken_off_in_the_middle_it_leaves_the_callers_model_as_it_was(model, calib, monkeypatch):
    before, expected = {name: id(part) for name, part in model.named_modules()}, logits(model, calib[0])
    collect = Block.collect

    def interrupted(self, *args, **named):
        if self.name.endswith(".1"):
            raise KeyboardInterrupt
        return collect(self, *args, **named)

    monkeypatch.setattr(Block, "collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cfsp(model, calib, progress=False, inplace=True)
    assert {name: id(part) for name, part in model.named_modules()} == before
    assert torch.equal(logits(model, calib[0]), expected)


def test_inplace_changes_the_callers_model(llama, calib):
    light, _ = cfsp(llama, calib, fraction=0.5, round_to=8, progress=False, inplace=True)
    assert light is llama and sum(neurons_left(llama)) == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(fraction=1.0), "fraction=1.0"),
        (dict(fraction=-0.1), "fraction=-0.1"),
        (dict(score="gradient"), "'gradient': choose one of activation, weights"),
        (dict(round_to=0), "round_to=0"),
        (dict(budget_bytes=1, budget_ms=1.0), "give one of them"),
    ],
)
def test_settings_that_do_not_fit_are_refused(llama, calib, settings, message):
    with pytest.raises(ValueError, match=message):
        cfsp(llama, calib, progress=False, **settings)


def test_it_needs_batches():
    with pytest.raises(ValueError, match="batches"):
        cfsp(random_model("llama"), [])
