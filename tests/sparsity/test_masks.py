import pytest
import torch

from lightlib.decoder import find_blocks, linears
from lightlib.sparsity.magnitude import global_sparsities, magnitude
from lightlib.sparsity.masks import keep_largest, mask_of, pattern, sparsity_for
from lightlib.sparsity.sparsegpt import sparsegpt
from lightlib.sparsity.wanda import wanda
from lightlib.sparsity.wrp import wrp

METHODS = (magnitude, wanda, sparsegpt)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_exactly_the_share_asked_for_goes_even_among_equal_scores(sparsity):
    torch.manual_seed(0)
    for scores in (torch.rand(7, 40), torch.zeros(7, 40)):
        assert ((~keep_largest(scores, sparsity)).sum(-1) == int(40 * sparsity)).all()
        assert (~mask_of(scores, sparsity, "layer")).sum() == int(280 * sparsity)


def test_what_goes_is_smaller_than_what_stays():
    torch.manual_seed(0)
    scores = torch.rand(7, 40)
    for mask, rows in ((mask_of(scores, 0.6), range(7)), (mask_of(scores, 0.6, "layer"), [slice(None)])):
        assert all(scores[r][~mask[r]].max() < scores[r][mask[r]].min() for r in rows)


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "3:5", "1:2"])
def test_a_pattern_holds_in_every_group_and_keeps_the_largest(text):
    n, m = pattern(text)
    torch.manual_seed(0)
    scores = torch.rand(6, 2 * m)
    mask = mask_of(scores, text).view(-1, m)
    assert (mask.sum(1) == n).all()
    groups = scores.view(-1, m)
    least, most = groups.masked_fill(~mask, 2).amin(1), groups.masked_fill(mask, -1).amax(1)
    assert (least > most).all()


@pytest.mark.parametrize("text", ["4:2", "0:4", "2", "2:", "a:b", "2:4:8", "4:4"])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(ValueError, match="give a share from 0 to 1, or 'n:m'"):
        sparsity_for(text, "q_proj", 16)


@pytest.mark.parametrize("share", [-0.1, 1.0, 2])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(ValueError, match=r"q_proj: sparsity=.* from 0 to below 1"):
        sparsity_for(share, "q_proj", 16)


@pytest.mark.parametrize("method", METHODS)
def test_a_pattern_that_does_not_divide_a_layer_is_refused_with_its_name(method, model, calib):
    before = [part for part in model.modules()]
    with pytest.raises(
        ValueError, match=r"\.0\..*: in_features 32 is not a multiple of 5, so 2:5 does not fit"
    ):
        method(model, calib, sparsity="2:5", progress=False, inplace=True)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


def test_wrp_refuses_a_pattern_that_does_not_divide(llama, calib):
    with pytest.raises(ValueError, match="in_features 32 is not a multiple of 5"):
        wrp(llama, calib, pattern="2:5", progress=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text", ["2:4", "1:8"])
def test_patterns_hold_in_every_family(method, text, model, calib):
    n, m = pattern(text)
    light, _ = method(model, calib, sparsity=text, progress=False)
    for block in find_blocks(light).values():
        for part in linears(block).values():
            assert part.layouts == (text,)
            assert ((part.dense() != 0).view(-1, m).sum(1) <= n).all()
            assert (part.mask().view(-1, m).sum(1) == n).all()


def test_one_sparsity_a_layer_and_a_layer_without_one_is_named(llama, calib):
    shares = {
        f"{b}.{n}": 0.25 if "down" in n else "2:4" for b, m in find_blocks(llama).items() for n in linears(m)
    }
    light, _ = wanda(llama, calib, sparsity=shares, progress=False)
    down, up = light.model.layers[0].mlp.down_proj, light.model.layers[0].mlp.up_proj
    assert (~down.mask()).float().mean() == 0.25 and up.layouts == ("2:4",)
    del shares["model.layers.1.mlp.up_proj"]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: no sparsity for it"):
        wanda(llama, calib, sparsity=shares, progress=False)


def test_a_global_threshold_takes_from_all_layers_what_lies_below_it(llama):
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight.mul_(0.3)
    shares = global_sparsities(llama, 0.5)
    weights = {name: llama.get_submodule(name).weight for name in shares}
    count = sum(W.numel() for W in weights.values())
    assert sum(shares[n] * W.numel() for n, W in weights.items()) == pytest.approx(0.5 * count, abs=2)
    light, _ = magnitude(llama, sparsity=0.5, scope="global", progress=False)
    kept = {name: light.get_submodule(name).mask() for name in shares}
    assert max(W[~kept[n]].abs().max() for n, W in weights.items() if (~kept[n]).any()) < min(
        W[kept[n]].abs().min() for n, W in weights.items()
    )
    assert shares["model.layers.0.mlp.up_proj"] > 0.8 > max(shares["model.layers.1.mlp.up_proj"], 0.5)
    with pytest.raises(ValueError, match="one share of zeros"):
        magnitude(llama, sparsity="2:4", scope="global", progress=False)


def test_an_unknown_scope_is_refused(llama):
    with pytest.raises(ValueError, match="scope='column': give one of row, layer, global"):
        magnitude(llama, scope="column", progress=False)
