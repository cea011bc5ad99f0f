"""The explorers of lesson 05: equal to the library's own results and to the algebra, and quick."""

import numpy as np
import pytest
import torch

from lightlib.sparsity.layouts import encode, layout_bits
from lightlib.sparsity.masks import mask_of
from lightlib.sparsity.obs import obd_saliency, obs_weight
from lightlib.widgets.layout_calculator import NAMES, SHAPES, bits_a_weight, break_even, layout_calculator
from lightlib.widgets.loss_bowl import hessian, loss, loss_bowl, pruned
from tests.explorers import is_the_same_twice, redraws_within_200_ms

every_explorer = pytest.mark.parametrize("make", [layout_calculator, loss_bowl])


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
