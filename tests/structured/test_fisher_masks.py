"""Fisher masks: gradients as by differences, the search as by trying all, tuning exact where it can be."""

import copy
import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from lightlib import load, save
from lightlib.cost import size
from lightlib.decoder import find_blocks, roles, use_linear_everywhere
from lightlib.structured import fisher_masks as module
from lightlib.structured.budget import LatencyTable
from lightlib.structured.fisher_masks import fisher_masks, mask_gradients
from lightlib.structured.mask_search import line, noise_share, rearranged, search, time_prices
from lightlib.structured.mask_tuning import adds_to_stream, tune_masks, tuned
from lightlib.training import next_token_loss
from lightlib.units import keep_units, members, scale_units, unit_counts
from tests.conftest import CONFIGS, inputs_of, random_model


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def pruned(model, calib, **knobs):
    return fisher_masks(model, calib, progress=False, **knobs).model


def some_scores(blocks=2, heads=3, neurons=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"block{i}": {
            "heads": torch.rand(heads, generator=generator),
            "neurons": torch.rand(neurons, generator=generator),
        }
        for i in range(blocks)
    }


def total_of(scores, kept):
    return sum(scores[b][k][i].sum().item() for b, kinds in kept.items() for k, i in kinds.items())


def price_of(kept, prices):
    return sum(prices[k] * len(i) for kinds in kept.values() for k, i in kinds.items())


# gradients with respect to masks
def test_mask_gradients_are_differences_of_the_loss_on_every_family(model, calib):
    model, step = use_linear_everywhere(model).double(), 1e-2  # norms compute in float32
    found, windows = mask_gradients(model, calib, progress=False), [w for b in calib for w in b.split(1)]

    def losses(masks):
        masked = scale_units(copy.deepcopy(model), masks)
        predicted = [(logits(masked, w)[0, :-1], w[0, 1:]) for w in windows]
        return torch.stack([torch.nn.functional.cross_entropy(*pair) for pair in predicted])

    generator = torch.Generator().manual_seed(0)
    for block, kinds in unit_counts(model).items():
        for kind, count in kinds.items():
            assert found[block][kind].shape == (len(windows), count)
            # all units at once, each by another step
            along = torch.randn(count, dtype=torch.float64, generator=generator)
            up, down = (losses({block: {kind: 1 + h * along}}) for h in (step, -step))
            slope = (up - down) / (2 * step)
            assert_close(found[block][kind].double() @ along, slope, rtol=1e-2, atol=2e-5)


def test_mask_gradients_are_weight_times_gradient_summed_over_a_units_columns(llama, calib):
    found = mask_gradients(llama, calib, progress=False)
    for sample, window in enumerate(w for b in calib for w in b.split(1)):
        llama.zero_grad()
        next_token_loss(llama, window).backward()
        for name, block in find_blocks(llama).items():
            for kind, parts in members(llama, block).items():
                weight = block.get_submodule(parts[-1].linear).weight
                expected = (weight * weight.grad).sum(0)[parts[-1].index].sum(1)
                assert_close(found[name][kind][sample], expected, rtol=1e-4, atol=1e-6)


def test_mask_gradients_leave_the_model_as_it_is(family, calib):
    model = random_model(family)
    before = {name: (p, p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    mask_gradients(model, calib, progress=False)
    for name, p in model.named_parameters():
        same, values, grad = before[name]
        assert p is same and torch.equal(p, values) and p.grad is None and p.requires_grad == grad


# search
@pytest.mark.parametrize("prices", [{"heads": 7.0, "neurons": 2.0}, {"heads": 2.5, "neurons": 4.0}])
@pytest.mark.parametrize("share", [0.35, 0.5, 0.75, 0.95])
def test_the_search_is_as_good_as_trying_every_choice(prices, share):
    scores = some_scores(neurons=4)
    budget = share * sum(prices[k] * len(s) for kinds in scores.values() for k, s in kinds.items())
    kept = search(scores, prices, budget)
    assert price_of(kept, prices) <= budget
    parts = [(b, k) for b, kinds in scores.items() for k in kinds]
    some = [
        [
            c
            for n in range(1, len(scores[b][k]) + 1)
            for c in itertools.combinations(range(len(scores[b][k])), n)
        ]
        for b, k in parts
    ]
    most = -math.inf
    for choice in itertools.product(*some):
        if sum(prices[k] * len(c) for (_, k), c in zip(parts, choice, strict=True)) <= budget:
            gain = sum(scores[b][k][list(c)].sum().item() for (b, k), c in zip(parts, choice, strict=True))
            most = max(most, gain)
    assert total_of(scores, kept) == pytest.approx(most)


def test_packets_of_neurons_are_chosen_as_well_as_by_trying_every_number_of_them():
    scores, prices = some_scores(heads=2, neurons=8), {"heads": 5.0, "neurons": 1.0}
    kept = search(scores, prices, 20.0, round_to=2)
    assert all(len(kinds["neurons"]) % 2 == 0 for kinds in kept.values()) and price_of(kept, prices) <= 20
    most = 0.0
    for counts in itertools.product(range(1, 3), range(2, 9, 2), range(1, 3), range(2, 9, 2)):
        by_kind = zip(counts, ("heads", "neurons") * 2, ("block0",) * 2 + ("block1",) * 2, strict=True)
        gain, price = 0.0, 0.0
        for n, kind, block in by_kind:
            gain += scores[block][kind].sort(descending=True).values[:n].sum().item()
            price += prices[kind] * n
        most = max(most, gain if price <= 20 else 0.0)
    assert total_of(scores, kept) == pytest.approx(most)


def test_a_budget_for_all_keeps_all_and_one_for_none_keeps_the_best_of_each_block():
    scores, prices = some_scores(), {"heads": 7.0, "neurons": 2.0}
    everything = search(scores, prices, 2 * (21.0 + 10.0), round_to=3)  # 5 neurons are no multiple of 3
    assert all(len(i) == len(scores[b][k]) for b, kinds in everything.items() for k, i in kinds.items())
    for block, kinds in search(scores, prices, 0.0).items():
        assert {k: i.tolist() for k, i in kinds.items()} == {
            k: [int(s.argmax())] for k, s in scores[block].items()
        }
    assert {len(k["heads"]) for k in search(scores, prices, 0.0, {"heads": 2}).values()} == {2}


def test_units_are_priced_by_the_line_of_a_blocks_time_and_free_where_it_is_flat():
    flat = (10, 20, 30, 40), (3.0, 3.0, 4.0, 5.0)
    slope, knee = line(*flat)
    assert (slope, knee) == (pytest.approx(0.1), 20)
    assert line((10, 20, 30, 40), (1.0, 2.0, 3.0, 4.0)) == (pytest.approx(0.1), 1)
    table = LatencyTable({"a": {"heads": flat, "neurons": flat}, "b": {"heads": flat, "neurons": flat}}, 1.0)
    assert time_prices(table, ("neurons",)) == ({"neurons": pytest.approx(0.1)}, {"neurons": 20})


# rearrangement
def expected_loss(gradients, kept):
    gone = torch.ones(gradients.shape[1], dtype=torch.bool).index_fill(0, kept, False)
    return gradients[:, gone].double().sum(1).square().mean().item()


def test_rearranging_keeps_the_count_never_raises_the_loss_and_often_reaches_the_best():
    generator, reached = torch.Generator().manual_seed(0), 0
    for _ in range(20):
        gradients = torch.randn(12, 7, generator=generator)
        scores = gradients.square().mean(0)
        kept = scores.topk(4).indices.sort().values
        again = rearranged(gradients, kept, shrinkage=0.0)
        assert len(again) == 4 and torch.equal(again, again.unique())
        losses = [expected_loss(gradients, torch.tensor(c)) for c in itertools.combinations(range(7), 4)]
        assert min(losses) - 1e-9 <= expected_loss(gradients, again) <= expected_loss(gradients, kept) + 1e-9
        reached += expected_loss(gradients, again) <= min(losses) + 1e-9
    assert reached >= 15


def test_two_units_that_undo_each_other_go_together():
    gradients = torch.zeros(8, 4)
    gradients[:, 0] = torch.randn(8, generator=torch.Generator().manual_seed(0)) + 3
    gradients[:, 1] = -gradients[:, 0]
    gradients[range(8), 2 + torch.arange(8) % 2] = 1.0
    found = rearranged(gradients, torch.tensor([0, 2]), shrinkage=0.0)
    assert found.tolist() == [2, 3] and expected_loss(gradients, found) == 0


def test_orthogonal_gradients_and_a_full_shrinkage_leave_the_best_in_place():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([5.0, 1, 4, 2, 3, 0.5])
    orthogonal = torch.linalg.qr(torch.randn(9, 6, generator=generator))[0] * lengths
    assert rearranged(orthogonal, torch.tensor([0, 2, 4]), 0.0).tolist() == [0, 2, 4]
    noisy = torch.randn(4, 30, generator=generator)
    kept = noisy.square().mean(0).topk(12).indices.sort().values
    assert torch.equal(rearranged(noisy, kept, 1.0), kept)
    assert not torch.equal(rearranged(noisy, kept, 0.0), kept)


def test_noise_share_is_one_for_chance_and_none_for_what_is_shared():
    generator = torch.Generator().manual_seed(0)
    assert noise_share(torch.randn(1, 10, generator=generator)) == 1
    assert noise_share(torch.randn(16, 400, generator=generator)) > 0.95
    common = torch.randn(4000, 1, generator=generator) * torch.ones(10)
    assert noise_share(common + 0.1 * torch.randn(4000, 10, generator=generator)) < 0.01
    # by its definition, pair by pair
    g = torch.randn(6, 5, generator=generator).double()
    z = g / g.square().mean(0).sqrt()
    variance = mean = 0.0
    for i, j in itertools.permutations(range(5), 2):
        product = z[:, i] * z[:, j]
        variance, mean = variance + product.var(correction=0).item() / 5, mean + product.mean().item() ** 2
    assert noise_share(g) == pytest.approx(min(variance / mean, 1))


# tuning
def layer(tokens=200, units=8, width=2, out=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, units * width, generator=generator)
    W = torch.randn(out, units * width, generator=generator)
    return X, W, torch.randperm(units * width, generator=generator).view(units, width)


def tune_layer(X, Y, W, index, kept, **knobs):
    return tuned(W, index, X.T @ X, X.T @ Y, torch.tensor(kept), whole=Y.square().sum().item(), **knobs)


@pytest.mark.parametrize("damp", [0.0, 0.1])
def test_masks_stay_one_where_every_unit_stays(damp):
    X, W, index = layer()
    found = tune_layer(X, X @ W.T, W, index, list(range(8)), damp=damp)
    assert_close(found.values, torch.ones(8).double(), rtol=1e-4, atol=1e-4)
    assert found.before < 1e-2 and not found.given_up


def test_a_twin_takes_over_exactly_as_damping_goes_to_zero():
    X, W, index = layer()
    X[:, index[1]] = X[:, index[0]]  # unit 1 says what unit 0 says, half as loud
    W[:, index[1]] = 0.5 * W[:, index[0]]
    kept, errors = [0, 2, 3, 4, 5, 6, 7], []
    for damp in (1.0, 0.1, 0.01, 0.0):
        found = tune_layer(X, X @ W.T, W, index, kept, damp=damp)
        errors.append(found.after)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 < errors[0]
    assert_close(found.values, torch.tensor([1.5, 1, 1, 1, 1, 1, 1]).double(), rtol=1e-3, atol=1e-3)


def test_tuning_is_the_least_squares_solution_and_never_raises_the_error():
    X, W, index = layer()
    target = torch.randn(200, 6, generator=torch.Generator().manual_seed(5)) + X @ W.T
    kept = [0, 3, 4, 7]
    found = tune_layer(X, target, W, index, kept, damp=0.0)
    A = torch.stack([(X[:, index[u]] @ W[:, index[u]].T).flatten() for u in kept], 1).double()
    solution = torch.linalg.lstsq(A, target.flatten().double()[:, None]).solution[:, 0]
    assert_close(found.values, solution, rtol=1e-4, atol=1e-4)
    for m, error in ((torch.ones(4).double(), found.before), (found.values, found.after)):
        measured = (A @ m - target.flatten()).norm() / target.norm()
        assert error == pytest.approx(measured.item(), rel=1e-4)
    assert found.after < found.before
    for damp in (0.1, 1.0, 100.0):
        damped = tune_layer(X, target, W, index, kept, damp=damp)
        assert found.after <= damped.after <= damped.before


def test_damping_is_that_of_scipys_lsmr():
    from scipy.sparse.linalg import lsmr

    X, W, index = layer()
    target, kept = 2 * torch.randn(200, 6, generator=torch.Generator().manual_seed(5)), [0, 3, 4, 7]
    A = torch.stack([(X[:, index[u]] @ W[:, index[u]].T).flatten() for u in kept], 1).double().numpy()
    damp = math.sqrt(0.3 * (A**2).sum(0).mean())
    b = target.flatten().double().numpy()
    moved = lsmr(A, b - A.sum(1), damp=damp, atol=1e-12, btol=1e-12)[0]
    found = tune_layer(X, target, W, index, kept, damp=0.3)
    assert_close(found.values, 1 + torch.from_numpy(moved), rtol=1e-4, atol=1e-4)


def test_a_mask_beyond_ten_gives_the_layer_up():
    X, W, index = layer()
    found = tune_layer(X, 20 * (X @ W.T), W, index, [0, 1, 2, 3], damp=0.0)
    assert found.given_up and torch.equal(found.values, torch.ones(4).double())
    assert found.before == found.after


def test_a_twin_neuron_of_the_model_takes_over_so_that_no_output_changes(llama, calib):
    kept, twins = {}, torch.arange(0, 64, 2)
    with torch.no_grad():
        for name, block in find_blocks(llama).items():
            for part in (block.mlp.gate_proj.weight, block.mlp.up_proj.weight):
                part[twins + 1] = part[twins]
            kept[name] = {"neurons": twins}
    light = copy.deepcopy(llama)
    found = tune_masks(light, calib, kept, damp=0.0, progress=False)
    assert list(found) == [f"{name}.mlp.down_proj" for name in kept]
    # their columns differ, so a number for each cannot make up for all
    assert all(one.after < one.before for one in found.values())
    with torch.no_grad():
        for block in find_blocks(llama).values():
            block.mlp.down_proj.weight[:, 1::2] = 0.3 * block.mlp.down_proj.weight[:, ::2]
    light = copy.deepcopy(llama)
    found = tune_masks(light, calib, kept, damp=0.0, progress=False)
    for one in found.values():
        assert one.before > 0.1 and one.after < 1e-3
        assert_close(one.values, torch.full((32,), 1.3).double(), rtol=1e-2, atol=1e-2)
    keep_units(light, kept, "twins")
    assert_close(logits(light, calib[0]), logits(llama, calib[0]), rtol=1e-3, atol=1e-4)


def test_masks_bring_the_stream_nearest_to_the_dense_models(model, calib):
    dense = use_linear_everywhere(model)
    kept = {
        name: {kind: torch.arange(0, count, 2) for kind, count in counts.items()}
        for name, counts in unit_counts(dense).items()
    }
    light, names, blocks = copy.deepcopy(dense), roles(dense), list(kept)
    found = tune_masks(light, calib, kept, damp=0.1, progress=False)

    def gap(name, weight=None):
        """What the dense model has more than the light one of a layer's inputs, or of its outputs."""
        before, after = (inputs_of(m.get_submodule(name), m, calib) for m in (dense, light))
        if not weight:
            return before - after
        parts = (m.get_submodule(name).weight for m in (dense, light))
        before, after = (x @ w.T for x, w in zip((before, after), parts, strict=True))
        sizes[name] = before - after, after
        return before - after

    for i, block in enumerate(blocks):
        sizes, (attention, mlp) = {}, (f"{block}.{n}" for n in (names.attention_out, names.mlp_out))
        lag = gap(block) if adds_to_stream(model) else 0.0
        lacks = {attention: gap(attention, True) + lag}
        lacks[mlp] = gap(mlp, True) + (lacks[attention] if adds_to_stream(model) else 0.0)
        for name, lack in lacks.items():
            wanted = sizes[name][1] + lack
            expected = (lack.norm() / wanted.norm()).item()
            assert found[name].after == pytest.approx(expected, rel=1e-3, abs=1e-4)
            assert found[name].after <= found[name].before
        if adds_to_stream(model) and i == 0:
            assert_close(gap(blocks[1]), lacks[mlp], rtol=1e-3, atol=1e-4)


def test_a_norm_between_layer_and_stream_is_seen():
    plain = {name for name in CONFIGS if adds_to_stream(random_model(name))}
    assert set(CONFIGS) - plain == {"gemma2", "gemma3_text"}


# the method
def test_masked_and_cut_give_the_same_on_every_family(model, calib):
    gradients = mask_gradients(model, calib, progress=False)
    light, report = fisher_masks(model, calib, fraction=0.4, gradients=gradients, progress=False)
    before = logits(model, calib[0])
    masked = use_linear_everywhere(copy.deepcopy(model))
    kept = kept_in(light, masked)
    tune_masks(masked, calib, kept, progress=False)
    assert_close(logits(light, calib[0]), logits(masked, calib[0]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(light, calib[0]), before, rtol=1e-3, atol=1e-3)
    assert size(light).parameters < size(model).parameters
    assert all(row.bits_after < row.bits_before and 0 < row.error < 2 for row in report)


def kept_in(light, dense):
    """Which units of the dense model are in the light one, seen by the rows that make them."""
    kept = {}
    for name, block in find_blocks(dense).items():
        kept[name] = {}
        for kind, parts in members(dense, block).items():
            ours = members(light, light.get_submodule(name))[kind][0]
            whole = block.get_submodule(parts[0].linear).weight
            rows = light.get_submodule(f"{name}.{ours.linear}").weight[ours.index[:, 0]]
            match = (whole[parts[0].index[:, 0]][:, None] == rows[None]).all(-1)
            kept[name][kind] = match.any(1).nonzero()[:, 0]
            assert len(kept[name][kind]) == len(rows)
    return kept


@pytest.mark.parametrize("knobs", [{}, {"rearrange": False}, {"round_to": 16}, {"kinds": ("neurons",)}])
def test_a_fraction_of_zero_changes_nothing(family, calib, knobs):
    model = random_model(family)
    light, report = fisher_masks(model, calib[1:], fraction=0.0, progress=False, **knobs)
    assert len(report) == 0 and torch.equal(logits(light, calib[0]), logits(model, calib[0]))


def test_the_units_of_the_least_importance_go_wherever_they_are(llama, calib):
    gradients = mask_gradients(llama, calib, progress=False)
    light = pruned(llama, calib, fraction=0.3, kinds=("neurons",), rearrange=False, tune=False)
    kept = kept_in(light, llama)
    scores = {name: g["neurons"].square().mean(0) for name, g in gradients.items()}
    stays = torch.cat([scores[name][kept[name]["neurons"]] for name in scores])
    assert len(stays) == int(0.7 * 128)
    assert stays.sum() == torch.cat(list(scores.values())).topk(len(stays)).values.sum()
    assert unit_counts(light)["model.layers.0"]["heads"] == 2


def test_the_report_says_what_tuning_did(llama, calib):
    report = fisher_masks(llama, calib, fraction=0.3, progress=False).reports
    plain = fisher_masks(llama, calib, fraction=0.3, tune=False, progress=False).reports
    tuned_rows = [row for row in report if "before tuning" in row.notes]
    assert {row.name.rpartition(".")[2] for row in tuned_rows} >= {"down_proj"}
    for row in tuned_rows:
        assert row.error < float(row.notes.split("; ")[1].split()[0]) + 1e-3
    assert [row.name for row in report] == [row.name for row in plain]
    assert not any("tuning" in row.notes for row in plain)


def test_a_budget_in_bytes_is_met_closely(llama, calib):
    whole = size(llama).stored_bytes
    light = pruned(llama, calib, budget_bytes=int(0.8 * whole))
    assert 0.78 * whole <= size(light).stored_bytes <= 0.8 * whole


def test_a_budget_in_milliseconds_prices_units_by_their_time(llama, calib, monkeypatch):
    series = {"heads": ((1, 2), (1.0, 9.0)), "neurons": ((16, 32, 48, 64), (1.0, 1.1, 1.2, 1.3))}
    table = LatencyTable(dict.fromkeys(find_blocks(llama), series), 1.0)
    monkeypatch.setattr(LatencyTable, "measure", classmethod(lambda cls, model, tokens: table))
    monkeypatch.setattr(module, "fit", lambda model, choose, *, fraction, **_: choose(0.5))
    light = pruned(llama, calib, budget_ms=3.0, rearrange=False, tune=False)
    counts = [c for block in unit_counts(light).values() for c in [(block["heads"], block["neurons"])]]
    # a head is as dear as two thousand neurons, so heads alone go
    assert sum(h for h, _ in counts) < 4 and sum(n for _, n in counts) >= 64
    monkeypatch.undo()
    light = pruned(llama, calib, budget_ms=1e6, budget_tokens=16)
    assert unit_counts(light) == unit_counts(llama)


def test_neurons_stay_in_multiples(llama, calib):
    light = pruned(llama, calib, fraction=0.3, round_to=16)
    assert all(block["neurons"] % 16 == 0 for block in unit_counts(light).values())
    assert size(light).parameters < size(llama).parameters


def test_the_callers_model_is_untouched_unless_it_is_asked_for(family, calib):
    model = random_model(family)
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    light = pruned(model, calib, fraction=0.3)
    assert light is not model and unit_counts(model) != unit_counts(light)
    assert all(p is before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())
    same = pruned(model, calib, fraction=0.3, inplace=True)
    assert same is model
    assert_close(logits(same, calib[0]), logits(light, calib[0]))


def test_work_that_breaks_off_leaves_the_model_as_it_was(llama, calib, monkeypatch):
    before = logits(llama, calib[0])

    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "keep_units", broken)
    with pytest.raises(KeyboardInterrupt):
        pruned(llama, calib, fraction=0.3, inplace=True)
    assert torch.equal(logits(llama, calib[0]), before)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_what_is_left_saves_and_loads(family, calib, tmp_path):
    light = pruned(random_model(family), calib, fraction=0.3)
    again = load(save(light, tmp_path / "light"))
    assert torch.equal(logits(again, calib[0]), logits(light, calib[0]))


def test_it_works_in_bfloat16(calib):
    light = pruned(random_model("llama", torch.bfloat16), calib, fraction=0.3)
    assert {p.dtype for p in light.parameters()} == {torch.bfloat16}
    assert logits(light, calib[0]).isfinite().all()


@pytest.mark.parametrize(
    ("knobs", "match"),
    [
        ({"fraction": 1.0}, "fraction=1.0: give a number from 0 to below 1"),
        ({"fraction": 0.95}, "fraction=0.95: at most 0.823, as every block keeps 1 heads and 1 neurons"),
        ({"kinds": ("layers",)}, "choose from heads, neurons"),
        ({"kinds": ()}, "choose from heads, neurons"),
        ({"round_to": 0}, "round_to=0"),
        ({"damp": -1.0}, "damp=-1.0"),
        ({"shrinkage": 2.0}, "shrinkage=2.0"),
        ({"budget_bytes": 1, "budget_ms": 1.0}, "give one of them"),
        ({"budget_bytes": 1}, "the least that can be had"),
    ],
)
def test_settings_that_do_not_fit_are_refused(llama, calib, knobs, match):
    with pytest.raises(ValueError, match=match):
        fisher_masks(llama, calib, progress=False, **knobs)
    with pytest.raises(ValueError, match="needs batches"):
        fisher_masks(llama, [], progress=False)
