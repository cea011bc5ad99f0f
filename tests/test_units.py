"""Units: what is masked and what is cut give the same, on every family; what is left saves and loads."""

import copy

import pytest
import torch

from lightlib import load, save
from lightlib.cost import flops, size
from lightlib.decode import generate, lean_path
from lightlib.decoder import find_blocks, linear_shapes, roles, use_linear_everywhere
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from lightlib.units import WHOLE, cut_units, keep_units, members, scale_units, unit_counts, unit_weights
from tests.conftest import CONFIGS, random_model


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def some_of_each(model, uneven=True):
    """Half of the units of each block, another half in each; fewer neurons in the first block if uneven."""
    generator, kept = torch.Generator().manual_seed(0), {}
    for i, (name, counts) in enumerate(unit_counts(model).items()):
        kept[name] = {}
        for kind, count in counts.items():
            n = count // 4 if uneven and i == 0 and kind == "neurons" else count // 2
            kept[name][kind] = torch.randperm(count, generator=generator)[:n].sort().values
    return kept


def masks_of(model, kept):
    counts = unit_counts(model)
    return {
        name: {kind: torch.zeros(counts[name][kind]).index_fill(0, index, 1) for kind, index in kinds.items()}
        for name, kinds in kept.items()
    }


def test_every_row_and_column_belongs_to_one_unit_on_every_family(model):
    names = roles(model)
    for block in find_blocks(model).values():
        found = members(model, block)
        assert [m.linear for m in found["heads"]] == [*names.attention]
        assert [m.linear for m in found["neurons"]] == [*names.mlp]
        for parts in found.values():
            assert len({len(m.index) for m in parts}) == 1
            for m in parts:
                lines = linear_shapes(block)[m.linear][m.dim]
                assert torch.equal(m.index.flatten().sort().values, torch.arange(lines))


def test_units_that_are_masked_and_units_that_are_cut_give_the_same(model, calib):
    model = use_linear_everywhere(model)
    kept, expected = some_of_each(model), logits(model, calib[0])
    masked = scale_units(copy.deepcopy(model), masks_of(model, kept))
    light = copy.deepcopy(model)
    rows = keep_units(light, kept, "some")
    torch.testing.assert_close(logits(light, calib[0]), logits(masked, calib[0]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(light, calib[0]), expected, rtol=1e-3, atol=1e-3)
    assert size(light).parameters < size(model).parameters
    gone = sum(
        (counts[kind] - len(kept[name][kind])) * unit_weights(model, name)[kind]
        for name, counts in unit_counts(model).items()
        for kind in counts
    )
    assert size(model).parameters - size(light).parameters == gone
    assert all(0 < row.error < 1 and row.bits_after < row.bits_before for row in rows)


@pytest.mark.parametrize("uneven", [True, False])
def test_it_round_trips_and_generates_with_its_cache(model, calib, tmp_path, uneven):
    light = use_linear_everywhere(model)
    keep_units(light, some_of_each(light, uneven), "some")
    again = load(save(light, tmp_path / "light"))
    assert torch.equal(logits(again, calib[0]), logits(light, calib[0]))
    ids, knobs = calib[0][:1, :8], dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(light.generate(ids, **knobs), light.generate(ids, use_cache=False, **knobs))


def test_even_blocks_are_a_plain_model_and_uneven_ones_are_refused_by_plain_transformers(llama, tmp_path):
    from transformers import AutoModelForCausalLM

    even, uneven = copy.deepcopy(llama), copy.deepcopy(llama)
    keep_units(even, some_of_each(even, uneven=False), "some")
    keep_units(uneven, some_of_each(uneven), "some")
    assert even.config.intermediate_size == 32 and even.config.num_key_value_heads == 1
    assert (even.config.num_attention_heads, even.config.head_dim) == (2, 8)
    plain = AutoModelForCausalLM.from_pretrained(save(even, tmp_path / "even"))
    ids = torch.arange(12)[None]
    assert torch.equal(logits(plain, ids), logits(even, ids))
    with pytest.raises(ValueError, match="lightlib"):
        AutoModelForCausalLM.from_pretrained(save(uneven, tmp_path / "uneven"))
    assert uneven.config.intermediate_size == 64


def test_gpt2_is_never_written_as_plain_since_its_layers_are_turned(tmp_path):
    light = use_linear_everywhere(random_model("gpt2"))
    keep_units(light, {name: {"neurons": torch.arange(64)} for name in find_blocks(light)}, "some")
    ids = torch.arange(12)[None]
    assert torch.equal(logits(load(save(light, tmp_path / "light")), ids), logits(light, ids))


def test_what_was_pruned_twice_or_rounded_then_still_loads(llama, calib, tmp_path):
    keep_units(llama, some_of_each(llama), "first")
    kept = {name: {"neurons": torch.arange(8)} for name in find_blocks(llama)}
    keep_units(llama, kept, "second")
    light = rtn(llama, None, grid=Int(8), progress=False).model
    again = load(save(light, tmp_path / "light"))
    assert torch.equal(logits(again, calib[0]), logits(light, calib[0]))


def test_flops_count_the_heads_that_are_left(llama):
    before = flops(llama, 16).decode_per_token
    keep_units(llama, some_of_each(llama), "some")
    blocks = find_blocks(llama).values()
    weights = sum(p.numel() for block in blocks for p in block.parameters() if p.dim() == 2)
    width = sum(block.self_attn.o_proj.in_features for block in blocks)
    assert flops(llama, 16).decode_per_token == 2 * weights + 4 * 16 * width + 2 * 32 * 96 < before


def test_the_compiled_step_decodes_a_pruned_model(llama, calib):
    keep_units(llama, some_of_each(llama), "some")
    ids = calib[0][:1, :8]
    assert torch.equal(generate(llama, ids, 5), generate(llama, ids, 5, compile=False))
    assert lean_path(llama) == ("lean", "")


def test_nothing_kept_and_packed_layers_are_refused(llama):
    name = next(iter(find_blocks(llama)))
    with pytest.raises(ValueError, match=f"{name}: none of its 64 neurons would stay; keep one"):
        keep_units(llama, {name: {"neurons": torch.arange(0)}}, "none")
    light = rtn(llama, None, grid=Int(8), progress=False).model
    with pytest.raises(ValueError, match="gate_proj is packed"):
        next(cut_units(light, {name: {"neurons": torch.arange(4)}}))


RMS = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text"]
SOME = torch.tensor([0, 1, 3, 4, 5, 8, 9, 11, 12, 13, 17, 20, 21, 22, 24, 25, 27, 28, 30, 31])


@torch.no_grad()
def silence(model, channels):
    """Let nothing write to these channels of the stream. In place."""
    names = roles(model)
    post = {names.attention_post, names.mlp_post} - {None}
    for block in find_blocks(model).values():
        for name in (names.attention_out, names.mlp_out):
            part = block.get_submodule(name)
            for weight in part.parameters():
                weight[channels] = 0
        for name in post:
            norm = block.get_submodule(name)
            norm.weight[channels] = -names.norm_offset
    model.get_input_embeddings().weight[:, channels] = 0
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", RMS)
def test_channels_that_nothing_writes_and_channels_that_are_cut_give_the_same(family, tied, calib, tmp_path):
    from transformers import AutoModelForCausalLM

    model = random_model(family, tied=tied)
    gone = torch.tensor([i for i in range(32) if i not in SOME.tolist()])
    masked, light = silence(copy.deepcopy(model), gone), copy.deepcopy(model)
    rows = keep_units(light, {WHOLE: {"channels": SOME}}, "some")
    torch.testing.assert_close(logits(light, calib[0]), logits(masked, calib[0]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(light, calib[0]), logits(model, calib[0]), rtol=1e-3, atol=1e-3)
    left = size(model).parameters - 12 * unit_weights(model, WHOLE)["channels"]
    assert size(light).parameters == left and all(0 < row.error < 1 for row in rows)
    # equal in all blocks, so it is a plain model
    plain = AutoModelForCausalLM.from_pretrained(save(light, tmp_path / "light"))
    assert torch.equal(logits(plain, calib[0]), logits(light, calib[0]))
    ids, knobs = calib[0][:1, :8], dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(light.generate(ids, **knobs), light.generate(ids, use_cache=False, **knobs))


def test_channels_go_from_a_model_of_uneven_blocks_too(llama, calib, tmp_path):
    keep_units(llama, some_of_each(llama), "first")
    keep_units(llama, {WHOLE: {"channels": SOME}}, "second")
    again = load(save(llama, tmp_path / "light"))
    assert again.config.hidden_size == 20
    assert torch.equal(logits(again, calib[0]), logits(llama, calib[0]))
    assert torch.equal(
        generate(llama, calib[0][:1, :8], 5), generate(llama, calib[0][:1, :8], 5, compile=False)
    )


@pytest.mark.parametrize("family", [name for name in CONFIGS if name not in RMS])
def test_a_layernorm_lets_no_channel_go_alone(family):
    model = use_linear_everywhere(random_model(family))
    with pytest.raises(
        ValueError, match="its LayerNorm reads channels together, so none goes alone; slicegpt"
    ):
        keep_units(model, {WHOLE: {"channels": SOME}}, "some")
