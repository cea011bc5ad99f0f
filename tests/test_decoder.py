import copy

import pytest
import torch
from torch import nn

from lightlib.decoder import (
    cast,
    check_sharing,
    find_blocks,
    linears,
    parameters_by_part,
    roles,
    turning_channels,
    untie_head,
    use_linear_everywhere,
)
from tests.conftest import random_model


def test_every_role_names_a_part_and_every_linear_has_a_role(model):
    use_linear_everywhere(model)
    names = roles(model)
    assert model.get_submodule(names.embedding) is model.get_input_embeddings()
    assert "norm" in type(model.get_submodule(names.final_norm)).__name__.lower()
    for block in find_blocks(model).values():
        assert set(linears(block)) == {*names.attention, *names.mlp}
        for norm in (names.attention_norm, names.mlp_norm):
            assert "norm" in type(block.get_submodule(norm)).__name__.lower()


def test_rope_turns_whole_heads_or_half_of_them_and_a_norm_stands_in_its_way(model):
    wanted = {"phi": 4, "qwen3": None, "gemma3_text": None}
    family = model.config.model_type
    if family in ("opt", "gpt2", "gpt_neox"):
        with pytest.raises(ValueError, match=f"'{family}': its attention .* one key and one value head"):
            check_sharing(model)
        return
    check_sharing(model)
    for block in find_blocks(model).values():
        assert turning_channels(model, block) == wanted.get(family, 8)


def test_linear_everywhere_changes_no_output(calib):
    model = random_model("gpt2")
    with torch.no_grad():
        before = model(calib[0]).logits
        after = use_linear_everywhere(model)(calib[0]).logits
    torch.testing.assert_close(after, before)
    assert isinstance(model.transformer.h[0].attn.c_attn, nn.Linear)
    assert model.transformer.h[0].attn.c_attn.weight.shape == (96, 32)


def test_untying_the_head_changes_no_output_and_frees_the_head(model, calib):
    with torch.no_grad():
        before = model(calib[0]).logits
        untie_head(model)
        assert torch.equal(model(calib[0]).logits, before)
        model.get_output_embeddings().weight.zero_()
        assert model.get_input_embeddings().weight.abs().sum() > 0


def test_parts_add_up_to_the_whole(model):
    parts = parameters_by_part(model)
    assert sum(parts.values()) == model.num_parameters()
    assert all(parts[key] > 0 for key in ("embedding", "attention", "mlp", "norms"))
    assert (parts["head"] == 0) == bool(model.config.tie_word_embeddings)


def test_cast_keeps_rotary_frequencies():
    model = random_model("llama")
    before = model.model.rotary_emb.inv_freq.clone()
    rounded = copy.deepcopy(model).to(torch.bfloat16).model.rotary_emb.inv_freq.float()
    cast(model, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    assert not torch.equal(rounded, before)


def test_cast_keeps_tied_weights_tied():
    model = cast(random_model("gemma"), torch.bfloat16)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_what_is_no_known_decoder_is_refused_by_name():
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        LlamaConfig,
        LlamaModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    bert = BertForMaskedLM(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=30)
    )
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=30)
    )
    for model, name in ((bert, "bert"), (t5, "t5"), (nn.Linear(2, 2), "Linear")):
        with pytest.raises(
            ValueError, match=f"'{name}' is not a decoder that lightlib knows.*llama.*gpt_neox"
        ):
            find_blocks(model)
    headless = LlamaModel(
        LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=30)
    )
    with pytest.raises(ValueError, match="LlamaModel has no language model head"):
        find_blocks(headless)
