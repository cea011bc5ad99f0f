"""Attention of our own: the model's own where nothing is asked of it, and gone when the `with` ends."""

import pytest
import torch
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightlib.attention.interface import attend
from lightlib.attention.policies import H2O
from lightlib.units import keep_units
from tests.conftest import CONFIGS

IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))


def window(n):
    return lambda batch, head, query, key: query - key < n


@torch.no_grad()
def test_without_a_pattern_it_is_the_models_own_attention(model):
    own = model(IDS).logits
    padded = torch.ones_like(IDS)
    padded[0, :5] = 0
    own_padded = model(IDS, attention_mask=padded).logits
    for settings in ({}, {"pattern": window(24)}, {"score": lambda seen: None}):
        with attend(model, **settings):
            torch.testing.assert_close(model(IDS).logits, own, rtol=0, atol=1e-6)
            torch.testing.assert_close(
                model(IDS, attention_mask=padded).logits[:, 5:], own_padded[:, 5:], rtol=0, atol=1e-6
            )


@torch.no_grad()
def test_a_window_equals_a_model_that_has_one(model):
    """A 4D mask given to the model is the reference; with a cache, in chunks, it is the same. Where the model
    has a window, that is wider."""
    gap = torch.arange(24)[:, None] - torch.arange(24)
    mask = torch.where((gap >= 0) & (gap < 6), 0.0, torch.finfo(torch.float32).min)[None, None]
    model.set_attn_implementation("eager")
    places = torch.arange(24).expand(2, -1)  # OPT would count them by a 2D mask
    reference = model(IDS, attention_mask=mask.expand(2, 1, -1, -1), position_ids=places).logits
    with attend(model, pattern=window(6)):
        torch.testing.assert_close(model(IDS).logits, reference, rtol=0, atol=1e-5)
        cache = DynamicCache(config=model.config)
        chunks = [model(part, past_key_values=cache).logits for part in IDS.split([15, 1, 8], 1)]
    torch.testing.assert_close(torch.cat(chunks, 1), reference, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_pattern_may_tell_heads_rows_and_blocks_apart(llama):
    own = llama(IDS).logits
    everything = window(24)

    def first_row_only(batch, head, query, key):
        return (query - key < 3) | (batch > 0)

    with attend(llama, pattern=first_row_only):
        narrowed = llama(IDS).logits
    assert not torch.allclose(narrowed[0], own[0]) and torch.allclose(narrowed[1], own[1], atol=1e-6)

    outputs = {}

    def heads(batch, head, query, key):
        return (query - key < 3) | (head > 0)

    hook = llama.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: outputs.setdefault("heads", []).append(args[0].view(2, 24, 4, -1))
    )
    llama(IDS)
    with attend(llama, pattern=[heads, None]):
        llama(IDS)
    hook.remove()
    full, part = outputs["heads"]
    assert not torch.allclose(full[:, :, 0], part[:, :, 0])
    torch.testing.assert_close(full[:, :, 1:], part[:, :, 1:])
    with attend(llama, pattern=[None, everything]):
        torch.testing.assert_close(llama(IDS).logits, own)


@torch.no_grad()
def test_watched_weights_are_those_of_eager_attention(model):
    model.set_attn_implementation("eager")
    eager, seen = model(IDS, output_attentions=True).attentions, {}
    with attend(model, score=lambda call: seen.update({call.block: call.weights()})):
        model(IDS)
    assert len(seen) == len(eager) == 2
    for block, weights in enumerate(eager):
        torch.testing.assert_close(seen[block], weights, rtol=0, atol=1e-6)
        torch.testing.assert_close(seen[block].sum(-1), torch.ones(2, 4, 24))


def test_everything_is_as_it_was_after_the_end_and_after_an_error(model):
    before = model.config._attn_implementation
    names = set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS)
    with torch.no_grad():
        own = model(IDS).logits
        broken = attend(model, pattern=lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), broken:
            model(IDS)
        assert torch.equal(model(IDS).logits, own)
    assert model.config._attn_implementation == before
    assert names == (set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS))


@torch.no_grad()
def test_two_models_and_nested_uses_keep_apart(llama):
    own = llama(IDS).logits
    with attend(llama, pattern=window(3)):
        narrow = llama(IDS).logits
        with attend(llama, pattern=window(24)):
            torch.testing.assert_close(llama(IDS).logits, own)
        assert torch.equal(llama(IDS).logits, narrow)
    assert torch.equal(llama(IDS).logits, own)


@torch.no_grad()
def test_blocks_with_a_config_of_their_own_are_reached_too():
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    phi3 = AutoModelForCausalLM.from_config(CONFIGS["phi3"]()).eval()
    keep_units(phi3, {"model.layers.0": {"heads": torch.tensor([1])}}, "test")
    calls = []
    with attend(phi3, score=lambda seen: calls.append(seen.block)):
        phi3(IDS)
    assert calls == [0, 1]
    with attend(phi3, score=H2O(), keep=6) as cache:
        phi3(IDS, past_key_values=cache)
    assert [layer.keys.shape[1:3] for layer in cache.layers] == [(1, 6), (2, 6)]


def test_gradients_pass_through(llama):
    with attend(llama, pattern=window(5)):
        llama(IDS, labels=IDS).loss.backward()
    assert llama.model.layers[0].self_attn.q_proj.weight.grad.norm() > 0
