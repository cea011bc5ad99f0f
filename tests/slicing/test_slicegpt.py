"""SliceGPT: what changes nothing, what is cut and how much, and that what is left works like any model."""

import copy

import pytest
import torch

from lightlib import load, save
from lightlib.compact import compact_layers
from lightlib.cost import flops, size
from lightlib.decode import generate, lean_path
from lightlib.decoder import cast, find_blocks, linear_shapes, parameters_by_part
from lightlib.quantization.gptq import gptq
from lightlib.quantization.grid import Int
from lightlib.recipe import compress
from lightlib.shortcut import LowRankShortcut, Shortcut
from lightlib.slicing.invariance import UnitNorm, fold_norms
from lightlib.slicing.principal import kept_width, nearest_basis, principal_directions
from lightlib.slicing.slicegpt import slicegpt, spectra
from lightlib.slicing.stream import open_stream, places, turn


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def sliced(model, calib, **knobs):
    return slicegpt(model, calib, progress=False, **knobs).model


# the algorithm
def test_principal_directions_are_those_along_which_most_lies():
    X = torch.randn(50, 6, dtype=torch.float64) * torch.tensor([5.0, 1, 3, 0.1, 2, 0])
    Q, shares = principal_directions(X.T @ X)
    torch.testing.assert_close(Q.T @ Q, torch.eye(6, dtype=torch.float64))
    along = (X @ Q).square().sum(0)
    torch.testing.assert_close(along / along.sum(), shares)
    assert (shares.diff() <= 0).all() and shares[-1] == 0
    # no other two directions hold more than the first two
    for _ in range(20):
        other = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64))[0]
        assert (X @ other).square().sum() <= along[:2].sum()


@pytest.mark.parametrize(
    ("fraction", "round_to", "kept"),
    [(0.25, 8, 432), (0.3, 8, 400), (0.3, 1, 403), (0.0, 8, 576), (0.999, 8, 8)],
)
def test_widths_are_rounded_down_to_multiples(fraction, round_to, kept):
    assert kept_width(torch.ones(576) / 576, fraction, round_to) == kept


def test_a_width_by_variance_is_the_least_that_holds_it():
    shares = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.03, 0.01]).double()
    assert [kept_width(shares, 0.25, 1, v) for v in (0.4, 0.5001, 0.9, 0.95, 1.0)] == [1, 2, 3, 4, 6]
    assert kept_width(shares, 0.25, 4, 0.9) == 4 and kept_width(shares, 0.25, 4, 0.97) == 6


# what changes nothing
def test_folded_norms_change_no_output_on_any_family(model, calib):
    folded = fold_norms(copy.deepcopy(model))
    torch.testing.assert_close(logits(folded, calib[0]), logits(model, calib[0]), rtol=1e-4, atol=1e-5)
    blocks = find_blocks(folded).values()
    assert all(sum(isinstance(m, UnitNorm) for m in block.modules()) in (1, 2) for block in blocks)


def test_a_random_rotation_at_every_place_changes_no_output_on_any_family(model, calib):
    expected = logits(model, calib[0])
    opened = open_stream(copy.deepcopy(model))
    generator = torch.Generator().manual_seed(0)
    for place in places(opened):
        Q = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64, generator=generator))[0]
        turn(opened, place, Q)
    got = logits(opened, calib[0])
    assert (got - expected).norm() <= 1e-4 * expected.norm()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("knobs", [{}, {"rotations": "block"}, {"signal": "normed"}, {"slice_head": True}])
def test_nothing_cut_changes_no_output(model, calib, knobs):
    expected = logits(model, calib[0])
    got = logits(sliced(model, calib, slice_fraction=0.0, **knobs), calib[0])
    assert (got - expected).norm() <= 1e-4 * expected.norm()


def test_directions_that_the_stream_never_takes_cost_nothing(llama, calib):
    # the stream lies in 16 of 32 dimensions: half of them can go
    for name, part in llama.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            part.data[16:] = 0
    llama.model.embed_tokens.weight.data[:, 16:] = 0
    expected = logits(llama, calib[0])
    light = sliced(llama, calib, slice_fraction=0.5)
    torch.testing.assert_close(logits(light, calib[0]), expected, rtol=1e-4, atol=1e-5)
    assert light.model.layers[0].self_attn.q_proj.in_features == 16


# what is cut
def test_every_weight_gets_smaller_by_what_its_place_keeps(llama, calib):
    light, report = slicegpt(llama, calib, slice_fraction=[0.5, 0.25, 0.25, 0.0], progress=False)
    shapes = {name.removeprefix("model.layers."): shape for name, shape in linear_shapes(light).items()}
    assert shapes["0.self_attn.q_proj"] == (32, 16) and shapes["0.self_attn.o_proj"] == (24, 32)
    assert shapes["0.mlp.up_proj"] == (64, 24) and shapes["0.mlp.down_proj"] == (24, 64)
    shortcuts = {name: part for name, part in light.named_modules() if isinstance(part, Shortcut)}
    weights = [tuple(part.weight.shape) for part in shortcuts.values()]
    # from 16 to 24 directions 8 are apart, from 24 to 24 as many; where all are there, none is
    assert weights == [(16, 8), (24, 8), (24, 0), (32, 0)]
    assert shapes["0.attention_shortcut"] == (16, 16) and shapes["1.mlp_shortcut"] == (0, 32)
    assert shapes["1.self_attn.o_proj"] == (32, 32)
    assert light.model.embed_tokens.weight.shape == (96, 16) and light.lm_head.weight.shape == (96, 32)
    rows = {row.name: row for row in report}
    assert sum(row.bits_after for row in report) == 32 * size(light).parameters
    assert rows["lm_head"].bits_before == 0 or not llama.config.tie_word_embeddings
    assert rows["model.layers.0.self_attn.q_proj"].notes.startswith("16 of 32 directions, ")
    assert 0 < rows["model.layers.0.self_attn.q_proj"].error < 1


def test_a_sliced_head_reads_a_sliced_stream(llama, calib):
    light = sliced(llama, calib, slice_fraction=0.25, slice_head=True)
    assert light.model.layers[1].mlp_shortcut.weight.shape == (24, 8)
    assert light.lm_head.in_features == 24 and light.model.layers[1].mlp.down_proj.out_features == 24


def test_one_rotation_a_block_saves_the_attentions_shortcuts(llama, calib):
    each, one = sliced(llama, calib), sliced(llama, calib, rotations="block")
    names = {name for name, _ in one.named_parameters()}
    assert not any("attention_shortcut" in name for name in names)
    saved = size(each).parameters - size(one).parameters
    assert saved == 2 * 24 * 8


def test_shortcuts_are_counted_for_what_they_are(llama, calib):
    light = sliced(llama, calib)
    parts, flop = parameters_by_part(light), flops(light, 16)
    # three from 24 to 24 directions, of which 8 are apart; none is from 24 to all 32
    assert parts["shortcuts"] == 3 * 24 * 8 and parts["norms"] == 0
    assert sum(parts.values()) == size(light).parameters
    rest = flops(llama, 16).decode_per_token - flop.decode_per_token
    blocks = sum(p.numel() for n, p in llama.named_parameters() if "proj" in n)
    kept = sum(p.numel() for n, p in light.named_parameters() if "proj" in n)
    assert rest == 2 * (blocks - kept - 2 * parts["shortcuts"])  # each is multiplied by twice


def test_full_shortcuts_are_counted_as_in_the_paper(llama, calib):
    light = sliced(llama, calib, shortcuts="full")
    # three from 24 to 24 directions, and the last one to all 32
    assert parameters_by_part(light)["shortcuts"] == 3 * 24 * 24 + 24 * 32
    each = flops(light, 16).decode_per_token - flops(sliced(llama, calib), 16).decode_per_token
    assert each == 2 * (3 * 24 * (24 - 2 * 8) + 24 * 32)


# shortcuts of low rank
@pytest.mark.parametrize(("k1", "k2"), [(6, 6), (5, 7), (6, 8), (3, 3), (8, 8)])
def test_the_nearest_basis_spans_the_same_and_leaves_a_difference_of_low_rank(k1, k2):
    generator = torch.Generator().manual_seed(k1)
    Q1, Q2 = (
        torch.linalg.qr(torch.randn(8, k, dtype=torch.float64, generator=generator))[0] for k in (k1, k2)
    )
    Q, B = nearest_basis(Q1, Q2)
    torch.testing.assert_close(Q.T @ Q, torch.eye(k2, dtype=torch.float64))
    torch.testing.assert_close(Q @ Q.T, Q2 @ Q2.T)
    assert B.shape == (k1, min(k1, 8 - k2))
    near = torch.cat((torch.eye(k1).double() - B @ B.T, torch.zeros(k1, k2 - k1).double()), 1)
    torch.testing.assert_close(Q1.T @ Q, near)
    # no other basis of that span is nearer
    for _ in range(20):
        R = torch.linalg.qr(torch.randn(k2, k2, dtype=torch.float64, generator=generator))[0]
        assert (Q2 @ R)[:, :k1].sub(Q1).norm() >= Q[:, :k1].sub(Q1).norm() - 1e-12


@pytest.mark.parametrize("knobs", [{}, {"rotations": "block"}, {"slice_head": True}])
def test_shortcuts_of_low_rank_change_no_output_on_any_family(model, calib, knobs):
    full, low = (sliced(model, calib, shortcuts=kind, **knobs) for kind in ("full", "low_rank"))
    expected = logits(full, calib[0])
    assert (logits(low, calib[0]) - expected).norm() <= 1e-4 * expected.norm()
    assert size(low).parameters < size(full).parameters


@pytest.mark.parametrize(("fraction", "pays"), [(0.25, True), (0.375, False)])
def test_shortcuts_are_of_low_rank_below_a_third_where_that_takes_less_products(llama, calib, fraction, pays):
    light = sliced(llama, calib, slice_fraction=fraction, slice_head=True)
    kinds = {type(part) for part in light.modules() if isinstance(part, Shortcut)}
    assert kinds == {LowRankShortcut if pays else Shortcut}


def test_the_compiled_step_decodes_a_sliced_model(llama, calib):
    light, ids = sliced(llama, calib), calib[0][:1, :8]
    assert torch.equal(generate(light, ids, 5), generate(light, ids, 5, compile=False))
    assert lean_path(light) == ("lean", "")


def test_variance_decides_each_width(llama, calib):
    light, report = slicegpt(llama, calib, explained_variance=0.9, round_to=1, progress=False)
    held = [float(row.notes.split()[-3].rstrip("%,")) for row in report if row.name.endswith("q_proj")]
    assert all(90 <= share < 100 for share in held)
    widths = light.structure[0][1]["widths"]
    assert len(set(widths[:-1])) > 1 and len(widths) == 5 and widths[-1] == 32


def test_a_stream_in_use_loses_more_the_more_is_cut(llama, calib):
    expected, lost = logits(llama, calib[0]), []
    for fraction in (0.0, 0.25, 0.5, 0.75):
        light = sliced(llama, calib, slice_fraction=fraction)
        lost.append((logits(light, calib[0]) - expected).norm().item())
    assert lost == sorted(lost) and lost[1] > 100 * lost[0]


def test_spectra_are_those_of_the_stream_in_front_of_each_norm(model, calib):
    from lightlib.decoder import is_parallel

    found = spectra(model, calib, progress=False)
    assert len(found) == (3 if is_parallel(model) else 5)
    entered = {}
    # a LayerNorm reads the stream without its mean
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: entered.setdefault(name, []).append(args[0].flatten(0, -2).double())
        )
        for name in found
    ]
    for ids in calib:
        logits(model, ids)
    for hook in hooks:
        hook.remove()
    for name, shares in found.items():
        X = torch.cat(entered[name])
        if isinstance(model.get_submodule(name), torch.nn.LayerNorm):
            X = X - X.mean(1, keepdim=True)
        torch.testing.assert_close(principal_directions(X.T @ X)[1], shares, rtol=1e-3, atol=1e-6)


# like any model
@pytest.mark.parametrize("knobs", [{}, {"rotations": "block", "slice_head": True}])
def test_a_sliced_model_round_trips_and_generates_with_its_cache(model, calib, tmp_path, knobs):
    light = sliced(model, calib, **knobs)
    again = load(save(light, tmp_path / "light"))
    assert torch.equal(logits(again, calib[0]), logits(light, calib[0]))
    assert size(again).stored_bytes == size(light).stored_bytes
    once_more = load(save(again, tmp_path / "again"))
    assert torch.equal(logits(once_more, calib[0]), logits(light, calib[0]))
    ids = calib[0][:1, :8]
    new = light.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0)
    plain = light.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(new, plain) and new.shape[1] > 8


def test_plain_transformers_refuses_it(llama, calib, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = save(sliced(llama, calib), tmp_path / "light")
    with pytest.raises((ValueError, KeyError), match="lightlib"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_sliced_then_rounded(model, calib, tmp_path):
    def slicing(model, batches, **knobs):
        return slicegpt(model, batches, slice_fraction=0.5, progress=False, **knobs)

    def rounding(model, batches, **knobs):
        return gptq(model, batches, grid=Int(4, 16), damping=0.1, progress=False, **knobs)

    light = compress(model, [slicing, rounding], calib).model
    layers = compact_layers(light)
    assert layers and not any("shortcut" in name or "turn" in name for name in layers)
    again = load(save(light, tmp_path / "light"))
    assert torch.equal(logits(again, calib[0]), logits(light, calib[0]))
    assert size(light).stored_bytes < size(sliced(model, calib, slice_fraction=0.5)).stored_bytes


def test_half_precision_stays_half_precision(llama, calib):
    light = sliced(cast(llama, torch.bfloat16), calib)
    assert {p.dtype for p in light.parameters()} == {torch.bfloat16}
    assert logits(light, calib[0]).dtype == torch.bfloat16


# what does not fit
def test_what_does_not_fit_is_refused(llama, calib):
    for knobs, says in (
        ({"slice_fraction": 1.0}, "a number from 0 to below 1"),
        ({"slice_fraction": [0.25, 0.25]}, "one for each of 4 places"),
        ({"rotations": "head"}, "choose one of sublayer, block"),
        ({"signal": "x"}, "choose one of raw, normed"),
    ):
        with pytest.raises(ValueError, match=says):
            slicegpt(llama, calib, progress=False, **knobs)
    with pytest.raises(ValueError, match="needs batches"):
        slicegpt(llama, [], progress=False)


def test_norms_behind_the_sum_are_refused(calib):
    from transformers import AutoModelForCausalLM
    from transformers.models.opt.configuration_opt import OPTConfig

    small = dict(vocab_size=96, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4)
    behind = OPTConfig(hidden_size=32, word_embed_proj_dim=32, do_layer_norm_before=False, **small)
    with pytest.raises(ValueError, match="norms follow the residual sum"):
        slicegpt(AutoModelForCausalLM.from_config(behind), calib, progress=False)
    projected = OPTConfig(hidden_size=32, word_embed_proj_dim=16, **small)
    with pytest.raises(ValueError, match="embedding is projected"):
        slicegpt(AutoModelForCausalLM.from_config(projected), calib, progress=False)
