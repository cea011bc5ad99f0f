import pytest
import torch
from torch.testing import assert_close

from lightlib.decoder import find_blocks, linears, use_linear_everywhere
from lightlib.folding import folds
from tests.conftest import random_model

ACTIVATED = {"phi", "gpt2", "gpt_neox"}  # a GELU stands before their last layer


def test_any_scale_leaves_the_logits_as_they_are(family, calib):
    model = use_linear_everywhere(random_model(family))
    with torch.no_grad():
        before = model(calib[0]).logits
        for block in find_blocks(model).values():
            for fold in folds(model):
                n_in = linears(block)[fold.readers[0]].in_features
                scale = fold.tie(torch.rand(n_in) * 4 + 0.25)
                weights = {name: linears(block)[name].weight.clone() for name in fold.readers}
                fold.apply(block, scale)
                assert all(torch.equal(linears(block)[n].weight, w * scale) for n, w in weights.items())
        assert_close(model(calib[0]).logits, before, rtol=1e-4, atol=1e-4)


def test_every_linear_has_a_fold_unless_an_activation_or_interleaved_heads_stand_before_it(family):
    model = use_linear_everywhere(random_model(family))
    folded = [name for fold in folds(model) for name in fold.readers]
    assert len(folded) == len(set(folded))
    missing = set(linears(next(iter(find_blocks(model).values())))) - set(folded)
    assert len(missing) == (family in ACTIVATED) + (family == "gpt_neox")


def test_where_both_branches_read_one_norm_they_share_the_scale():
    fold = folds(random_model("phi"))[0]
    assert fold.readers == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")


def test_query_heads_of_one_value_head_share_the_mean_of_their_logarithms(llama):
    fold = next(f for f in folds(llama) if f.source.endswith("v_proj"))
    assert fold.heads == (2, 2) and fold.rows == 16  # 2 value heads of 8 channels, each read by 2 query heads
    scale = fold.tie(torch.cat([torch.full((8,), v) for v in (1.0, 4.0, 9.0, 1.0)]))
    assert_close(scale, torch.cat([torch.full((8,), v) for v in (2.0, 2.0, 3.0, 3.0)]))
    assert_close(fold.tie(scale), scale)


@pytest.mark.parametrize(
    ("setting", "lost"), [({"activation_function": "gelu"}, 1), ({"do_layer_norm_before": False}, 2)]
)
def test_an_opt_of_another_kind_folds_only_where_it_is_exact(setting, lost):
    model = random_model("opt")
    whole = len(folds(model))
    vars(model.config).update(setting)
    assert len(folds(model)) == whole - lost
