"""The explorers of slicing: equal to slicegpt's own counts and to the algebra of norms, and quick."""

import itertools

import numpy as np
import pytest
import torch

from lightlib.cost import flops, size
from lightlib.decoder import parameters_by_part
from lightlib.slicing.invariance import UnitNorm
from lightlib.slicing.slicegpt import kept_width, principal_directions, slicegpt
from lightlib.widgets.anatomy import Shape
from lightlib.widgets.rotation import CIRCLE, NORMS, POINTS, gaps, largest, rotation, rotation_explorer
from lightlib.widgets.slice_map import (
    MOST,
    SHAPES,
    columns,
    dense_parts,
    linear_flop,
    passes,
    slice_map,
    sliced_parts,
)  # fmt: skip
from lightlib.widgets.spectrum_explorer import LEAST, Spectrum, shortened, spectrum_explorer
from tests.conftest import CONFIGS, random_model
from tests.explorers import is_the_same_twice, redraws_within_200_ms


def some_shares(places=61, width=576):
    """{place: falling shares (width)}, each place steeper than the one before."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for i in range(places):
        drawn = torch.rand(width, generator=generator).double() ** (1 + 8 * i / places)
        found[f"block {i // 2}, {('attention', 'MLP')[i % 2]}"] = (drawn / drawn.sum()).sort().values.flip(0)
    return found


def on_some_shares(**options):
    return spectrum_explorer(some_shares(), **options)


every_explorer = pytest.mark.parametrize("make", [rotation_explorer, slice_map, on_some_shares])


@every_explorer
def test_two_of_a_kind_are_equal_and_every_description_is_wide_enough(make):
    is_the_same_twice(make)


@pytest.mark.alone
@every_explorer
def test_every_control_redraws_within_200_ms(make):
    redraws_within_200_ms(make)


# rotation
def test_no_angle_keeps_rms_norm_from_letting_q_through():
    ex = rotation_explorer()
    for angle in range(-180, 181, 30):
        assert ex.set(angle=angle).result["largest_distance"] == 0
    assert ex.result["largest_at_any_angle"] == 0 and "no rotation changes" in ex.result["says"]


@pytest.mark.parametrize("norm", ["RMSNorm with scale", "LayerNorm"])
def test_a_scale_or_a_mean_lets_through_no_angle_but_none_and_half_a_turn(norm):
    ex = rotation_explorer().set(norm=norm)
    for angle in range(-180, 181, 30):
        distance = ex.set(angle=angle).result["largest_distance"]
        assert (distance < 1e-6) == (angle % 180 == 0) and distance <= ex.result["largest_at_any_angle"]
        assert ex.result["says"].startswith("No turn and half a turn") == (angle % 180 == 0)


def test_norms_of_two_values_lie_on_a_circle_an_ellipse_and_two_points():
    points = np.concatenate([POINTS, CIRCLE])
    np.testing.assert_allclose(np.hypot(*NORMS["RMSNorm"](points).T), np.sqrt(2), rtol=1e-6)
    a, b = NORMS["RMSNorm with scale"](points).T
    np.testing.assert_allclose((a / 2) ** 2 + (b / 0.5) ** 2, 2, rtol=1e-6)
    np.testing.assert_allclose(abs(NORMS["LayerNorm"](points)), 1, rtol=1e-3)
    np.testing.assert_allclose(NORMS["LayerNorm"](points).sum(1), 0, atol=1e-12)


def test_the_norms_are_those_of_torch_and_of_folded_models():
    x = torch.tensor(POINTS)
    ours = [torch.from_numpy(NORMS[name](POINTS)) for name in ("RMSNorm", "LayerNorm")]
    torch.testing.assert_close(ours[0], UnitNorm(2, 1e-9)(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[1], torch.nn.functional.layer_norm(x, (2,), eps=1e-9))


def test_a_layer_norm_of_centred_points_lets_q_through_once_it_takes_no_mean():
    centred = POINTS - POINTS.mean(1, keepdims=True)
    assert largest(NORMS["LayerNorm"](POINTS) - NORMS["RMSNorm"](centred)) == 0
    assert all(largest(gaps("RMSNorm", angle, centred)) < 1e-9 for angle in range(0, 360, 30))


def test_q_turns_counterclockwise_and_is_orthogonal():
    Q = rotation(90)
    np.testing.assert_allclose(np.array([1.0, 0.0]) @ Q, [0, 1], atol=1e-12)
    np.testing.assert_allclose(rotation(33) @ rotation(33).T, np.eye(2), atol=1e-12)


def test_long_names_of_places_are_not_cut_off():
    shares = {f"model.layers.{i}.post_attention_layernorm": s for i, s in enumerate(some_shares(3).values())}
    wide, narrow = (
        int(ex.controls["place"].layout.width.removesuffix("px"))
        for ex in (spectrum_explorer(shares), on_some_shares())
    )
    assert wide > 7 * len("model.layers.0.post_attention_layernorm") > narrow


# slice map
def test_the_map_counts_the_real_model_to_the_last_parameter():
    ex = slice_map().set(model="SmolLM2-135M", cut=25, round_to=8)
    for settings, parameters, in_shortcuts in (
        ({"rotations": "sublayer", "slice_head": False}, 140_652_288, 11_259_648),
        ({"rotations": "block"}, 135_053_568, 5_660_928),
        ({"rotations": "sublayer", "slice_head": True}, 133_291_008, 11_197_440),
        ({"shortcuts": "low_rank", "slice_head": False}, 133_062_912, 3_670_272),
    ):
        result = ex.set(**settings).result
        assert result["parameters_sliced"] == parameters and result["width_kept"] == 432
        assert result["parameters_in_shortcuts"] == in_shortcuts
        assert (result["parameters_tied"], result["parameters_untied"]) == (134_515_008, 162_826_560)


def shape_of(model) -> Shape:
    """The numbers of a model's config, with its family's name in `anatomy`."""
    config, families = model.config, {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        config.num_hidden_layers, config.hidden_size, heads, kv_heads, head_dim, config.intermediate_size,
        config.vocab_size, config.tie_word_embeddings, families[config.model_type],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("rotations", ["sublayer", "block"])
@pytest.mark.parametrize("slice_head", [False, True])
@pytest.mark.parametrize("shortcuts", ["low_rank", "full"])
def test_parameters_and_flops_are_those_of_what_slicegpt_leaves(
    name, rotations, slice_head, shortcuts, calib
):
    model = random_model(name)
    shape = shape_of(model)
    for fraction, round_to in ((0.0, 8), (0.1, 1), (0.25, 8), (0.5, 8)):
        knobs = {"rotations": rotations, "slice_head": slice_head, "shortcuts": shortcuts}
        light = slicegpt(
            model, calib, slice_fraction=fraction, round_to=round_to, progress=False, **knobs
        ).model
        kept = kept_width(torch.ones(32), fraction, round_to)
        parts = sliced_parts(shape, kept, **knobs)
        assert sum(parts.values()) == size(light).parameters
        in_shortcuts = sum(p.numel() for n, p in light.named_parameters() if "shortcut" in n)
        assert parts["shortcuts"] == in_shortcuts and parts["head"] == light.lm_head.weight.numel()
        attention = 4 * shape.layers * shape.heads * shape.head_dim
        flop = linear_flop(parts, passes(shape, kept, shortcuts))
        assert flop + attention == flops(light, 1).decode_per_token


@pytest.mark.parametrize("tied", [False, True])
def test_the_dense_model_is_counted_as_the_library_counts_it(tied):
    from transformers import AutoModelForCausalLM

    config = CONFIGS["llama"]()
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config)
    found, parts = parameters_by_part(model), dense_parts(shape_of(model), tied)
    assert sum(parts.values()) == size(model).parameters
    assert (parts["embedding"], parts["head"]) == (found["embedding"], found["head"])
    assert parts["blocks"] == found["attention"] + found["mlp"] and parts["other"] == found["norms"]


@pytest.mark.parametrize("model", SHAPES)
def test_at_its_break_even_a_sliced_model_costs_what_the_dense_one_does(model):
    shape = SHAPES[model]
    for rotations, shortcuts in itertools.product(("sublayer", "block"), ("full", "low_rank")):
        result = slice_map().set(model=model, rotations=rotations, shortcuts=shortcuts).result

        def at(share, shape=shape, rotations=rotations, shortcuts=shortcuts):
            return sliced_parts(shape, shape.width * (1 - share), rotations, False, shortcuts)

        def flop_at(share, at=at, shape=shape, shortcuts=shortcuts):
            return linear_flop(at(share), passes(shape, shape.width * (1 - share), shortcuts))

        even = result["smaller_than_untied_from_share"]
        if shortcuts == "low_rank":  # they cost nothing where nothing is cut, so each cut saves
            assert even == result["computes_less_from_share"] == pytest.approx(0, abs=1e-12)
            assert flop_at(0.01) < flop_at(0) == pytest.approx(result["dense_per_token_flop"], rel=1e-9)
        else:
            assert sum(at(even).values()) == pytest.approx(result["parameters_untied"], rel=1e-9)
            assert sum(at(even - 0.01).values()) > result["parameters_untied"]
            same = flop_at(result["computes_less_from_share"])
            assert same == pytest.approx(result["dense_per_token_flop"], rel=1e-9)
        if shape.tied:
            assert result["smaller_than_tied_from_share"] > even
            tied = sum(at(result["smaller_than_tied_from_share"]).values())
            assert tied == pytest.approx(result["parameters_tied"], rel=1e-9)


def test_nothing_cut_leaves_the_shortcuts_as_the_price():
    result = slice_map().set(cut=0).result
    norms = (2 * 30 + 1) * 576
    assert result["parameters_in_shortcuts"] == 60 * 576**2
    assert result["parameters_sliced"] == result["parameters_untied"] + 60 * 576**2 - norms
    assert result["sliced_per_token_flop"] == result["dense_per_token_flop"] + 2 * 60 * 576**2


def test_it_says_whether_untying_the_head_was_worth_it():
    ex = slice_map()
    assert "4.6 % larger than the tied dense one; it is smaller once more than 28.8 %" in ex.result["says"]
    assert ex.set(slice_head=True).result["says"].startswith("Even with a head of its own")
    assert "0.91 % smaller" in ex.result["says"]
    result = ex.set(model="Llama-2-7B").result
    assert result["says"].startswith("The head was never tied; ") and "parameters_tied" not in result
    assert " larger than the dense one" in ex.set(cut=5).result["says"]


def test_shortcuts_of_low_rank_cost_nothing_where_nothing_is_cut():
    result = slice_map().set(cut=0, shortcuts="low_rank").result
    assert result["parameters_in_shortcuts"] == 0
    assert result["sliced_per_token_flop"] == result["dense_per_token_flop"]


@pytest.mark.parametrize("rotations", ["sublayer", "block"])
@pytest.mark.parametrize("shortcuts", ["full", "low_rank"])
def test_the_map_shows_every_weight_of_a_block_once(rotations, shortcuts):
    shape = SHAPES["SmolLM2-135M"]
    shown = columns(shape, 432, rotations, True, shortcuts)
    area = {c.title: (c.kept_length or sum(c.lengths)) * c.kept for c in shown if c.lengths}
    drawn = shape.layers * sum(n for name, n in area.items() if name not in ("embedding", "head"))
    parts = sliced_parts(shape, 432, rotations, True, shortcuts)
    assert drawn == parts["blocks"] + parts["shortcuts"]
    assert (area["embedding"], area["head"]) == (parts["embedding"], parts["head"])


def test_the_curve_passes_through_the_chosen_cut():
    ex = slice_map()
    for cut, round_to in ((25, 8), (40, 128), (0, 1), (50, 64)):
        result = ex.set(cut=cut, round_to=round_to).result
        cuts, totals = result["curve"]
        here = 1 - result["width_kept"] / 576
        assert here <= MOST / 100
        assert np.interp(here, cuts, totals) == pytest.approx(result["parameters_sliced"], rel=1e-4)


# spectrum explorer
@pytest.mark.parametrize(("places", "width"), [(1, 1), (3, 5), (13, 64), (61, 576)])
def test_any_number_of_places_and_directions_can_be_shown(places, width):
    shares = some_shares(places, width)
    ex = spectrum_explorer(shares)
    for view in ("held", "not held, logarithmic"):
        for cut in (0, 25, 90):
            result = ex.set(view=view, cut=cut).result
            here = shares[ex.values["place"]]
            kept = kept_width(here, cut / 100, 1)
            assert result["directions_kept"] == kept and len(result["losses"]) == places
            assert result["held_percent"] == pytest.approx(100 * here[:kept].sum().item())
            assert result["held_percent"] + result["lost_percent"] == pytest.approx(100)


def test_places_may_be_of_different_width():
    ex = spectrum_explorer({"narrow": [0.9, 0.1], "wide": some_shares(1, 64)["block 0, attention"]})
    assert ex.set(place="narrow", cut=50).result["directions_kept"] == 1
    assert ex.result["lost_percent"] == pytest.approx(10)
    assert ex.set(place="wide").result["directions_kept"] == 32


def test_what_is_held_is_what_slicegpt_reports(llama, calib):
    X = torch.randn(400, 32, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.01, 32)
    Q, shares = principal_directions(X.T @ X)
    result = spectrum_explorer({"here": shares}).set(cut=50).result
    projected = (X.double() @ Q[:, :16]).square().sum() / X.double().square().sum()
    assert result["held_percent"] == pytest.approx(100 * projected.item(), rel=1e-6)
    report = slicegpt(llama, calib, slice_fraction=0.5, progress=False).reports
    first = next(row for row in report if row.name.endswith("layers.0.self_attn.q_proj"))
    E = llama.model.embed_tokens.weight[torch.cat([ids.flatten() for ids in calib])].detach().double()
    at_first = spectrum_explorer({"here": principal_directions(E.T @ E)[1]}).set(cut=50).result
    assert at_first["lost_percent"] / 100 == pytest.approx(first.error**2, rel=1e-4)


def test_so_many_directions_and_no_fewer_hold_what_is_asked_for():
    ex, shares = on_some_shares(), some_shares()
    for place in ("block 0, attention", "block 15, MLP", "block 30, attention"):
        result = ex.set(place=place).result
        for goal, needed in ((0.99, "directions_for_99_percent"), (0.999, "directions_for_99.9_percent")):
            count = result[needed]
            assert shares[place][:count].sum() >= goal > shares[place][: count - 1].sum()


def test_the_flattest_place_loses_most_and_nothing_is_lost_uncut():
    result = on_some_shares().set(cut=30, place="block 30, attention").result
    assert (
        result["loses_most"] == "block 0, attention" and result["lost_percent"] == min(result["losses"]) * 100
    )
    assert "block 0, attention loses most" in result["says"]
    result = on_some_shares().set(cut=0).result
    assert result["lost_percent"] == 0 and result["loses_most"] == "none" and "only turns" in result["says"]


def test_directions_that_the_stream_never_takes_are_lost_without_loss():
    few = [0.7, 0.3 - 1e-12, 1e-12, 0.0]  # the last ones are rounding
    ex = spectrum_explorer({"first": few, "second": few}).set(cut=50)
    assert ex.result["losses"] == [0, 0] and ex.result["loses_most"] == "none"
    assert ex.result["says"].startswith("No place of the stream takes")
    assert ex.set(cut=75).result["lost_percent"] == pytest.approx(30) and ex.result["loses_most"] == "first"


def test_the_views_are_two_ways_to_draw_one_curve():
    spectrum = Spectrum("here", [0.5, 0.3, 0.15, 0.05])
    held, lost = (spectrum.curve(quantity, LEAST)[:, 1] for quantity in ("held", "lost"))
    np.testing.assert_allclose(held, [50, 80, 95, 100])
    np.testing.assert_allclose(10 ** lost[:3], 100 - held[:3])
    assert 10 ** lost[3] == pytest.approx(100 * LEAST)


def test_few_points_of_a_pale_curve_keep_its_ends():
    spectrum = Spectrum("here", some_shares(1)["block 0, attention"])
    whole, few = spectrum.curve("held", LEAST), spectrum.curve("held", LEAST, 50)
    assert len(few) == 50 and len(whole) == 576
    np.testing.assert_array_equal(few[[0, -1]], whole[[0, -1]])


def test_shares_that_are_none_are_refused_by_name():
    for bad in ([0.2, 0.8], [0.5, 0.4], [[0.6, 0.4]], [], [1.5, -0.5], [float("nan"), 0.1]):
        with pytest.raises(ValueError, match=r"block 3: (give the shares|shares must fall)"):
            spectrum_explorer({"block 3": bad})
    with pytest.raises(ValueError, match=r"give \{place"):
        spectrum_explorer({})
    assert shortened("head") == "head" and len(shortened("model.layers." * 9, 30)) <= 33
