import pytest
import torch
from torch.testing import assert_close
from transformers.cache_utils import DynamicCache

from lightlib.attention.kv_codes import ALONG, Rounding, dequantize, quantize
from lightlib.attention.kv_quantization import PackedLayer, layer_bytes, quantized
from lightlib.attention.open_cache import full
from tests.conftest import VOCABULARY, random_model


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(bits=4, group_size=8, residual=8, keys="channel"):
    return PackedLayer(Rounding(bits, group_size, keys), Rounding(bits, group_size, "token"), residual)


def fed(cache_layer, keys, values, *sizes):
    """The layer after these keys and values have come in parts of these sizes."""
    for k, v in zip(keys.split(sizes, 2), values.split(sizes, 2), strict=True):
        cache_layer.update(k, v)
    return cache_layer


def held(cache_layer):
    """All keys and values that the layer would give the next call."""
    nothing = cache_layer.keys[:, :, :0]
    return cache_layer.update(nothing, nothing)


def ids_of(batch, length, seed=2):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, cache, *sizes):
    parts = [model(part, past_key_values=cache).logits for part in ids.split(sizes, 1)]
    return torch.cat(parts, 1)


# codes
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("per", ALONG)
def test_no_number_is_off_by_more_than_half_a_scale(bits, per):
    x = normal(2, 3, 16, 24).half().float()
    codes, scale, minimum = quantize(x, bits, ALONG[per])
    assert codes.max() == 2**bits - 1 and codes.dtype == torch.uint8
    error = (dequantize(codes, scale, minimum) - x).abs()
    assert (error <= scale.float() * (0.5 + 2**bits * 2**-11)).all()  # the scale itself is rounded to 11 bits


def test_numbers_that_are_all_the_same_come_back_exactly():
    constant = normal(1, 2, 1, 6).bfloat16().expand(1, 2, 16, 6)
    for bits in (1, 4, 8):
        assert torch.equal(dequantize(*quantize(constant, bits, -2)), constant.float())


def test_numbers_on_the_grid_come_back_exactly():
    x = torch.arange(16.0).view(1, 1, 16, 1) * 0.25 - 3
    assert torch.equal(dequantize(*quantize(x, 4, -2)), x)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("per", ALONG)
@pytest.mark.parametrize("head_dim", [8, 24, 80])
def test_packed_codes_decode_to_the_rounded_numbers(bits, per, head_dim):
    x, rounding = normal(2, 3, 64, head_dim), Rounding(bits, 32, per)
    packed = rounding.encode(x)
    shared = rounding.channels(head_dim)
    groups = x.view(2, 3, 2, 32, head_dim) if per == "channel" else x.view(2, 3, 64, -1, shared)
    wanted = dequantize(*quantize(groups, bits, ALONG[per])).view_as(x)
    assert torch.equal(rounding.decode(packed, torch.float32), wanted)
    assert sum(t.nbytes for t in vars(packed).values()) == 2 * 3 * 2 * rounding.group_bytes(head_dim)


def test_an_outlier_channel_harms_keys_rounded_per_token_and_not_per_channel():
    keys = normal(1, 2, 32, 16)
    keys[..., 5] = 30 + keys[..., 5]

    def error(per):
        rounding = Rounding(4, 32, per)
        return (rounding.decode(rounding.encode(keys), torch.float32) - keys).square().mean().sqrt()

    assert error("token") > 5 * error("channel")


# a block's cache
def test_tokens_are_packed_by_groups_once_the_residual_is_full():
    one = layer(group_size=8, residual=8)
    counts = []
    for step in range(26):
        one.update(normal(1, 2, 1, 6, seed=step), normal(1, 2, 1, 6, seed=step))
        counts.append(one.packed_tokens)
    assert counts == [0] * 15 + [8] * 8 + [16] * 3
    assert one.get_seq_length() == 26 and one.keys.shape[2] == 10
    assert one.get_mask_sizes(5) == (31, 0)


@pytest.mark.parametrize("sizes", [(40,), (13, 27), (3, 9, 1, 17, 10), (1,) * 40, (39, 1)])
def test_how_tokens_come_does_not_change_what_is_held(sizes):
    keys, values = normal(2, 3, 40, 6), normal(2, 3, 40, 6, seed=1)
    whole, parts = fed(layer(), keys, values, 40), fed(layer(), keys, values, *sizes)
    assert whole.packed_tokens == parts.packed_tokens == 32
    for ours, theirs in zip(held(parts), held(whole), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(parts.packed, whole.packed, strict=True):
        assert torch.equal(ours.codes, theirs.codes)


def test_the_recent_are_as_they_were_and_the_older_are_near():
    keys, values = normal(2, 3, 40, 6), normal(2, 3, 40, 6, seed=1)
    one = layer(bits=8)
    given = one.update(keys, values)
    assert torch.equal(given[0], keys) and torch.equal(given[1], values)  # the call itself sees no rounding
    for ours, theirs in zip(held(one), (keys, values), strict=True):
        assert torch.equal(ours[:, :, 32:], theirs[:, :, 32:])
        assert not torch.equal(ours, theirs)
        assert_close(ours, theirs, atol=0.02, rtol=0)


def test_fewer_bits_err_more():
    keys = normal(2, 3, 40, 6)
    errors = [(held(fed(layer(bits), keys, keys, 40))[0] - keys).norm().item() for bits in range(8, 0, -1)]
    assert errors == sorted(errors) and errors[0] < 0.02 * errors[-1]


@pytest.mark.parametrize(
    ("change", "index"),
    [
        (lambda one: one.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda one: one.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda one: one.batch_select_indices(torch.tensor([1])), [1]),
    ],
)
def test_rows_of_the_batch_are_moved_with_all_they_hold(change, index):
    keys, values = normal(3, 2, 31, 6), normal(3, 2, 31, 6, seed=1)
    one = fed(layer(), keys, values, 31)
    change(one)
    other = fed(layer(), keys[index], values[index], 31)
    assert one.packed_tokens == 16
    for ours, theirs in zip(held(one), held(other), strict=True):
        assert torch.equal(ours, theirs)


def test_the_recent_can_be_taken_back_and_the_packed_cannot():
    keys = normal(1, 2, 40, 6)
    one = fed(layer(), keys, keys, 40)
    one.crop(-3)
    assert one.get_seq_length() == 37 and torch.equal(held(one)[0][:, :, 32:], keys[:, :, 32:37])
    with pytest.raises(ValueError, match="only the last 5 are not packed"):
        one.crop(-6)
    one.reset()
    assert one.get_seq_length() == 0 and one.packed_tokens == 0


def test_numbers_that_float16_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="65504"):
        layer().update(normal(1, 1, 16, 4) * 1e6, normal(1, 1, 16, 4))


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("keys", ALONG)
def test_the_memory_taken_is_what_the_formula_says(bits, keys):
    x = normal(2, 3, 40, 24)
    one = fed(layer(bits, keys=keys), x, x, 40)
    tensors = [one.keys, one.values, *(t for packed in one.packed for t in vars(packed).values())]
    assert sum(t.untyped_storage().nbytes() for t in tensors) == 2 * layer_bytes(one, 40, 3, 24, 4)


# in a model
def test_with_a_residual_for_all_tokens_nothing_changes(model):
    ids = ids_of(2, 40)
    with quantized(model, residual=40) as ours, full(model) as theirs:
        assert torch.equal(logits(model, ids, ours, 30, 1, 1, 8), logits(model, ids, theirs, 30, 1, 1, 8))


def test_generation_with_a_residual_for_all_tokens_is_the_models_own(model):
    ids = ids_of(2, 20)
    with quantized(model, residual=64) as cache:
        ours = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False)
    assert torch.equal(ours, model.generate(ids, max_new_tokens=12, do_sample=False))


def test_every_family_generates_from_eight_bits_with_nearly_its_own_logits(model):
    ids, layers = ids_of(2, 30), DynamicCache(config=model.config).layers
    with quantized(model, bits=8, group_size=8, residual=8) as cache:
        model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
        assert cache.get_seq_length() == 33
        for ours, theirs in zip(cache.layers, layers, strict=True):
            assert theirs.is_sliding or ours.packed_tokens == 24
    with quantized(model, bits=8, group_size=8, residual=8) as ours, full(model) as theirs:
        near, own = (logits(model, ids, cache, 24, 6)[:, 24:] for cache in (ours, theirs))
    assert (near - own).norm() < 1e-2 * own.norm()
    if not all(layer.is_sliding for layer in layers):
        assert not torch.equal(near, own)


def test_logits_err_more_in_fewer_bits(llama):
    ids, errors = ids_of(2, 48), []
    with full(llama) as cache:
        own = logits(llama, ids, cache, 40, 8)[:, 40:]
    for bits in (8, 4, 2, 1):
        with quantized(llama, bits=bits, group_size=8, residual=8) as cache:
            errors.append((logits(llama, ids, cache, 40, 8)[:, 40:] - own).norm().item())
    assert errors == sorted(errors) and errors[0] < 0.1 * errors[-1]


def test_beams_see_their_own_past():
    model, ids = random_model("llama"), ids_of(2, 30)
    settings = dict(max_new_tokens=8, num_beams=3, do_sample=False)
    with quantized(model, bits=8, group_size=8, residual=64) as cache:
        ours = model.generate(ids, past_key_values=cache, **settings)
    assert torch.equal(ours, model.generate(ids, **settings))
    with quantized(model, bits=8, group_size=8, residual=8) as cache:
        near = model.generate(ids, past_key_values=cache, **settings)
        assert cache.layers[0].packed_tokens == 24
    assert near.shape == ours.shape


def test_keys_and_values_may_differ_in_bits(llama):
    with quantized(llama, key_bits=2, value_bits=8, group_size=8, residual=0) as cache:
        logits(llama, ids_of(1, 16), cache, 16)
    keys, values = cache.layers[0].packed
    assert 4 * keys.codes.numel() == values.codes.numel()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(bits=9), "bits 9"),
        (dict(key_bits=0), "key bits 0"),
        (dict(value_bits=2.5), "value bits 2.5"),
        (dict(group_size=12), "multiple of 8"),
        (dict(residual=-1), "residual=-1"),
        (dict(keys="head"), "'head'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(llama, settings, words):
    with pytest.raises(ValueError, match=words), quantized(llama, **settings):
        pass
