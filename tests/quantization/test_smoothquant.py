import pytest
import torch

from lightlib.decoder import find_blocks, linears
from lightlib.folding import folds
from lightlib.quantization.int8_linear import Int8Linear
from lightlib.quantization.llm_int8 import llm_int8, outlier_columns
from lightlib.quantization.smoothquant import ALPHAS, best_alpha, smoothing_scale, smoothquant
from tests.conftest import inputs_of

torch.manual_seed(0)
W, X = torch.randn(24, 64), torch.randn(200, 64)
X[:, 5] *= 60


def spiky(llama, factor=60.0):
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.input_layernorm.weight[3] = factor
            layer.post_attention_layernorm.weight[7] = factor
    return llama


def change(light, dense, ids):
    with torch.no_grad():
        logits = dense(ids).logits
        return ((light(ids).logits - logits).norm() / logits.norm()).item()


def test_alpha_one_evens_the_inputs_and_alpha_zero_the_weights():
    maxima = X.abs().amax(0)
    assert torch.allclose(maxima / smoothing_scale(maxima, [W], 1.0), torch.ones(64))
    scale = smoothing_scale(maxima, [W, 2 * W], 0.0)
    assert torch.allclose((2 * W * scale).abs().amax(0), torch.ones(64))


def test_one_half_gives_inputs_and_weights_the_same_maxima():
    maxima = X.abs().amax(0)
    scale = smoothing_scale(maxima, [W], 0.5)
    assert torch.allclose(maxima / scale, (W * scale).abs().amax(0))


def test_smoothing_alone_leaves_the_logits_as_they_are(model, calib):
    """Everything but the rounding: the scales that smoothquant folds, on a dense model."""
    from lightlib.calibration import AbsMax, stream_blocks
    from lightlib.decoder import use_linear_everywhere

    model = use_linear_everywhere(model)
    with torch.no_grad():
        before = model(calib[0]).logits
    for block in stream_blocks(model, calib, progress=False):
        found = block.collect(AbsMax)
        for fold in (f for f in folds(model) if f.rows is None):
            weights = [block.linears[name].weight for name in fold.readers]
            fold.apply(block.module, smoothing_scale(found[fold.readers[0]].value, weights, 0.5))
    with torch.no_grad():
        torch.testing.assert_close(model(calib[0]).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activations", ["tensor", "static", "token"])
def test_smoothing_helps_where_channels_differ(llama, calib, activations):
    dense = spiky(llama)
    errors = [
        smoothquant(dense, calib, alpha=alpha, activations=activations, progress=False).reports.rows[0].error
        for alpha in (None, 0.5)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_the_search_is_no_worse_than_any_single_alpha_on_the_layer_it_sees():
    maxima = X.abs().amax(0)

    def rounded(weight, maxima):
        return Int8Linear(weight, activations="tensor")

    alpha, errors = best_alpha(maxima, [W], X, rounded)
    assert alpha == ALPHAS[errors.index(min(errors))]
    scale = smoothing_scale(maxima, [W], 0.3)
    by_hand = (rounded(W * scale, None)(X / scale) - X @ W.T).norm() / (X @ W.T).norm()
    assert errors[ALPHAS.index(0.3)] == pytest.approx(by_hand.item(), rel=1e-4)


def test_the_report_says_which_layers_were_smoothed(llama, calib):
    report = smoothquant(llama, calib, alpha="search", progress=False).reports
    notes = {row.name.removeprefix("model.layers.0."): row.notes for row in report if ".0." in row.name}
    assert notes["self_attn.q_proj"] == notes["self_attn.k_proj"] and notes["mlp.up_proj"].startswith(
        "alpha 0."
    )
    assert notes["mlp.down_proj"] == notes["self_attn.o_proj"] == "not smoothed"


def test_everywhere_reaches_the_massive_activation_before_the_down_projection(llama, calib):
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.mlp.up_proj.weight[5] *= 300
    errors = {}
    for everywhere in (False, True):
        light, report = smoothquant(llama, calib, activations="tensor", everywhere=everywhere, progress=False)
        row = next(row for row in report if row.name == "model.layers.0.mlp.down_proj")
        errors[everywhere] = (row.error, change(light, llama, calib[0]))
        assert row.notes == ("alpha 0.5" if everywhere else "not smoothed")
    assert errors[True][1] < 0.7 * errors[False][1]


def test_the_reported_error_is_that_of_the_outputs_with_rounded_inputs(llama, calib):
    light, report = smoothquant(llama, calib[:1], alpha=None, activations="tensor", progress=False)
    q = llama.model.layers[0].self_attn.q_proj
    inputs = inputs_of(q, llama, calib[:1])
    with torch.no_grad():
        exact, got = q(inputs), light.model.layers[0].self_attn.q_proj(inputs)
    assert report.rows[0].error == pytest.approx(((got - exact).norm() / exact.norm()).item(), rel=1e-4)


def test_plain_w8a8_needs_no_data_and_gives_what_it_gives_with_them(llama, calib):
    light = [smoothquant(llama, data, alpha=None, progress=False).model for data in (None, calib)]
    with torch.no_grad():
        assert torch.equal(*(model(calib[0]).logits for model in light))
    for settings in ({}, {"alpha": None, "activations": "static"}):
        with pytest.raises(ValueError, match="smoothquant needs batches"):
            smoothquant(llama, None, **settings)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, "best"])
def test_an_alpha_that_cannot_be_is_refused(llama, calib, alpha):
    with pytest.raises(ValueError, match="give a number from 0 to 1, 'search' or None"):
        smoothquant(llama, calib, alpha=alpha)


def test_outlier_columns_are_all_at_zero_and_none_at_infinity():
    maxima = torch.tensor([0.1, 6.0, 5.9, 80.0])
    assert outlier_columns(maxima, 6.0).tolist() == [1, 3]
    assert outlier_columns(maxima, 0.0).tolist() == [0, 1, 2, 3]
    assert outlier_columns(maxima, float("inf")).tolist() == []


def test_with_every_column_apart_only_the_16_bits_remain(model, calib):
    light, report = llm_int8(model, calib, threshold=0.0, progress=False)
    assert change(light, model, calib[0]) < 1e-3
    assert all(f"{row.shape[1]} of {row.shape[1]} columns in 16 bit" == row.notes for row in report)


def test_outlier_columns_apart_make_int8_nearly_exact_where_plain_int8_is_not(llama, calib):
    dense = spiky(llama, 200.0)
    plain = smoothquant(dense, calib, alpha=None, progress=False).model
    apart = llm_int8(dense, calib, threshold=20.0, dynamic=False, progress=False)
    found = llm_int8(dense, None, threshold=20.0, progress=False).model
    errors = [change(light, dense, calib[0]) for light in (plain, found, apart.model)]
    assert errors[2] < errors[1] < 0.7 * errors[0]
    q = next(row for row in apart.reports if row.name == "model.layers.0.self_attn.q_proj")
    assert q.notes == "1 of 32 columns in 16 bit"


def test_columns_found_in_calibration_are_those_whose_inputs_reach_the_threshold(llama, calib):
    dense = spiky(llama)
    light = llm_int8(dense, calib, threshold=10.0, progress=False).model
    first = next(iter(find_blocks(dense)))
    for name, layer in linears(light.get_submodule(first)).items():
        reached = (
            inputs_of(dense.get_submodule(first).get_submodule(name), dense, calib).abs().amax(0) >= 10.0
        )
        assert layer.columns.tolist() == reached.nonzero().flatten().tolist()


def test_static_outliers_need_data(llama):
    with pytest.raises(ValueError, match="dynamic=False needs batches"):
        llm_int8(llama, None, dynamic=False)
