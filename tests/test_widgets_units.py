"""The maps of units: what goes together is what `members` says, and what goes is what `keep_units` cuts."""

import copy

import numpy as np
import pytest
import torch

from lightlib.cost import size
from lightlib.decoder import find_blocks, linear_shapes, use_linear_everywhere
from lightlib.structured.llm_pruner import llm_pruner, most_important, unit_importance
from lightlib.units import KINDS, keep_units, members, unit_counts, unit_weights
from lightlib.widgets.anatomy import MODELS, Shape
from lightlib.widgets.dependency_map import (
    BLOCK,
    CELL,
    CHANNEL,
    HEAD,
    LINES,
    NEURON,
    READERS,
    SHAPES,
    STRIPS,
    TAKES,
    THIN,
    TITLES,
    bands,
    coupled,
    dependency_map,
    how_many,
    layout,
    owners,
    weights_in,
    why,
)  # fmt: skip
from lightlib.widgets.unit_map import RANKINGS, TILES, ranks, removed, tiles, unit_map, unit_sizes
from tests.conftest import random_model
from tests.explorers import is_the_same_twice, redraws_within_200_ms

SMALL = ["llama", "qwen2", "qwen3"]


def shape_of(model) -> Shape:
    """The numbers of a model's config, with its family's name in `anatomy`."""
    config, names = model.config, {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gpt2": "GPT-2"}
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    d_ff = getattr(config, "intermediate_size", 4 * config.hidden_size)
    return Shape(
        config.num_hidden_layers, config.hidden_size, heads, kv_heads, head_dim, d_ff,
        config.vocab_size, config.tie_word_embeddings, names[config.model_type],
    )  # fmt: skip


def some_scores(blocks=30, heads=3, neurons=1536, seed=0):
    """Scores that blocks and neurons share, and a part of `seed`'s own."""
    shared, own = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    found = {}
    for i in range(blocks):
        found[f"model.layers.{i}"] = {
            kind: (i + 1) * torch.rand(count, generator=shared) + 10 * torch.rand(count, generator=own)
            for kind, count in (("heads", heads), ("neurons", neurons))
        }
    return found


def measures(*names, **sizes):
    return {name: some_scores(seed=i, **sizes) for i, name in enumerate(names)}


def on_some_scores(**options):
    return unit_map(measures("first", "second", "magnitude"), MODELS["SmolLM2-135M"], **options)


every_explorer = pytest.mark.parametrize("make", [dependency_map, on_some_scores])


@every_explorer
def test_two_of_a_kind_are_equal_and_every_description_is_wide_enough(make):
    is_the_same_twice(make)


@pytest.mark.alone
@every_explorer
def test_every_control_redraws_within_200_ms(make):
    redraws_within_200_ms(make)


# dependency map
@pytest.mark.parametrize("name", SMALL)
def test_highlighted_rows_and_columns_are_those_that_members_couples(name):
    model = random_model(name)
    block, shape = next(iter(find_blocks(model).values())), shape_of(model)
    parts, weights = members(model, block), unit_weights(model, next(iter(find_blocks(model))))
    shared = shape.heads // shape.kv_heads
    for take, kind, per_unit in ((HEAD, "heads", shared), (NEURON, "neurons", 1)):
        assert how_many(shape, take) == per_unit * len(parts[kind][0].index)
        for which in range(how_many(shape, take)):
            found = coupled(shape, take, which)
            assert weights_in(shape, found.gone) == weights[kind]
            assert per_unit * weights_in(shape, found.picked) <= weights[kind]
            for shown, real in zip(found.gone.values(), parts[kind], strict=True):
                assert (shown.linear, shown.dim) == (real.linear, real.dim)
                assert torch.equal(shown.index[0], real.index[which // per_unit])


@pytest.mark.parametrize("name", SMALL)
def test_a_row_or_column_takes_the_unit_that_it_belongs_to_and_no_other(name):
    model = random_model(name)
    block, shape = next(iter(find_blocks(model).values())), shape_of(model)
    parts = members(model, block)
    for take, title in LINES.items():
        kind = "heads" if title in TITLES[:4] else "neurons"
        place = parts[kind][TITLES.index(title) % 4]
        assert how_many(shape, take) == linear_shapes(block)[place.linear][place.dim]
        for line in range(how_many(shape, take)):
            found = coupled(shape, take, line)
            (unit,) = [u for u, index in enumerate(place.index) if line in index]
            assert [m.index[0].tolist() for m in found.gone.values()] == [
                m.index[unit].tolist() for m in parts[kind]
            ]
            assert {t: m.index.tolist() for t, m in found.picked.items()} == {title: [[line]]}
            assert found.picked[title].dim == place.dim == (title in READERS)


@pytest.mark.parametrize("name", SMALL)
def test_channels_share_out_the_model_and_a_block_has_all_of_itself(name):
    model = random_model(name)
    block, shape = next(iter(find_blocks(model).values())), shape_of(model)
    linears = [block.get_submodule(linear) for linear in linear_shapes(block)]
    assert weights_in(shape, coupled(shape, BLOCK, 0).gone) == sum(
        p.numel() for linear in linears for p in linear.parameters()
    )
    found = [coupled(shape, CHANNEL, i).gone for i in range(shape.width)]
    assert sum(weights_in(shape, gone) for gone in found) == sum(w.weight.numel() for w in linears)
    assert all((m.dim == 0) == (t in READERS) for gone in found for t, m in gone.items())


def test_a_channel_is_counted_in_norms_embedding_and_head_too():
    for name, shape in SHAPES.items():
        result = dependency_map().set(model=name, take=CHANNEL, which=5).result
        norms, ends = 2 * shape.layers + 1, (1 if shape.tied else 2) * shape.vocabulary
        assert result["weights_in_the_model"] == shape.layers * result["weights_that_go"] + norms + ends


def test_a_head_names_those_that_share_its_keys_and_values():
    ex = dependency_map()
    assert ex.result["weights_that_go"] == 294_912 == 4 * ex.result["weights_picked"]
    assert ex.result["says"].startswith("Head 4 shares keys and values with heads 3 and 5")
    gone, picked = ex.result["coupled"].gone, ex.result["coupled"].picked
    assert owners(gone, ("W_q", "W_o"), 64) == {3, 4, 5} and owners(gone, ("W_k", "W_v"), 64) == {1}
    assert owners(picked, ("W_q", "W_o"), 64) == {4} and owners(picked, ("W_k", "W_v"), 64) == set()
    ex.set(model="Llama-2-7B", which=20)
    assert (
        "of its own" in ex.result["says"] and ex.result["weights_that_go"] == 2 * ex.result["weights_picked"]
    )


def test_a_row_of_the_queries_names_its_head_its_partner_in_rotation_and_its_group():
    shape = SHAPES["SmolLM2-135M"]
    says = why(shape, "row of W_q", 4 * 64 + 44)
    assert "dimension 44 of the queries of head 4" in says and "dimension 12" in says
    assert "key-value head 1 goes whole, with heads 3, 4 and 5" in says
    assert "what row 108 of W_v makes" in why(shape, "column of W_o", 4 * 64 + 44)
    assert "row 7 of W_up and column 7 of W_down" in why(shape, "row of W_gate", 7)


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "LLaMA-3-70B"])
def test_the_last_of_everything_can_be_taken_and_none_beyond(name):
    ex = dependency_map().set(model=name)
    for take in TAKES:
        last = how_many(SHAPES[name], take) - 1
        result = ex.set(take=take, which=last).result
        assert 0 < result["weights_picked"] <= result["weights_that_go"] and len(result["says"]) < 360
        with pytest.raises(ValueError, match="does not fit"):
            ex.set(which=last + 1)


def test_a_smaller_model_takes_the_slider_back_to_its_last():
    ex = dependency_map().set(model="LLaMA-3-8B", take=NEURON, which=14_335)
    assert ex.set(model="SmolLM2-135M").values["which"] == 1535


@pytest.mark.parametrize("name", list(SHAPES))
def test_matrices_are_drawn_to_one_scale_side_by_side(name):
    shape, spots = SHAPES[name], layout(SHAPES[name])
    sizes = dependency_map().set(model=name, which=0).result["sizes"]
    scales = [(spots[t][3] / rows, spots[t][2] / columns) for t, (rows, columns) in sizes.items()]
    np.testing.assert_allclose(scales, spots["W_k"][2] / shape.width)
    rights = [x + wide for x, _, wide, _ in spots.values()]
    assert all(x > right + 0.1 for (x, *_), right in zip([*spots.values()][1:], rights, strict=False))


def test_bands_cover_their_rows_and_a_single_line_is_seen_whole():
    shape = SHAPES["SmolLM2-135M"]
    spots, sizes = layout(shape), dependency_map().result["sizes"]
    gone = coupled(shape, HEAD, 4).gone
    x, y, wide, high = spots["W_q"]
    np.testing.assert_allclose(
        bands(gone["W_q"], spots["W_q"], sizes["W_q"]), [(x, x + wide, y + high / 3, y + 2 * high / 3)]
    )
    x, y, wide, high = spots["W_down"]
    for which in (0, 700, 1535):
        ((left, right, top, low),) = bands(
            coupled(shape, NEURON, which).gone["W_down"], spots["W_down"], sizes["W_down"]
        )
        assert x <= left < right <= x + wide + 1e-9 and (top, low) == (y, y + high)
        assert THIN / 2 <= right - left <= THIN + 1e-9


@pytest.mark.parametrize("name", ["SmolLM2-135M", "LLaMA-3-70B"])
def test_a_click_on_a_matrix_picks_the_line_that_lies_there(name):
    ex = dependency_map().set(model=name)
    _, *nets = ex.children[-1].children
    for net, (take, title) in zip(nets, LINES.items(), strict=True):
        x, y, wide, high = layout(SHAPES[name])[title]
        top, left, low, right = (CELL * (int(n) - 1) for n in net.layout.grid_area.split("/"))
        wanted, shown = (x, y, x + wide, y + high), (left, top, right, low)
        np.testing.assert_allclose(shown, wanted, atol=CELL)
        assert len(net.children) == STRIPS
        for strip in (0, STRIPS - 1):
            net.children[strip].click()
            assert ex.values["take"] == take and list(ex.result["coupled"].picked) == [title]
            assert ex.values["which"] == int((strip + 0.5) / STRIPS * how_many(SHAPES[name], take))


# unit map
@pytest.mark.parametrize("name", [*SMALL, "gpt2"])
def test_weights_of_a_unit_are_the_library_s(name):
    model = random_model(name)
    block = next(iter(find_blocks(use_linear_everywhere(model))))
    assert unit_sizes(shape_of(model)) == unit_weights(model, block)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("ranking", list(RANKINGS))
def test_what_the_map_says_goes_is_what_keep_units_takes(name, ranking):
    model = random_model(name)
    shape, counts = shape_of(model), unit_counts(model)
    ex = unit_map(unit_importance(model, None, importance="magnitude", progress=False), shape)
    for fraction in (40, 90):
        for kind in ("both", *KINDS):
            result = ex.set(fraction=fraction, kind=kind, ranking=ranking).result
            kept = {
                block: {k: (~result["gone"][k][i]).nonzero().flatten() for k in KINDS}
                for i, block in enumerate(counts)
            }
            light = copy.deepcopy(model)
            keep_units(light, kept, "some")
            assert size(model).parameters - size(light).parameters == result["weights_that_go"]
            for k in KINDS if kind == "both" else (kind,):
                left = sum(block[k] for block in unit_counts(light).values())
                assert sum(block[k] for block in counts.values()) - left == result[f"{k}_that_go"]
    assert "heads_that_go" not in ex.set(kind="neurons").result


@pytest.mark.parametrize("ranking", list(RANKINGS))
def test_it_takes_what_llm_pruner_takes(llama, ranking):
    scores = unit_importance(llama, None, importance="magnitude", progress=False)
    result = unit_map(scores, shape_of(llama)).set(fraction=50, ranking=ranking).result
    knobs = dict(fraction=0.5, importance="magnitude", across=RANKINGS[ranking], protect=(0, 0))
    light = llm_pruner(llama, None, progress=False, **knobs).model
    left = [list(block.values()) for block in unit_counts(light).values()]
    assert torch.stack([(~result["gone"][kind]).sum(1) for kind in KINDS], 1).tolist() == left


def test_over_the_model_every_block_keeps_one_of_each_kind():
    ex = on_some_scores().set(ranking="over the model", fraction=90)
    for kind in KINDS:
        assert not ex.result["gone"][kind].all(1).any()
    lost = ex.result["gone"]["neurons"].sum(1)
    assert lost[0] > lost[-1] and "Block 0 loses" in ex.result["says"]


def test_a_fraction_of_zero_takes_nothing():
    for ranking in RANKINGS:
        result = on_some_scores().set(ranking=ranking, fraction=0).result
        assert result["weights_that_go"] == result["both_measures_take"] == 0
        assert not any(mask.any() for mask in result["gone"].values())


def test_in_each_block_all_lose_alike_and_three_heads_round():
    result = on_some_scores().result
    assert result["gone"]["neurons"].sum(1).tolist() == [384] * 30 and result["heads_that_go"] == 30
    assert result["says"].startswith("Every block loses 33.3 % of its heads. Every block loses 25 %")


def test_measures_agree_on_what_both_take():
    scores = measures("first", "second")
    ex = unit_map(scores, MODELS["SmolLM2-135M"]).set(fraction=40, ranking="over the model", kind="neurons")
    kept = [most_important(each, 0.4, "model", 1) for each in scores.values()]
    both = sum(
        1536 - len(set(kept[0][b]["neurons"].tolist()) | set(kept[1][b]["neurons"].tolist())) for b in kept[0]
    )
    assert ex.result["both_measures_take"] == both
    share = f"{100 * both / ex.result['neurons_that_go']:.0f} %"
    assert f"second would take {share}; by chance it would be 40 %" in ex.result["says"]


def test_a_measure_agrees_with_itself_in_all_and_with_its_opposite_in_nothing():
    one = some_scores(blocks=2, heads=4, neurons=64)
    turned = {b: {k: -v for k, v in kinds.items()} for b, kinds in one.items()}
    shape = Shape(2, 32, 8, 4, 4, 64, 96, True)
    same = unit_map({"a": one, "b": copy.deepcopy(one)}, shape).set(fraction=45).result
    assert same["both_measures_take"] == same["heads_that_go"] + same["neurons_that_go"] > 0
    assert unit_map({"a": one, "b": turned}, shape).set(fraction=45).result["both_measures_take"] == 0


def test_a_measure_is_never_compared_with_itself_and_the_other_stays_when_the_fraction_moves():
    ex = on_some_scores().set(other="magnitude").set(fraction=30)
    assert ex.values["other"] == "magnitude"
    assert ex.set(measure="magnitude").values["other"] == "first"
    with pytest.raises(ValueError, match="choose one of 'first', 'second'"):
        ex.set(other="magnitude")
    alone = unit_map(some_scores(), MODELS["SmolLM2-135M"])
    assert "other" not in alone.controls and "both_measures_take" not in alone.result


def test_colours_are_ranks_and_those_that_go_rank_below_those_that_stay_in_their_block():
    values = torch.tensor([[3.0, 1.0], [1.0, 7.0]])
    torch.testing.assert_close(ranks(values), torch.tensor([[2.0, 1.0], [0.0, 3.0]]) / 3)
    scores = some_scores()
    for across in RANKINGS.values():
        gone = removed(scores, 0.3, across)
        for kind in KINDS:
            places = ranks(torch.stack([own[kind] for own in scores.values()]))
            went = places.masked_fill(~gone[kind], -1).amax(1)
            assert (went < places.masked_fill(gone[kind], 2).amin(1)).all()


def test_tiles_rise_in_each_block_and_keep_its_mean():
    places = ranks(torch.stack([own["neurons"] for own in some_scores().values()]))
    found = tiles(places)
    assert found.shape == (30, TILES) and (found.diff(dim=1) >= 0).all()
    torch.testing.assert_close(found.mean(1), places.mean(1))
    torch.testing.assert_close(tiles(places[:, :50]), places[:, :50].sort(1).values)


def test_scores_that_do_not_fit_are_refused_by_name():
    shape, scores = MODELS["SmolLM2-135M"], some_scores(blocks=2)
    with pytest.raises(ValueError, match="nothing to draw"):
        unit_map({}, shape)
    with pytest.raises(
        ValueError, match=r"importance, model.layers.0: give 8 finite scores of heads, not \(3"
    ):
        unit_map(scores, MODELS["LLaMA-3-8B"])
    with pytest.raises(ValueError, match="give 3 finite scores of heads, not none"):
        unit_map({b: {"neurons": own["neurons"]} for b, own in scores.items()}, shape)
    with pytest.raises(ValueError, match="second must score the same 2 blocks"):
        unit_map({"first": scores, "second": some_scores(blocks=3)}, shape)
    scores["model.layers.1"]["neurons"][3] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1: give 1536 finite scores of neurons"):
        unit_map(scores, shape)
