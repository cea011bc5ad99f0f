"""The explorers of lesson 09: equal to the library's own PCA, SVD and ranks, and quick."""

import numpy as np
import pytest
import torch

from lightlib.lowrank.pca import pca
from lightlib.lowrank.ranks import stored
from lightlib.lowrank.svd import low_rank, output_directions
from lightlib.report import relative_error
from lightlib.widgets.low_rank_explorer import best_within, low_rank_explorer
from lightlib.widgets.matrix_spectra import GOALS, matrix_spectra, place
from lightlib.widgets.pca_direction import apart, cloud, kept, pca_direction
from lightlib.widgets.svd_picture import break_even, portrait, rebuilt, svd_picture
from tests.explorers import is_the_same_twice, redraws_within_200_ms

SHAPES = {"self_attn.q_proj": (48, 48), "self_attn.k_proj": (16, 48), "mlp.down_proj": (48, 96)}
DENSE = {"stored_bytes": 270e6, "perplexity": 25.2}


def some_matrices(blocks=3) -> tuple[dict, dict, dict]:
    """(energies, shapes, {name: (weight, gram)}) of layers whose inputs lie near a few directions."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, (n_out, n_in) in [
        *((f"model.layers.{i}.{role}", shape) for i in range(blocks) for role, shape in SHAPES.items()),
        ("model.embed_tokens", (200, 48)),
    ]:
        X = torch.randn(300, n_in, generator=generator) * torch.linspace(3, 0.03, n_in)
        X = X @ torch.linalg.qr(torch.randn(n_in, n_in, generator=generator))[0]
        found[name] = torch.randn(n_out, n_in, generator=generator), X.T @ X
    energies = {n: (output_directions(W)[1], output_directions(W, gram)[1]) for n, (W, gram) in found.items()}
    return energies, {name: tuple(W.shape) for name, (W, _) in found.items()}, found


def some_rows() -> list[dict]:
    """Made-up points of three methods at five sizes."""
    return [
        {
            "method": name, "setting": f"keep {keep} %", "stored_bytes": keep * 2.7e6,
            "perplexity": 25.2 + price * (100 - keep) ** 2,
        }
        for name, price in (("svd", 0.3), ("whitened svd", 0.02), ("sensitive ranks", 0.015))
        for keep in (30, 50, 70, 80, 90)
    ]  # fmt: skip


def on_some_matrices(**options):
    energies, shapes, _ = some_matrices()
    return matrix_spectra(energies, shapes, **options)


def on_some_rows(**options):
    return low_rank_explorer(some_rows(), DENSE, **options)


every_explorer = pytest.mark.parametrize("make", [pca_direction, svd_picture, on_some_matrices, on_some_rows])


@every_explorer
def test_two_of_a_kind_are_equal_and_every_description_is_wide_enough(make):
    is_the_same_twice(make)


@pytest.mark.alone
@every_explorer
def test_every_control_redraws_within_200_ms(make):
    redraws_within_200_ms(make)


# PCA
@pytest.mark.parametrize("center", [True, False])
def test_no_angle_keeps_more_than_the_best_which_is_that_of_pca(center):
    ex = pca_direction().set(center=center)
    found = pca(torch.from_numpy(cloud()), center=center)
    assert ex.result["best_keeps_percent"] == pytest.approx(100 * found.explained[0].item())
    assert ex.result["curve"].max() <= ex.result["best_keeps_percent"]
    assert ex.result["curve"].max() == pytest.approx(ex.result["best_keeps_percent"], abs=0.02)


def test_two_directions_at_right_angles_keep_everything_between_them():
    points = cloud() - cloud().mean(0)
    for angle in (-80, 0, 13, 45):
        assert kept(points, angle) + kept(points, angle + 90) == pytest.approx(1)


def test_what_is_kept_is_what_projected_points_vary():
    ex = pca_direction().set(angle=17)
    points = cloud() - cloud().mean(0)
    way = np.array([np.cos(np.deg2rad(17)), np.sin(np.deg2rad(17))])
    feet = np.outer(points @ way, way)
    assert ex.result["lost_percent"] == pytest.approx(100 * ((points - feet) ** 2).sum() / (points**2).sum())
    assert ex.result["kept_percent"] + ex.result["lost_percent"] == pytest.approx(100)


def test_it_says_when_the_best_direction_is_reached_and_where_it_looks_without_centering():
    ex = pca_direction()
    best = round(ex.result["best_angle"])
    assert "to the degree, no direction keeps more" in ex.set(angle=best).result["says"]
    assert (
        f"you are {apart(best + 20, ex.result['best_angle']):.3g}° away"
        in ex.set(angle=best + 20).result["says"]
    )
    x, y = cloud().mean(0)
    assert abs(np.rad2deg(np.arctan2(y, x)) % 180 - ex.set(center=False).result["best_angle"] % 180) < 25
    assert ex.result["says"].startswith("With the mean left in")


def test_opposite_directions_are_one():
    assert apart(-90, 90) == 0 and apart(80, -80) == 20 and apart(10, 55) == 45


# SVD of a picture
def test_the_portrait_is_a_square_of_greys():
    picture = portrait()
    assert picture.shape == (192, 192) and 0 <= picture.min() < 0.05 and 0.9 < picture.max() <= 1


def test_the_error_is_the_tail_of_the_energy_and_at_full_rank_nothing():
    ex = svd_picture()
    for rank in (1, 20, 96, 191):
        result = ex.set(rank=rank).result
        assert result["relative_error"] ** 2 == pytest.approx(result["tail_of_the_energy"], rel=1e-6)
    result = ex.set(rank=192).result
    assert result["relative_error"] == result["tail_of_the_energy"] == 0
    np.testing.assert_allclose(result["rebuilt"], portrait(), atol=1e-12)


def test_no_matrix_of_the_rank_is_nearer_and_the_library_makes_the_same():
    A = portrait()
    result = svd_picture().set(rank=12).result
    ours = low_rank(torch.from_numpy(A), 12, pivot=False)
    assert relative_error(torch.from_numpy(A), ours.to_tensor()) == pytest.approx(result["relative_error"])
    assert ours.stored == result["numbers_stored"]
    assert low_rank(torch.from_numpy(A), 12).stored == result["with_pivots"]


@pytest.mark.parametrize("shape", [(192, 192), (40, 90), (7, 5)])
def test_two_factors_take_as_many_numbers_as_the_picture_where_they_break_even(shape):
    even, (m, n) = break_even(*shape), shape
    assert even * (m + n) == pytest.approx(m * n)
    assert stored(shape, int(np.ceil(even)) - 1, pivot=False) < m * n
    ex = svd_picture(np.random.default_rng(0).random(shape))
    assert "times fewer" in ex.set(rank=1).result["says"]
    assert "which saves nothing" in ex.set(rank=min(shape)).result["says"]


def test_a_picture_of_rank_one_needs_no_more():
    A = np.outer(np.arange(1, 9), np.arange(1, 13))
    assert svd_picture(A).set(rank=1).result["relative_error"] < 1e-9
    np.testing.assert_allclose(rebuilt(np.linalg.svd(A, full_matrices=False), 1), A)


def test_what_is_no_picture_is_refused():
    for bad in (np.zeros((4, 4)), np.ones(5), np.full((3, 3), np.nan)):
        with pytest.raises(ValueError, match="give a matrix"):
            svd_picture(bad)


# spectra of real matrices
def test_roles_and_blocks_are_read_from_names():
    assert place("transformer.h.11.attn.c_proj") == ("attn.c_proj", 11)
    assert place("model.layers.0.mlp.up_proj") == ("mlp.up_proj", 0)
    assert place("lm_head") == ("lm_head", "none")


def test_shares_at_the_break_even_are_what_truncated_weights_keep():
    energies, shapes, layers = some_matrices()
    ex = matrix_spectra(energies, shapes)
    for role, (n_out, n_in) in SHAPES.items():
        result = ex.set(role=role, block=1).result
        W, gram = layers[f"model.layers.1.{role}"]
        rank = int(n_out * n_in / (n_out + n_in))
        assert result["breaks_even_at_rank"] == pytest.approx(n_out * n_in / (n_out + n_in))
        S = torch.linalg.svdvals(W.double()).square()
        assert result["weight_keeps_there_percent"] == pytest.approx(100 * (S[:rank].sum() / S.sum()).item())
        gone = W.double() - low_rank(W, rank, gram, pivot=False).to_tensor().double()
        lost = torch.trace(gone @ gram.double() @ gone.T) / torch.trace(
            W.double() @ gram.double() @ W.double().T
        )
        assert result["output_keeps_there_percent"] == pytest.approx(100 * (1 - lost.item()), rel=1e-5)


@pytest.mark.parametrize("goal", GOALS)
def test_the_rank_named_keeps_what_is_asked_for_and_one_less_does_not(goal):
    energies, shapes, _ = some_matrices()
    result = matrix_spectra(energies, shapes).set(role="mlp.down_proj", block=2, goal=goal).result
    for energy, named in zip(energies["model.layers.2.mlp.down_proj"], ("weight", "output"), strict=True):
        rank = result[f"rank_for_the_{named}"]
        assert (
            energy[:rank].sum() >= 0.999999 * goal / 100 * energy.sum() > energy[: rank - 1].sum() * 0.999998
        )


def test_inputs_near_few_directions_need_a_lower_rank_than_the_weight():
    result = on_some_matrices().set(role="self_attn.q_proj", goal=95).result
    assert result["rank_for_the_output"] < result["breaks_even_at_rank"] < result["rank_for_the_weight"]
    assert "only that of W X is below it" in result["says"]


def test_a_matrix_outside_all_blocks_can_be_chosen_and_left_again():
    ex = on_some_matrices().set(role="embed_tokens")
    assert ex.values["block"] == "none" and ex.result["breaks_even_at_rank"] == pytest.approx(200 * 48 / 248)
    assert ex.set(role="self_attn.k_proj", block=2).values["block"] == 2


def test_energies_that_are_not_of_the_shape_are_refused_by_name():
    good = torch.ones(16)
    for bad, shape in (
        (torch.ones(15), (16, 48)),
        (torch.zeros(16), (16, 48)),
        (torch.ones(16, 1), (16, 48)),
    ):
        with pytest.raises(ValueError, match=r"layers\.0\.k_proj, W X: a matrix 16 x 48 has energy \(16,\)"):
            matrix_spectra({"layers.0.k_proj": (good, bad)}, {"layers.0.k_proj": shape})
    with pytest.raises(ValueError, match="must fall"):
        matrix_spectra({"a": (good, torch.arange(1.0, 17))}, {"a": (16, 48)})
    for none in ({}, {"a": (good, good)}):
        with pytest.raises(ValueError, match="a shape for each name"):
            matrix_spectra(none, {})


# what was measured
def test_the_best_within_a_budget_is_better_than_all_that_fit():
    rows = some_rows()
    ex = low_rank_explorer(rows, DENSE)
    for budget in (100, 150, 200, 250):
        result = ex.set(budget=budget).result
        fits = [row for row in rows if row["stored_bytes"] <= budget * 1e6]
        assert result["perplexity"] == min(row["perplexity"] for row in fits)
        assert result["stored_bytes"] <= budget * 1e6
        assert set(result["best"]) == {row["method"] for row in fits}
        assert next(iter(result["best"])) == "sensitive ranks" and "sensitive ranks (keep" in result["says"]


def test_a_method_that_is_not_shown_wins_nothing():
    ex = on_some_rows().set(show_sensitive_ranks=False)
    assert ex.result["best_method"].startswith("whitened svd") and ex.result["methods_shown"] == 2
    assert not any(row["method"] == "sensitive ranks" for row in ex.result["rows"])
    ex.set(show_whitened_svd=False, show_svd=False)
    assert ex.result["says"] == "No method is shown; tick one." and "perplexity" not in ex.result


def test_below_the_smallest_point_nothing_fits_and_it_says_so():
    ex = on_some_rows()
    ex.set(budget=ex.controls["budget"].min)
    assert "Nothing shown fits into 80 MB; the smallest is svd (keep 30 %) with 81 MB" in ex.result["says"]
    assert ex.result["best"] == {}


def test_what_is_larger_and_worse_than_the_dense_model_is_called_so():
    rows = [{"method": "svd", "setting": "90 %", "stored_bytes": 280e6, "perplexity": 26.0}]
    ex = low_rank_explorer(rows, DENSE)
    says = ex.set(budget=ex.controls["budget"].max).result["says"]
    assert says.endswith("But the dense model is no larger and no worse.")


def test_of_equal_points_the_smaller_one_is_best():
    small, large = ({"method": "a", "setting": s, "stored_bytes": s, "perplexity": 30.0} for s in (10, 20))
    assert best_within([large, small], 100) == {"a": small} and best_within([large], 19) == {}


def test_rows_that_lack_a_number_are_refused():
    with pytest.raises(ValueError, match="has no perplexity"):
        low_rank_explorer([{"method": "a", "setting": "b", "stored_bytes": 3}], DENSE)
    with pytest.raises(ValueError, match="above 0"):
        low_rank_explorer([{**some_rows()[0], "perplexity": 0}], DENSE)
    with pytest.raises(ValueError, match="give rows"):
        low_rank_explorer([], DENSE)
