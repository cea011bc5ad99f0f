"""LLM-Pruner: importance where it is exact, what stays whole, and that what is cut is what mattered least."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightlib import load, save
from lightlib.cost import size
from lightlib.decoder import cast, find_blocks, use_linear_everywhere
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from lightlib.structured import budget
from lightlib.structured.llm_pruner import IMPORTANCES, llm_pruner, most_important, unit_importance
from lightlib.structured.taylor import AGGREGATES, aggregate_members, gradients, weight_importance
from lightlib.units import KINDS, WHOLE, members, scale_units, unit_counts, unit_weights
from tests.conftest import random_model

BLOCKS = ("model.layers.0", "model.layers.1")


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def loss_of(model, ids):
    return F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def pruned(model, calib, **knobs):
    return llm_pruner(model, calib, progress=False, **knobs).model


def scores_of(model, calib, **knobs):
    return unit_importance(model, calib, progress=False, **knobs)


def state_of(model):
    """What a method must leave as it was: weights, their flags and gradients, modes."""
    parameters = [(name, p.clone(), p.requires_grad, p.grad) for name, p in model.named_parameters()]
    return parameters, [part.training for part in model.modules()]


# importance
def test_first_order_is_the_change_of_a_linear_loss():
    W, slope = torch.randn(5, 7), torch.randn(5, 7)
    for i in range(5):
        without = W.clone()
        without[i, 2] = 0
        change = (slope * without).sum() - (slope * W).sum()
        found = weight_importance(W, slope, None, "first")[i, 2]
        torch.testing.assert_close(found, change.abs(), rtol=1e-4, atol=1e-5)


def test_mixed_order_is_the_change_of_a_parabola_and_second_order_twice_that_at_its_bottom():
    W, best, curvature = torch.randn(5, 7), torch.randn(5, 7), torch.rand(5, 7)

    def change(bottom):  # each weight alone to zero
        return 0.5 * curvature * (bottom.square() - (W - bottom).square())

    slope = curvature * (W - best)
    found = weight_importance(W, slope, curvature, "mixed")
    torch.testing.assert_close(found, change(best).abs(), rtol=1e-4, atol=1e-6)
    found = weight_importance(W, torch.zeros(5, 7), curvature, "second")
    torch.testing.assert_close(found, 2 * change(W))


def test_gradients_are_those_of_the_mean_loss_and_squares_the_mean_of_each_rows(llama):
    ids = torch.randint(0, 96, (3, 12), generator=torch.Generator().manual_seed(2))
    name = "model.layers.0.mlp.down_proj"
    found, squares = gradients(llama, [name], [ids[:2], ids[2:]], squares=True, progress=False)[name]
    weight = llama.get_submodule(name).weight
    (expected,) = torch.autograd.grad(loss_of(llama, ids), weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    rows = [torch.autograd.grad(loss_of(llama, row), weight)[0] for row in ids.split(1)]
    torch.testing.assert_close(squares, torch.stack(rows).square().mean(0), rtol=1e-4, atol=1e-9)


def test_vector_importance_of_the_reader_is_the_slope_of_the_loss_as_a_unit_fades(model, calib):
    ids, model = calib[:1], use_linear_everywhere(model)
    found = scores_of(model, ids, importance="vector", aggregate="last")
    name, step = list(find_blocks(model))[1], 0.05
    for kind in KINDS:
        for unit in (0, 1):
            losses = []
            for value in (1 + step, 1 - step):
                scale = torch.ones(unit_counts(model)[name][kind])
                scale[unit] = value
                faded = scale_units(copy.deepcopy(model), {name: {kind: scale}})
                losses.append(loss_of(faded, ids[0]).item())
            slope = abs(losses[0] - losses[1]) / (2 * step)
            assert slope == pytest.approx(found[name][kind][unit].item(), rel=1e-2, abs=1e-5)


def test_rows_that_run_together_give_the_gradients_of_rows_that_run_alone(llama, calib):
    names = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"]
    alone = gradients(llama, names, calib, squares=True, progress=False)
    together = gradients(llama, names, calib, progress=False)
    for name in names:
        torch.testing.assert_close(together[name][0], alone[name][0], rtol=1e-4, atol=1e-7)
        assert together[name][1] is None


def test_importance_is_what_autograd_gives_head_by_head_and_neuron_by_neuron(llama, calib):
    ids = calib[:1]
    loss_of(llama, ids[0]).backward()
    block = find_blocks(llama)[BLOCKS[1]]
    attention, mlp = block.self_attn, block.mlp
    parts = [part for part in block.modules() if isinstance(part, nn.Linear)]
    one = {part: (part.weight * part.weight.grad).abs().detach() for part in parts}
    found = scores_of(llama, ids)[BLOCKS[1]]
    for h in range(2):  # a key-value head of 8 with its two query heads
        wide, narrow = slice(16 * h, 16 * h + 16), slice(8 * h, 8 * h + 8)
        parts = one[attention.q_proj][wide].sum() + one[attention.o_proj][:, wide].sum()
        parts = parts + one[attention.k_proj][narrow].sum() + one[attention.v_proj][narrow].sum()
        assert found["heads"][h].item() == pytest.approx(parts.item(), rel=1e-4)
    neurons = one[mlp.gate_proj].sum(1) + one[mlp.up_proj].sum(1) + one[mlp.down_proj].sum(0)
    torch.testing.assert_close(found["neurons"], neurons.double(), rtol=1e-4, atol=1e-8)


def test_a_unit_that_nothing_reads_has_no_importance_and_goes_first(llama, calib):
    dead = torch.tensor([3, 10, 40])
    for block in find_blocks(llama).values():
        block.mlp.down_proj.weight.data[:, dead] = 0
    for importance in ("first", "second", "mixed", "vector"):
        scores = scores_of(llama, calib, importance=importance, aggregate="product")
        assert all(
            (own["neurons"] == 0).nonzero().flatten().tolist() == dead.tolist() for own in scores.values()
        )
    light = pruned(llama, calib, fraction=3 / 64, kinds=("neurons",))
    assert light.config.intermediate_size == 61
    torch.testing.assert_close(logits(light, calib[0]), logits(llama, calib[0]), rtol=1e-4, atol=1e-5)


def test_aggregators_sum_compare_multiply_or_look_at_the_reader_alone(llama, calib):
    found = {how: scores_of(llama, calib, aggregate=how)[BLOCKS[0]]["neurons"] for how in AGGREGATES}
    assert (found["sum"] > found["max"]).all() and (found["max"] >= found["last"]).all()
    assert (found["max"] > found["last"]).any() and (found["product"] < found["last"]).all()
    parts = torch.tensor([[1.0, 2], [3, 5], [2, 7]])
    by_hand = {"sum": [6, 14], "max": [3, 7], "product": [6, 70], "last": [2, 7]}
    assert all(aggregate_members(parts, how).tolist() == by_hand[how] for how in AGGREGATES)


def test_magnitude_and_random_need_no_data(llama):
    found = scores_of(llama, None, importance="magnitude")[BLOCKS[0]]
    mlp = find_blocks(llama)[BLOCKS[0]].mlp
    gate, up, down = (p.weight.detach().square() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    expected = gate.sum(1) + up.sum(1) + down.sum(0)
    torch.testing.assert_close(found["neurons"], expected.double(), rtol=1e-5, atol=0)
    drawn = [scores_of(llama, None, importance="random", seed=s)[BLOCKS[0]]["neurons"] for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


# what goes and what stays
def test_a_fraction_of_none_changes_nothing_on_any_family(model, calib):
    light, report = llm_pruner(model, calib, fraction=0.0, progress=False)
    assert not report.rows and light.config.to_dict() == model.config.to_dict()
    assert torch.equal(logits(light, calib[0]), logits(use_linear_everywhere(copy.deepcopy(model)), calib[0]))


def test_cutting_the_least_important_equals_masking_them_on_every_family(model, calib, tmp_path):
    scores, counts = scores_of(model, calib), unit_counts(model)
    light, report = llm_pruner(model, calib, fraction=0.5, progress=False)
    masks = {}
    for name, kinds in scores.items():
        median = {kind: own.sort().values[len(own) // 2] for kind, own in kinds.items()}
        masks[name] = {kind: (own >= median[kind]).float() for kind, own in kinds.items()}
    masked = scale_units(use_linear_everywhere(copy.deepcopy(model)), masks)
    torch.testing.assert_close(logits(light, calib[0]), logits(masked, calib[0]), rtol=1e-5, atol=1e-5)
    left = unit_counts(light)
    assert all(left[name][kind] == counts[name][kind] // 2 for name in left for kind in KINDS)
    touched = {
        f"{n}.{m.linear}"
        for n, b in find_blocks(model).items()
        for p in members(model, b).values()
        for m in p
    }
    assert {row.name for row in report} == touched and all(row.method == "llm_pruner" for row in report)
    again = load(save(light, tmp_path / "light"))
    assert torch.equal(logits(again, calib[0]), logits(light, calib[0]))


def test_protected_blocks_and_kinds_that_are_not_named_stay_whole(llama, calib):
    light = pruned(llama, calib, fraction=0.5, kinds=("neurons",), protect=(1, 0))
    counts = list(unit_counts(light).values())
    assert counts == [{"heads": 2, "neurons": 64}, {"heads": 2, "neurons": 32}]
    before, after = dict(llama.named_parameters()), dict(light.named_parameters())
    same = [name for name in before if "layers.1.mlp" not in name]
    assert all(torch.equal(before[name], after[name]) for name in same)
    assert list(scores_of(llama, calib, protect=(0, 1))) == [BLOCKS[0]]


def test_by_default_an_eighth_at_the_first_and_a_sixteenth_at_the_last_stay_whole():
    from tests.conftest import CONFIGS

    config = CONFIGS["llama"]()
    config.num_hidden_layers = 16
    model = type(random_model("llama"))(config).eval()
    light = pruned(model, None, importance="magnitude", kinds=("neurons",), fraction=0.5)
    assert [c["neurons"] for c in unit_counts(light).values()] == [64] * 2 + [32] * 13 + [64]


def test_across_the_model_the_blocks_that_matter_more_keep_more(llama, calib):
    llama.model.layers[0].mlp.down_proj.weight.data *= 1e-3
    knobs = dict(fraction=0.4, kinds=("neurons",), across="model")
    counts = [c["neurons"] for c in unit_counts(pruned(llama, calib, aggregate="last", **knobs)).values()]
    assert sum(counts) == round(0.6 * 128) and counts[1] == 64
    # however little a block matters, it keeps a unit, or as many as go together
    counts = [c["neurons"] for c in unit_counts(pruned(llama, calib, fraction=0.5, kinds=("neurons",),
              aggregate="last", across="model", round_to=8)).values()]  # fmt: skip
    assert counts == [8, 64]


def test_what_stays_is_a_multiple_of_round_to(llama, calib):
    light = pruned(llama, calib, fraction=0.3, round_to=16, kinds=("neurons",))
    assert [c["neurons"] for c in unit_counts(light).values()] == [48, 48]
    scores = {"a": {"neurons": torch.tensor([4.0, 1, 3, 2, 5, 0])}}
    assert most_important(scores, 0.5, "block", 1)["a"]["neurons"].tolist() == [0, 2, 4]
    assert most_important(scores, 0.5, "block", 2)["a"]["neurons"].tolist() == [0, 2, 3, 4]


def test_a_budget_of_bytes_is_met_with_as_little_as_possible(llama, calib):
    whole = size(llama).stored_bytes
    light = pruned(llama, calib, budget_bytes=whole - 9000, kinds=("neurons",))
    neuron = 3 * 32 * 4
    assert whole - 9000 - 2 * neuron < size(light).stored_bytes <= whole - 9000


def test_dropping_the_least_important_costs_less_than_dropping_the_most(llama):
    ids = [torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(3))]
    optimizer = torch.optim.Adam(llama.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(llama, ids[0]).backward()
        optimizer.step()
    scores = scores_of(llama, ids, kinds=("neurons",))
    masks = {
        name: {"neurons": (own["neurons"] < own["neurons"].median()).float()} for name, own in scores.items()
    }
    worst = scale_units(copy.deepcopy(llama), masks)
    light = pruned(llama, ids, fraction=0.5, kinds=("neurons",))
    losses = [loss_of(m, ids[0]).item() for m in (llama, light, worst)]
    assert losses[0] < losses[1] < losses[2]


# the caller's model
@pytest.mark.parametrize("inplace", [False, True])
def test_it_leaves_no_gradients_and_no_flags_behind(llama, calib, inplace):
    llama.train()
    llama.model.layers[0].mlp.requires_grad_(False)
    before, modes = state_of(llama)
    light = pruned(llama, calib, importance="mixed", inplace=inplace)
    assert (light is llama) == inplace
    assert all(p.grad is None and p.grad_fn is None for p in light.parameters())
    assert not any(p.requires_grad for p in light.model.layers[0].mlp.parameters())
    assert all(p.requires_grad for p in light.model.layers[1].mlp.parameters())
    if not inplace:
        after, modes_after = state_of(llama)
        assert modes == modes_after
        assert all(torch.equal(a[1], b[1]) and a[2:] == b[2:] for a, b in zip(before, after, strict=True))


def test_broken_off_in_the_middle_it_leaves_the_callers_model_as_it_was(llama, calib, monkeypatch):
    expected, parts = logits(llama, calib[0]), dict(llama.named_modules())
    grad, calls = torch.autograd.grad, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return grad(*args)

    monkeypatch.setattr(torch.autograd, "grad", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pruned(llama, calib, inplace=True)
    assert all(part is parts[name] for name, part in llama.named_modules())
    assert all(isinstance(p, nn.Parameter) and p.grad is None for p in llama.parameters())
    assert torch.equal(logits(llama, calib[0]), expected)


def test_dropout_is_off_while_gradients_are_taken_and_the_mode_comes_back(calib):
    model = random_model("gpt2").train()
    first, second = (scores_of(model, calib)["transformer.h.0"]["neurons"] for _ in range(2))
    assert torch.equal(first, second) and model.training
    assert pruned(model, calib, fraction=0.5).training


def test_half_precision_ranks_almost_as_single_precision_does(llama, calib):
    single = scores_of(llama, calib)[BLOCKS[0]]["neurons"]
    half = scores_of(cast(llama, torch.bfloat16), calib)[BLOCKS[0]]["neurons"]
    assert torch.corrcoef(torch.stack([single, half]))[0, 1] > 0.99


# channels of the stream
def test_importance_of_a_channel_sums_all_that_makes_and_reads_it(llama, calib):
    ids = calib[:1]
    loss_of(llama, ids[0]).backward()
    found = scores_of(llama, ids, kinds=("channels",))
    assert list(found) == [WHOLE] and found[WHOLE]["channels"].shape == (32,)
    expected = torch.zeros(32)
    for part in (p for p in llama.modules() if isinstance(p, (nn.Linear, nn.Embedding))):
        one = (part.weight * part.weight.grad).abs().detach()
        makes = part.weight.shape[0] == 32 and part not in reading(llama)
        expected += one.sum(1) if makes else one.sum(0)
    torch.testing.assert_close(found[WHOLE]["channels"], expected.double(), rtol=1e-4, atol=1e-7)


def reading(model):
    """The layers of a Llama's blocks that read the stream."""
    return [
        part
        for block in find_blocks(model).values()
        for part in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj,
                     block.mlp.gate_proj, block.mlp.up_proj)
    ]  # fmt: skip


def test_a_channel_that_nothing_writes_and_nothing_reads_goes_first(llama, calib):
    dead = [3, 10, 31]
    with torch.no_grad():
        for block in find_blocks(llama).values():
            for part in (block.self_attn.o_proj, block.mlp.down_proj):
                part.weight[dead] = 0
        llama.model.embed_tokens.weight[:, dead] = 0
    light = pruned(llama, calib, kinds=("channels",), fraction=3 / 32)
    assert light.config.hidden_size == 29
    torch.testing.assert_close(logits(light, calib[0]), logits(llama, calib[0]), rtol=1e-5, atol=1e-5)


def test_channels_meet_budgets_in_bytes_and_in_milliseconds(llama, calib, monkeypatch):
    knobs, whole = dict(kinds=("channels",)), size(llama)
    light = pruned(llama, calib, budget_bytes=int(0.7 * whole.stored_bytes), **knobs)
    wider = 4 * unit_weights(llama, WHOLE)["channels"]
    assert size(light).stored_bytes <= 0.7 * whole.stored_bytes < size(light).stored_bytes + wider
    # a clock on which a weight takes a microsecond
    monkeypatch.setattr(
        budget, "forwards_ms", lambda works: [size(module).parameters / 1e3 for module, _, _ in works]
    )
    light = pruned(llama, calib, budget_ms=0.7 * whole.parameters / 1e3, budget_tokens=16, **knobs)
    assert size(light).parameters == pytest.approx(0.7 * whole.parameters, rel=0.05)


# what is refused
@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"importance": "third"}, "importance='third': choose one of first, second, mixed, vector"),
        ({"aggregate": "mean"}, "aggregate='mean': choose one of sum, max, product, last"),
        ({"across": "layers"}, "across='layers': choose one of block, model"),
        ({"kinds": ("channels", "heads")}, "kinds=.*give a tuple of some of heads, neurons, or .*alone"),
        ({"kinds": ()}, "kinds=.*give a tuple of some of heads, neurons"),
        ({"fraction": 1.0}, "fraction=1.0: give the share"),
        ({"round_to": 0}, "round_to=0"),
        ({"protect": (1, 1)}, r"protect=\(1, 1\) leaves nothing to prune in 2 blocks"),
        ({"protect": (-1, 1)}, r"protect=\(-1, 1\)"),
        ({"budget_bytes": 10}, "budget_bytes=10"),
    ],
)
def test_settings_that_do_not_fit_are_refused(llama, calib, knobs, words):
    with pytest.raises(ValueError, match=words):
        pruned(llama, calib, **knobs)


def test_no_batches_short_ones_and_packed_layers_are_refused(llama, calib):
    assert "random" in IMPORTANCES
    for none in ([], None):
        with pytest.raises(ValueError, match="llm_pruner needs batches"):
            pruned(llama, none)
    with pytest.raises(ValueError, match="take length >= 2"):
        pruned(llama, [torch.zeros(1, 1, dtype=torch.long)])
    packed = rtn(llama, None, grid=Int(8), progress=False).model
    with pytest.raises(ValueError, match=r"is packed .*; take units out before"):
        pruned(packed, calib)


def test_gradients_that_are_not_finite_are_named(llama, calib):
    llama.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"q_proj: its gradient in torch\.float32 is not finite"):
        pruned(llama, calib)


def test_the_bar_says_what_the_gradients_will_take_and_can_be_switched_off(llama, calib, capsys):
    llm_pruner(llama, calib, progress=True)
    shown = capsys.readouterr().err
    assert "llm_pruner, about" in shown and "GB beside the model" in shown and "3/3" in shown
    llm_pruner(llama, calib, progress=False)
    assert capsys.readouterr().err == ""
