import pytest
import torch

from lightlib.decoder import find_blocks, linear_shapes
from lightlib.sparsity.budget import outlier_share, owl, sensitive, spread
from lightlib.sparsity.wanda import wanda


def test_the_outlier_share_counts_what_exceeds_so_many_times_the_mean():
    scores = torch.ones(100)
    scores[:3] = 20.0
    assert outlier_share(scores, 5.0) == pytest.approx(0.03)
    assert outlier_share(torch.ones(100), 5.0) == 0


def test_parts_with_more_outliers_keep_more_and_the_mean_is_what_was_asked():
    shares, sizes = [0.01, 0.04, 0.02], [100, 300, 200]
    found = spread(shares, sizes, 0.5, band=0.08)
    assert found[1] < found[2] < found[0] and max(found) - min(found) == pytest.approx(0.16)
    assert sum(s * n for s, n in zip(found, sizes, strict=True)) / 600 == pytest.approx(0.5)
    assert spread([0.02, 0.02], [1, 1], 0.6, band=0.08) == pytest.approx([0.6, 0.6])
    assert spread(shares, sizes, 0.5, band=0.0) == pytest.approx([0.5] * 3)


def test_a_block_with_large_inputs_keeps_more_and_the_model_has_the_sparsity_asked_for(model, calib):
    found = owl(model, calib, sparsity=0.5, times=2.0, progress=False)
    blocks = find_blocks(model)
    assert set(found) == {f"{b}.{n}" for b, m in blocks.items() for n in linear_shapes(m)}
    first, second = ({found[n] for n in found if n.startswith(f"{block}.")} for block in blocks)
    assert len(first) == len(second) == 1 and abs(min(first) - min(second)) == pytest.approx(0.16, abs=1e-6)
    light, report = wanda(model, calib, sparsity=found, progress=False)
    zeros = sum((~light.get_submodule(r.name).mask()).sum().item() for r in report)
    assert zeros / sum(r.shape[0] * r.shape[1] for r in report) == pytest.approx(0.5, abs=0.03)


def test_what_cannot_be_is_refused(llama, calib):
    with pytest.raises(ValueError, match="owl needs batches"):
        owl(llama, [], progress=False)
    for sparsity in (0.05, 0.9):
        with pytest.raises(ValueError, match="narrow the band"):
            owl(llama, calib, sparsity=sparsity, progress=False)


def test_the_scan_spends_zeros_where_they_hurt_least(model, calib):
    found = sensitive(model, calib, sparsity=0.5, levels=(0.25, 0.5, 0.75), progress=False)
    assert set(found) == {f"{b}.{n}" for b, m in find_blocks(model).items() for n in linear_shapes(m)}
    light, report = wanda(model, calib, sparsity=found, progress=False)
    zeros = sum((~light.get_submodule(r.name).mask()).sum().item() for r in report)
    # from above: what is left of the budget no layer could use
    assert 0.5 <= zeros / sum(r.shape[0] * r.shape[1] for r in report) < 0.56


def test_the_scan_leaves_the_weights_of_the_layer_that_matters(llama, calib):
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight.mul_(1e-3)
        llama.model.layers[0].mlp.down_proj.weight.mul_(8)
    before = {name: t.clone() for name, t in llama.state_dict().items()}
    found = sensitive(llama, calib, sparsity=0.5, levels=(0.25, 0.5, 0.75), progress=False)
    assert found["model.layers.0.mlp.down_proj"] == 0.25 < found["model.layers.1.mlp.down_proj"] == 0.75
    assert all(torch.equal(t, before[name]) for name, t in llama.state_dict().items())


def test_a_sparsity_beyond_the_levels_is_refused(llama, calib):
    with pytest.raises(ValueError, match=r"sparsity=0.9: the levels reach from 0 to 0.75"):
        sensitive(llama, calib, sparsity=0.9, levels=(0.25, 0.75), progress=False)
    with pytest.raises(ValueError, match="sensitive needs batches"):
        sensitive(llama, [], progress=False)
