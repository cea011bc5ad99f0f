"""The explorers of lesson 02: what they show is what the library computes, and they redraw quickly."""

import math

import pytest
import torch
from torch.testing import assert_close

from lightlib.quantization.int8_linear import Int8Linear
from lightlib.quantization.smoothquant import ALPHAS, best_alpha, smoothing_scale
from lightlib.report import relative_error
from lightlib.widgets.logarithm import LEAST, exponents, powers_of_ten
from lightlib.widgets.outlier_map import outlier_map, outliers, tiles
from lightlib.widgets.smooth_explorer import SCHEMES, smooth_explorer
from lightlib.widgets.style import new_figure, panels
from lightlib.widgets.threshold_explorer import THRESHOLDS, threshold_explorer, token_errors
from lightlib.widgets.token_map import token_map
from tests.explorers import is_the_same_twice, redraws_within_200_ms


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens=128, channels=576):
    """Normal, but for one channel that is large in every token and one activation that is massive."""
    X = numbers(tokens, channels)
    X[:, 247] *= 20
    X[0, 30] = 500.0
    return X


def maxima(blocks=30, channels=576):
    values = numbers(blocks, channels).abs() + 0.1
    values[:, 247] = 12.0
    values[11, 30] = 3000.0
    return values


X, WEIGHTS = inputs(), [numbers(64, 576, seed=1), numbers(32, 576, seed=2)]
EXPLORERS = {
    "outlier_map": lambda **options: outlier_map(
        {"attention": maxima(), "down": maxima(30, 1536)}, **options
    ),
    "smooth_explorer": lambda **options: smooth_explorer(
        {"norm": (X, WEIGHTS), "down": (inputs(64, 1536), [numbers(32, 1536)])}, **options
    ),
    "threshold_explorer": lambda **options: threshold_explorer(
        {"q": (X, WEIGHTS[0]), "down": (inputs(64, 1536), numbers(32, 1536))}, **options
    ),
}
every_explorer = pytest.mark.parametrize("make", EXPLORERS.values(), ids=list(EXPLORERS))


@every_explorer
def test_two_of_a_kind_are_equal_and_every_description_is_wide_enough(make):
    is_the_same_twice(make)


@pytest.mark.alone
@every_explorer
def test_every_control_redraws_within_200_ms(make):
    redraws_within_200_ms(make)


# outlier map
def test_the_map_names_the_largest_channel_and_counts_those_that_reach_the_threshold():
    values = torch.tensor([[0.5, 7.0, 6.0, 1.0], [0.1, 5.9, 80.0, 0.2], [0.3, 9.0, 0.3, 0.3]])
    found = outliers(values, 0, 6)
    assert (found["largest"], found["its_channel"], found["largest_in"]) == (7.0, 1, "2 of 3 blocks")
    assert (found["reach_the_threshold"], found["in_all_blocks"]) == ("2 of 4", "4 of 12")
    assert outliers(values, 1, 100)["reach_the_threshold"] == "0 of 4"
    assert found["median_channel"] == pytest.approx(1.0)


def test_no_outlier_is_lost_where_the_map_is_coarser_than_the_channels():
    values = maxima(30, 1536)
    coarse = tiles(values)
    assert coarse.shape == (30, 96)
    assert_close(coarse, values.view(30, 96, 16).amax(2))
    assert torch.equal(tiles(values, 2000), values)


def test_a_moved_block_shows_that_block():
    ex = EXPLORERS["outlier_map"]()
    assert ex.set(layer="attention", block=11).result["largest"] == 3000.0
    ex.controls["block"].value = 12
    assert ex.result["largest"] == 12.0 and "channel 247" in repr(ex)
    assert_close(torch.from_numpy(ex.result["profile"]), maxima()[12].double().log10())


def test_maps_that_do_not_fit_are_refused():
    for bad in ({}, {"attention": torch.ones(3)}, {"attention": torch.ones(0, 4)}):
        with pytest.raises(ValueError, match=r"maxima|largest \|x\|"):
            outlier_map(bad)
    with pytest.raises(ValueError, match=r"as many blocks; there are \[2, 3\]"):
        outlier_map({"attention": torch.ones(2, 4), "down": torch.ones(3, 4)})


def test_a_channel_that_is_always_zero_is_drawn_at_the_bottom():
    ex = outlier_map({"attention": torch.zeros(2, 8)})
    assert ex.result["largest"] == 0 and ex._png and (ex.result["profile"] == math.log10(LEAST)).all()


# smooth explorer
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_curve_over_alpha_is_the_search_of_the_library(scheme):
    ex = smooth_explorer({"norm": (X, WEIGHTS)}).set(scales=scheme)
    _, errors = best_alpha(X.abs().amax(0), WEIGHTS, X, lambda W, _: Int8Linear(W, **SCHEMES[scheme]))
    mine = [ex.set(alpha=alpha).result["error"] * len(WEIGHTS) for alpha in ALPHAS]
    assert mine == pytest.approx(errors, rel=1e-3)
    assert ex.result["best_error"] == min(ex.result["curve"]) <= min(mine) / len(WEIGHTS)


def test_the_unsmoothed_error_is_that_of_plain_rounding_and_smoothing_lessens_it():
    ex = smooth_explorer({"norm": (X, WEIGHTS)}).set(scales="one a tensor")
    plain = [Int8Linear(W, activations="tensor", per_tensor=True) for W in WEIGHTS]
    errors = [
        relative_error(X @ W.T, layer(X)) for W, layer in zip(WEIGHTS, plain, strict=True)
    ]  # of the outputs themselves
    assert ex.result["unsmoothed_error"] == pytest.approx(sum(errors) / 2)
    assert ex.set(alpha=0.5).result["error"] < ex.result["unsmoothed_error"]


def test_at_one_half_inputs_and_weights_end_with_equal_maxima():
    result = smooth_explorer({"norm": (X, WEIGHTS)}).set(alpha=0.5).result
    (x_before, x), (w_before, w) = result["inputs"], result["weights"]
    assert_close(x, w)
    assert_close(x_before, X.abs().amax(0))
    assert_close(w_before, torch.cat(WEIGHTS).abs().amax(0))
    scale = smoothing_scale(x_before, WEIGHTS, 0.5)
    assert_close(x, x_before / scale)


def test_the_ends_of_alpha_level_one_side_each():
    ex = smooth_explorer({"norm": (X, WEIGHTS)})
    assert_close(ex.set(alpha=1).result["inputs"][1], torch.ones(576))
    assert_close(ex.set(alpha=0).result["weights"][1], torch.ones(576))


def test_a_layer_that_does_not_fit_its_inputs_is_refused():
    for bad in ((X, []), (X, [torch.ones(4, 4)]), (X[0], WEIGHTS)):
        with pytest.raises(ValueError, match="smooth_explorer: give each layer"):
            smooth_explorer({"norm": bad})
    with pytest.raises(ValueError, match="smooth_explorer: give"):
        smooth_explorer({})


# threshold explorer
def test_columns_bits_and_error_are_those_of_the_layer():
    ex = threshold_explorer({"q": (X, WEIGHTS[0])})
    for threshold in (6.0, 2.0):
        columns = (X.abs().amax(0) >= threshold).nonzero().squeeze(1)
        layer, exact = Int8Linear(WEIGHTS[0], columns=columns), X @ WEIGHTS[0].T
        result = ex.set(threshold=threshold).result
        assert result["columns_in_16_bits"] == f"{len(columns)} of 576"
        assert result["bits_per_weight"] == layer.stored_bits() / (64 * 576)
        assert result["error_of_all"] == pytest.approx(((layer(X) - exact).norm() / exact.norm()).item())


def test_the_lower_the_threshold_the_more_columns_and_the_less_error():
    ex = threshold_explorer({"q": (X, WEIGHTS[0])}).set(scales="one a tensor")
    points = ex.result["points"]
    kept, errors = [p[0] for p in points], [p[1] for p in points]
    assert kept == sorted(kept, reverse=True) and kept[-1] == 0
    assert errors == sorted(errors)
    assert ex.set(threshold=math.inf).result["columns_in_16_bits"] == "0 of 576"
    assert len(points) == len(THRESHOLDS) and math.inf in dict(
        map(reversed, ex.controls["threshold"].options)
    )


def test_a_massive_activation_ruins_the_median_token_while_the_error_of_all_stays_small():
    huge = numbers(128, 576)
    huge[0, 30] = 1e5
    pooled, median = token_errors(Int8Linear(WEIGHTS[0], activations="tensor"), WEIGHTS[0], huge)
    assert pooled < 0.02 and median == 1.0
    _, by_token = token_errors(Int8Linear(WEIGHTS[0]), WEIGHTS[0], huge)
    assert by_token < 0.02


def test_an_exact_layer_has_no_error():
    W = torch.randint(-127, 128, (8, 32)).float()
    x = torch.randint(-127, 128, (4, 32)).float()
    W[:, 0], x[:, 0] = 127, -127
    assert token_errors(Int8Linear(W), W, x) == (0.0, 0.0)


def test_a_weight_that_does_not_fit_its_inputs_is_refused():
    with pytest.raises(ValueError, match="threshold_explorer: give each layer"):
        threshold_explorer({"q": (X, torch.ones(4, 4))})
    with pytest.raises(ValueError, match="threshold_explorer: give"):
        threshold_explorer({})


# pictures
def test_a_token_map_reads_as_its_numbers():
    picture = token_map({"attention": X, "down": X}, around={"attention": 247, "down": 30})
    tall = X[:, 247].abs()
    assert f"channel 247 has median {tall.median():.3g}, largest {tall.max():,.4g}" in repr(picture)
    assert f"{int((tall >= 6).sum())} of 128 tokens reach 6" in repr(picture)
    assert "channel 30" in repr(picture) and "largest 500 (token 0); 1 of 128 tokens" in repr(picture)
    assert picture._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        token_map({}, around={})


def test_exponents_have_a_tick_at_each_power_of_ten():
    assert exponents([0.0, 1.0, 100.0]).tolist() == [-3.0, 0.0, 2.0]
    fig = new_figure()
    (ax,) = panels(fig, (1,), (0.8,))
    powers_of_ten(ax.yaxis, 0.05, 2000, also={0.5: "half"})
    assert [t.get_text() for t in ax.get_yticklabels()] == ["half", "0.1", "1", "10", "100", "1,000"]
    assert ax.get_ylim() == pytest.approx((math.log10(0.05), math.log10(2000)))
