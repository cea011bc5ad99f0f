"""The explorers of lesson 03: equal to the library's own results, consistent with the scan, and quick."""

import pytest
import torch

from lightlib.measure import perplexity
from lightlib.quantization.awq import awq_scale, balanced
from lightlib.quantization.gptq import gptq_weight
from lightlib.quantization.grid import Int
from lightlib.quantization.linear import QuantLinear
from lightlib.quantization.rtn import rtn_weight
from lightlib.report import relative_error
from lightlib.widgets.awq_search import STEPS, awq_search, channel_losses
from lightlib.widgets.curves import curves
from lightlib.widgets.gptq_stepper import COLUMNS, DAMPINGS, ROWS, gptq_stepper, mixed, steps
from lightlib.widgets.weight_only_explorer import (
    METHODS,
    best_of_size,
    group,
    how,
    kind,
    scan,
    short,
    title,
    weight_only_explorer,
)
from tests.conftest import data_script
from tests.explorers import is_the_same_twice, redraws_within_200_ms
from tests.scans import comes_out_again, is_the_whole_plan


def layer(n_out=96, n_in=192, seed=0):
    """(weight, gram): inputs that share much, a few of them strong."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(2000, n_in, generator=g) @ (torch.eye(n_in) + 0.3 * torch.randn(n_in, n_in, generator=g))
    X[:, [3, n_in // 2]] *= 12
    return torch.randn(n_out, n_in, generator=g) * 0.1, X.T @ X / len(X)


def some_points() -> dict:
    """A scan in miniature: two sizes, three methods, one knob."""
    made = []
    for bits, losses in ((3, (80.0, 60.0, 45.0)), (4, (33.0, 34.0, 30.0))):
        for method, loss in zip(("rtn", "gptq", "awq"), losses, strict=True):
            made.append(
                {
                    "method": method, "grid": "Int", "bits": bits, "group_size": 64, "knobs": {},
                    "perplexity": loss, "bits_per_weight": bits + 0.3, "linear_bytes": bits * 10**7,
                    "stored_bytes": bits * 10**7 + 10**8, "seconds": 1.0,
                }
            )  # fmt: skip
    made.append({**made[0], "grid": "NF4", "bits": 4, "group_size": None, "bits_per_weight": 4.03})
    made.append({**made[1], "knobs": {"act_order": True}, "perplexity": 1.0})
    return {"dense": {"perplexity": 27.0}, "points": made}


EXPLORERS = {
    "gptq_stepper": lambda **options: gptq_stepper(*layer(), **options),
    "awq_search": lambda **options: awq_search(*layer(192, 576), **options),
    "weight_only_explorer": lambda **options: weight_only_explorer(**options),
}
every_explorer = pytest.mark.parametrize("make", EXPLORERS.values(), ids=list(EXPLORERS))


@every_explorer
def test_two_of_a_kind_are_equal_and_every_description_is_wide_enough(make):
    is_the_same_twice(make)


@pytest.mark.alone
@every_explorer
def test_every_control_redraws_within_200_ms(make):
    redraws_within_200_ms(make)


# GPTQ stepper
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("damping", [DAMPINGS[0], 0.01, DAMPINGS[-1]])
def test_the_last_step_is_what_gptq_weight_gives(bits, act_order, damping):
    weight, gram = (part[:COLUMNS, :COLUMNS] for part in layer())
    grid = Int(bits)
    found = steps(weight, gram, grid, damping, act_order)
    whole = gptq_weight(weight, gram, grid, damping=damping, act_order=act_order).dense()
    torch.testing.assert_close(found["states"][-1], whole[:, found["order"]], rtol=0, atol=1e-6)
    assert found["gptq"][-1] == pytest.approx(relative_error(weight, whole, gram), rel=1e-4)
    assert found["rtn"][-1] == pytest.approx(
        relative_error(weight, rtn_weight(weight, grid).dense(), gram), rel=1e-4
    )


def test_each_state_is_the_one_before_with_a_column_pinned_and_the_rest_pushed():
    weight, gram = (part[:COLUMNS, :COLUMNS] for part in layer())
    found = steps(weight, gram, Int(3))
    for j, push in enumerate(found["pushes"]):
        before, after = found["states"][j], found["states"][j + 1]
        assert torch.equal(after[:, :j], before[:, :j]) and not push[:, : j + 1].any()
        torch.testing.assert_close(after[:, j + 1 :], before[:, j + 1 :] + push[:, j + 1 :])


def test_the_columns_to_come_stand_where_least_squares_puts_them():
    weight, gram = (part[:COLUMNS, :COLUMNS].double().float() for part in layer())
    found, k = steps(weight, gram, Int(3), damping=1e-6), 5
    pinned, moved = found["states"][k][:, :k], found["states"][k][:, k:]
    best = weight[:, k:] + (weight[:, :k] - pinned) @ gram[:k, k:] @ torch.linalg.inv(gram[k:, k:])
    torch.testing.assert_close(moved, best, rtol=1e-3, atol=1e-4)


def test_inputs_without_anything_in_common_make_it_rounding_to_nearest():
    weight, gram = layer()
    ex = gptq_stepper(weight, gram).set(columns=COLUMNS, correlation=0.0)
    assert ex.result["times_better"] == 1 and not ex.result["push"].any()
    assert torch.equal(torch.tensor(ex.result["state"]), Int(3).rounded(weight[:ROWS, :COLUMNS].contiguous()))
    assert torch.equal(mixed(gram, 1.0), gram) and torch.equal(mixed(gram, 0.0), gram.diagonal().diag())


def test_nothing_rounded_has_no_error_and_related_inputs_gain():
    ex = gptq_stepper(*layer()).set(columns=0)
    assert ex.result["rtn_error"] == ex.result["gptq_error"] == 0 and not ex.result["push"].any()
    assert ex.set(columns=COLUMNS, bits=4).result["times_better"] > 1.02
    assert ex.set(damping=10.0).result["times_better"] < ex.set(damping=0.01).result["times_better"]


def test_a_weight_that_is_too_small_or_a_gram_that_does_not_fit_is_refused():
    weight, gram = layer()
    with pytest.raises(ValueError, match="at least 8 x 16"):
        gptq_stepper(weight[:4], gram)
    for make in (gptq_stepper, awq_search):
        with pytest.raises(ValueError, match="the gram of 192 inputs is square"):
            make(weight, gram[:100, :100])


# AWQ search
@pytest.mark.parametrize(("bits", "group_size"), [(3, 64), (4, "row"), (8, 32)])
def test_the_curve_and_its_best_exponent_are_awq_scale_s(bits, group_size):
    weight, gram = layer()
    ex = awq_search(weight, gram).set(bits=bits, group_size=group_size)
    grid = Int(bits, None if group_size == "row" else group_size)
    magnitude = gram.diagonal().sqrt()
    best, losses = awq_scale([weight], gram, magnitude, [grid])
    whole = (weight @ gram * weight).sum().item()
    assert ex.result["errors"] == pytest.approx([(loss / whole) ** 0.5 for loss in losses], rel=1e-4)
    torch.testing.assert_close(balanced(magnitude, ex.result["best_exponent"]), best)


@pytest.mark.parametrize("exponent", [0.0, 0.35, 0.95])
def test_the_channels_losses_add_up_to_the_layer_s_error(exponent):
    weight, gram = layer()
    ex = awq_search(weight, gram).set(exponent=exponent, bits=3)
    scale = balanced(gram.diagonal().sqrt(), exponent)
    rounded = Int(3, 64).encode(weight * scale).dense() / scale
    error = relative_error(weight, rounded, gram)
    assert ex.result["output_error"] == pytest.approx(error, rel=1e-4)
    now = ex.result["losses_before_and_now"][1::2]
    assert sum(now) == pytest.approx(error**2, rel=1e-3)
    whole = channel_losses(weight, gram, Int(3, 64), scale).sum() / (weight @ gram * weight).sum()
    assert whole.sqrt().item() == pytest.approx(error, rel=1e-4)


def test_exponent_zero_is_rounding_to_nearest_and_strong_channels_are_stretched():
    weight, gram = layer()
    ex = awq_search(weight, gram).set(exponent=0.0)
    assert ex.result["times_better"] == 1 and ex.result["salient_scale"] == ex.result["other_scale"] == 1
    ex.set(exponent=0.5)
    assert ex.result["salient_scale"] > 1.5 > ex.result["other_scale"] and ex.result["times_better"] > 1.1
    assert {3, 96} == set(ex.result["salient"].tolist())
    assert len(ex.result["errors"]) == STEPS


# the scan and its explorer
def test_the_scan_has_every_point_of_its_plan_once():
    is_the_whole_plan("scan_weight_only", scan())


def test_bytes_and_bits_of_the_scan_are_those_of_quant_linear():
    made, width, heads, hidden = data_script("scan_weight_only"), 576, 192, 1536
    shapes = [(width, width)] * 2 + [(heads, width)] * 2 + [(hidden, width)] * 2 + [(width, hidden)]
    weights = 30 * sum(a * b for a, b in shapes)
    dense = scan()["dense"]["stored_bytes"] - 4 * weights
    for point in scan()["points"]:
        grid, knobs = made.grid_of(point), point["knobs"]
        bits = 0
        for shape in shapes:
            encoded = grid.encode(torch.zeros(shape).add_(0.1))
            bits += 30 * QuantLinear(encoded).stored_bits()
            # groups that follow the order of the columns must say which: 32 bits an input
            ordered = knobs.get("act_order") and not knobs.get("static_groups") and point["group_size"]
            bits += 30 * 32 * shape[1] if ordered else 0
        assert point["linear_bytes"] == bits // 8
        assert point["bits_per_weight"] == pytest.approx(bits / weights)
        assert point["stored_bytes"] == pytest.approx(dense + bits / 8, abs=8)


def test_the_scan_says_what_theory_says():
    dense, points = scan()["dense"]["perplexity"], scan()["points"]
    at = {(how(p), kind(p), group(p)): p["perplexity"] for p in points if how(p)}
    assert all(value > 0.97 * dense for value in at.values())
    assert at["rtn", "8 bits", 64] == pytest.approx(dense, rel=0.01)
    for g in (32, 64, 192, "row"):
        assert (
            at["rtn", "2 bits", g] > at["rtn", "3 bits", g] > at["rtn", "4 bits", g] > at["rtn", "8 bits", g]
        )
    assert at["gptq", "3 bits", 64] < 0.95 * at["rtn", "3 bits", 64]
    for better in ("awq", "ordered"):
        assert at[better, "4 bits", 64] < at["rtn", "4 bits", 64]


@pytest.mark.model
def test_a_point_of_the_scan_comes_out_again():
    kept = next(p for p in scan()["points"] if title(p) == "RTN, 4 bits, group 64")
    model, tests = comes_out_again(
        "scan_weight_only", kept, ("linear_bytes", "stored_bytes", "bits_per_weight")
    )
    assert perplexity(model, tests) == pytest.approx(scan()["dense"]["perplexity"], rel=1e-3)


def test_the_explorer_shows_the_point_that_its_controls_name():
    found, ex = scan(), weight_only_explorer()
    for point in found["points"]:
        if how(point):
            ex.set(grid=kind(point), group_size=group(point), method=METHODS[how(point)])
            assert ex.result["perplexity"] == point["perplexity"]
            assert ex.result["linear_layers_bytes"] == point["linear_bytes"]


def test_only_what_was_measured_is_on_offer_and_the_sentence_names_what_is_better():
    ex = weight_only_explorer(some_points())
    assert ex.controls["grid"].options == ("3 bits", "4 bits", "NF4")
    said = ex.set(grid="4 bits", group_size=64, method="GPTQ").result["says"]
    assert said == "At this size or below, AWQ, 4 bits, group 64 is better: 30.00 with 4.30 bits a weight."
    assert ex.set(method="AWQ").result["says"].startswith("Nothing measured is better")
    ex.set(grid="NF4")
    assert ex.controls["method"].options == ("RTN",) and ex.values["group_size"] == "row"
    with pytest.raises(ValueError, match="choose one of 'RTN'"):
        ex.set(method="AWQ")
    assert ex.set(grid="3 bits").values == {"grid": "3 bits", "group_size": 64, "method": "RTN"}


def test_the_best_of_a_size_counts_every_point():
    points = some_points()["points"]
    assert short(best_of_size(points, 9)) == "GPTQ+ 3/64"
    assert title(best_of_size(points[:6], 3.5)) == "AWQ, 3 bits, group 64"
    assert title(points[6]) == "RTN, NF4, row" and title(points[7]) == "GPTQ act_order, 3 bits, group 64"
    ordered = {**points[1], "knobs": {"act_order": True, "static_groups": True}}
    assert (how(ordered), how(points[7]), how(points[0])) == ("ordered", "", "rtn")


# curves
def test_curves_read_as_their_numbers():
    lines = {"3 bits": [(512, 30.1), (1024, 28.4)], "2 bits": [(n, 2.0 * n) for n in range(1, 101)]}
    picture = curves(lines, x="tokens", y="perplexity", log="x")
    assert repr(picture).startswith("perplexity over tokens: 3 bits (512, 30.1) (1,024, 28.4); 2 bits (1, 2)")
    assert repr(picture).endswith("(100, 200)") and repr(picture).count("(") == 8
    assert picture._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        curves({}, x="", y="")
