"""The explorers of lesson 05: equal to the library's own results and to the algebra, and quick."""

import numpy as np
import pytest
import torch

from lightlib.sparsity.layouts import encode, layout_bits
from lightlib.sparsity.masks import mask_of
from lightlib.sparsity.obs import obd_saliency, obs_weight
from lightlib.sparsity.sparsegpt import sparsegpt_weight
from lightlib.sparsity.wanda import wanda_score
from lightlib.widgets.layout_calculator import NAMES, SHAPES, bits_a_weight, break_even, layout_calculator
from lightlib.widgets.loss_bowl import hessian, loss, loss_bowl, pruned
from lightlib.widgets.pruning_explorer import COLUMNS, ROWS, pruning_explorer, scan, zeros
from tests.explorers import is_the_same_twice, redraws_within_200_ms
from tests.scans import comes_out_again, is_the_whole_plan


def some_layer():
    """A weight (64, 96) and the gram of its inputs, a few of which are strong."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(400, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    X[:, ::7] *= 5
    return torch.randn(64, 96, generator=generator), X.T @ X / 400


def on_some_layer(**options):
    return pruning_explorer(*some_layer(), **options)


every_explorer = pytest.mark.parametrize("make", [layout_calculator, loss_bowl, on_some_layer])


@every_explorer
def test_two_of_a_kind_are_equal_and_every_description_is_wide_enough(make):
    is_the_same_twice(make)


@pytest.mark.alone
@every_explorer
def test_every_control_redraws_within_200_ms(make):
    redraws_within_200_ms(make)


# layout calculator
@pytest.mark.parametrize("layout", ["bitmap", "csr"])
def test_the_calculator_counts_what_a_stored_weight_takes(layout):
    W = torch.randn(576, 576, generator=torch.Generator().manual_seed(0)).bfloat16()
    stored = encode(W, mask_of(W.float().abs(), 0.7, "layer"), layout)
    ex = layout_calculator().set(sparsity=70, shape="576 x 576")
    assert ex.result["rows"][layout] == pytest.approx(stored.stored_bits() / W.numel(), rel=1e-4)


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("value_bits", [4, 16, 32])
def test_at_its_break_even_a_layout_takes_what_the_dense_weight_takes(layout, value_bits):
    for shape in SHAPES.values():
        even = break_even(layout, shape, value_bits)
        assert bits_a_weight(layout, shape, even, value_bits) == pytest.approx(value_bits, rel=1e-3)
        assert bits_a_weight(layout, shape, even - 0.01, value_bits) > value_bits


def test_in_16_bits_bitmap_pays_from_a_sixteenth_tiles_from_half_csr_from_two_thirds():
    result = layout_calculator().result
    shares = [result[f"{layout}_pays_from_share"] for layout in ("bitmap", "csl", "csr")]
    assert shares == pytest.approx([1 / 16, 1 / 2, 2 / 3], abs=5e-3)
    assert result["rows"]["2:4"] == 9 and layout_bits("2:4", (4, 4), 8, 16) == 9 * 16


def test_few_zeros_save_nothing_and_the_sentence_says_so():
    ex = layout_calculator().set(sparsity=3)
    assert "No layout is smaller" in ex.result["says"] and "2:4" not in ex.result["rows"]
    assert "Smallest: CSL (tiles), " in ex.set(sparsity=99).result["says"]


# loss bowl
@pytest.mark.parametrize("which", [0, 1])
def test_the_bowls_ends_are_those_of_damage_and_surgery(which):
    H, optimum = hessian(1.7, -0.5), np.array([0.9, -0.7])
    weight, gram = torch.tensor(optimum)[None].float(), torch.tensor(H).float()
    ends = pruned(H, optimum, which)
    assert 2 * loss(H, optimum, ends["damage"]) == pytest.approx(obd_saliency(weight, gram)[0, which].item())
    inverse = np.linalg.inv(H)
    assert loss(H, optimum, ends["surgeon"]) == pytest.approx(
        0.5 * optimum[which] ** 2 / inverse[which, which]
    )
    moved, mask = obs_weight(weight, gram, 0.5)
    if not mask[0, which]:
        np.testing.assert_allclose(ends["surgeon"], moved[0].numpy(), atol=1e-6)


def test_no_place_of_the_other_weight_costs_less_than_the_surgeons():
    ex = loss_bowl()
    for prune in ("weight 1", "weight 2"):
        best = ex.set(prune=prune).result["surgeon_loss"]
        losses = [ex.set(other=round(t, 1)).result["your_loss"] for t in np.arange(-2, 2.05, 0.1)]
        assert min(losses) >= best and min(losses) < best + 0.02
        assert best <= ex.result["damage_loss"]


def test_without_correlation_the_other_weight_stays_where_it_is():
    result = loss_bowl().set(correlation=0.0).result
    assert result["surgeon_loss"] == pytest.approx(result["damage_loss"])
    assert result["best_place"] == pytest.approx(1.2)


def test_it_says_which_weight_is_the_cheaper_one():
    ex = loss_bowl().set(correlation=0.0, curvature=1.0, weight_1=0.3, weight_2=1.0)
    assert ex.result["says"] == "Weight 1 is the right one to prune."
    assert ex.set(prune="weight 2").result["says"] == "Pruning weight 1 instead would cost less."
    # a large weight on a flat axis can be the cheaper one
    assert ex.set(curvature=0.2, weight_1=0.9, weight_2=1.5).result["damage_loss"] < 0.5 * 0.9**2


# the scan and the pruning explorer
def test_the_scan_has_every_point_of_its_plan_once():
    is_the_whole_plan("scan_pruning", scan())


def test_zeros_and_bytes_of_the_scan_are_those_of_the_layouts():
    shapes = [(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)]
    weights = 30 * sum(a * b for a, b in shapes)
    for point in scan()["points"]:
        setting = point["knobs"].get("sparsity")
        if point["method"] == "wrp" or point["budget"]:
            continue
        if isinstance(setting, str):
            assert point["sparsity"] == 0.5 and point["bits_per_weight"] == (17 if setting == "2:4" else 17.5)
            continue
        assert setting - 0.004 < point["sparsity"] <= setting + 1e-9
        kept = round(weights * (1 - point["sparsity"]))
        assert point["linear_bytes"] == pytest.approx((kept * 32 + weights) / 8, abs=8)
        assert point["bits_per_weight"] == pytest.approx(32 * (1 - point["sparsity"]) + 1, abs=1e-6)


def test_the_scan_says_what_theory_says():
    dense, points = scan()["dense"]["perplexity"], scan()["points"]
    at = {(p["method"], p["budget"], *p["knobs"].values()): p["perplexity"] for p in points}
    for method in ("magnitude", "wanda", "sparsegpt"):
        levels = [at[method, "", s] for s in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)]
        assert levels == sorted(levels) and levels[0] > 0.97 * dense
        assert at[method, "", 0.5] < at[method, "", "4:8"] < at[method, "", "2:4"]
    for setting in (0.5, 0.6, 0.7, "2:4", "4:8"):
        assert at["magnitude", "", setting] > at["wanda", "", setting] > at["sparsegpt", "", setting]
    recovered = [at["wanda", "", "2:4"], *(at["wrp", "", alpha] for alpha in (0.1, 0.2, 0.25, 0.3, 0.4))]
    assert recovered == sorted(recovered, reverse=True)


@pytest.mark.model
def test_a_point_of_the_scan_comes_out_again():
    kept = next(p for p in scan()["points"] if p["method"] == "magnitude" and zeros(p) == 0.3)
    comes_out_again("scan_pruning", kept, ("linear_bytes", "stored_bytes", "bits_per_weight", "sparsity"))


@pytest.mark.parametrize("sparsity", [0.5, 0.7, "2:4"])
def test_the_explorer_prunes_as_the_methods_do_and_shows_the_point_of_the_scan(sparsity):
    ex, (W, gram) = on_some_layer(), some_layer()
    masks = {
        "magnitude": mask_of(W.abs(), sparsity, "layer"),
        "wanda": mask_of(wanda_score(W, gram.diagonal()), sparsity),
        "sparsegpt": sparsegpt_weight(W, gram, sparsity)[1],
    }
    errors = {}
    for method, mask in masks.items():
        result = ex.set(method=method, sparsity=sparsity).result
        assert np.array_equal(~result["part"].mask, mask[:ROWS, :COLUMNS].numpy())
        np.testing.assert_allclose(result["stay"], mask[:, :COLUMNS].float().mean(0))
        errors[method] = result["error_of_this_layer_share"]
        point = next(p for p in scan()["points"] if p["method"] == method and zeros(p) == sparsity)
        assert result["perplexity"] == point["perplexity"]
    assert errors["magnitude"] > errors["wanda"] > errors["sparsegpt"]


def test_the_explorer_names_the_better_method_and_refuses_what_does_not_fit():
    ex, (W, gram) = on_some_layer(), some_layer()
    assert ex.set(method="wanda").result["says"].startswith("With as many zeros SparseGPT reaches ")
    assert ex.set(method="sparsegpt").result["says"] == "The best of the three with as many zeros."
    assert "within a tenth" in ex.set(method="magnitude", sparsity=0.1).result["says"]
    with pytest.raises(ValueError, match="the gram of 96 inputs is square"):
        pruning_explorer(W, gram[:10])
    with pytest.raises(ValueError, match="at least 32 x 64"):
        pruning_explorer(W[:8], gram)
