import contextlib
import time
from functools import partial

import pytest
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lightlib.attention.continuation import continuation_nll
from lightlib.attention.cost import allocated_bytes, decode_times, kv_bytes, kv_head_counts
from lightlib.attention.intensity import arithmetic_intensity
from lightlib.attention.kv_quantization import layer_bytes, quantized
from lightlib.attention.open_cache import full
from lightlib.cost import flops
from lightlib.decoder import head_dim
from lightlib.lowrank.svd import svd
from lightlib.units import keep_units
from tests.conftest import VOCABULARY, random_model


def ids_of(batch, length):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def after(model, open_cache, *sizes, batch=2):
    """The cache after prompts and steps of these sizes."""
    with open_cache(model) as cache:
        for part in ids_of(batch, sum(sizes)).split(sizes, 1):
            model(part, past_key_values=cache)
    return cache


# bytes
def test_the_formula_is_what_the_models_own_cache_allocates(model):
    cache = after(model, full, 20, 1, 1)
    windows = [layer for layer in cache.layers if layer.is_sliding]  # each holds its window as a number too
    assert allocated_bytes(cache) == kv_bytes(model, 22, batch=2) + 8 * len(windows)


def test_a_sliding_window_bounds_the_cache():
    model = random_model("mistral")  # a window of 8
    assert kv_bytes(model, 8) == kv_bytes(model, 4000) == 2 * kv_bytes(model, 4)


def test_bytes_by_hand(llama):
    assert (
        kv_bytes(llama, 10) == 2 * 2 * 2 * 8 * 10 * 4
    )  # k and v, blocks, kv heads, head_dim, tokens, float32
    assert kv_bytes(llama, 10, batch=3, bits=5) == 3 * 2 * 2 * 2 * 8 * 10 * 5 // 8
    assert kv_bytes(llama, 10, kv_heads=4) == 2 * kv_bytes(llama, 10)
    assert kv_bytes(llama.bfloat16(), 10) == 2 * 2 * 2 * 8 * 10 * 2
    assert kv_bytes(llama, 0) == 0
    with pytest.raises(ValueError, match="batch=0"):
        kv_bytes(llama, 10, batch=0)


def test_blocks_that_were_cut_differently_are_counted_as_they_are(llama):
    keep_units(llama, {"model.layers.1": {"heads": torch.tensor([1])}}, "by hand")
    assert kv_head_counts(llama) == [2, 1]
    assert allocated_bytes(after(llama, full, 12)) == kv_bytes(llama, 12, batch=2)


def test_layers_in_factors_are_counted_by_what_they_give(model):
    light = svd(model, rank=6, weighing=None, progress=False).model
    assert kv_head_counts(light) == kv_head_counts(model)


def test_a_slice_of_a_big_tensor_counts_whole():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 100, 8), torch.zeros(1, 2, 100, 8), 0)
    whole = allocated_bytes(cache)
    cache.crop(-90)
    assert cache.get_seq_length() == 10 and allocated_bytes(cache) == whole == 2 * 2 * 100 * 8 * 4
    cache.layers[0].keys = cache.layers[0].keys.clone()
    assert allocated_bytes(cache) == whole / 2 + whole / 20


def test_tensors_are_found_wherever_a_layer_keeps_them_and_counted_once():
    layer = DynamicLayer()
    shared = torch.zeros(10)
    layer.notes = {"mass": [torch.zeros(5), (shared, shared[2:])], "again": {shared}}
    layer.itself, layer.model = layer, torch.nn.Linear(8, 8)
    assert allocated_bytes(Cache(layers=[layer])) == 60


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_quantized_cache_takes_what_its_formula_says(llama, bits):
    cache = after(llama, partial(quantized, bits=bits, group_size=8, residual=8), 40)
    wanted = sum(layer_bytes(layer, 40, 2, head_dim(llama), 4) for layer in cache.layers)
    assert allocated_bytes(cache) == 2 * wanted < kv_bytes(llama, 40, batch=2)


# time
def test_each_cache_is_timed_at_each_context(llama):
    caches = {"full": full, "4 bits": partial(quantized, bits=4, group_size=8, residual=8)}
    times = decode_times(llama, caches, [16, 40], new=3, repeats=2, batch=2, chunk=9)
    assert [(row.cache, row.context) for row in times] == [
        ("full", 16), ("4 bits", 16), ("full", 40), ("4 bits", 40),
    ]  # fmt: skip
    assert [row.cache_bytes for row in times][::2] == [kv_bytes(llama, n + 4, batch=2) for n in (16, 40)]
    assert times.rows[3].cache_bytes < times.rows[2].cache_bytes
    assert all(row.tpot_ms > 0 and row.spread_ms >= 0 for row in times)
    assert "4 bits" in times._repr_html_()


def test_a_step_takes_at_least_as_long_as_its_cache_waits(llama):
    class Slow(DynamicLayer):
        def update(self, keys, values, *_, **__):
            time.sleep(0.02)
            return super().update(keys, values)

    def slow(model):
        return contextlib.nullcontext(Cache(layers=[Slow(), DynamicLayer()]))

    (waits,) = decode_times(llama, {"slow": slow}, [8], new=4, repeats=1)
    assert 20 <= waits.tpot_ms < 2000  # milliseconds


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(caches={}), "no caches"),
        (dict(contexts=[]), "no contexts"),
        (dict(contexts=[0]), r"contexts=\[0\]"),
        (dict(chunk=0), "chunk=0"),
        (dict(contexts=[60]), "context of 64"),
    ],
)
def test_what_cannot_be_timed_is_refused(llama, settings, words):
    with pytest.raises(ValueError, match=words):
        decode_times(llama, **{"caches": {"full": full}, "contexts": [8], **settings})


# FLOPs per byte
def test_attention_does_as_many_flops_a_byte_whatever_the_batch_and_context(llama):
    one, many = arithmetic_intensity(llama, 1, 16), arithmetic_intensity(llama, 8, 64)
    assert one.attention == many.attention == 2 * (4 / 2) / 4  # 4 query and 2 kv heads, float32
    assert many.weights == pytest.approx(8 * one.weights)
    assert many.attention < many.step < many.weights


def test_fewer_kv_heads_and_fewer_bits_raise_the_intensity_of_attention(llama):
    assert arithmetic_intensity(llama, kv_heads=1).attention == 2
    assert arithmetic_intensity(llama, kv_heads=4).attention == 0.5
    assert arithmetic_intensity(llama, bits=4).attention == 8
    assert arithmetic_intensity(llama, kv_heads=1).weights == arithmetic_intensity(llama).weights
    with pytest.raises(ValueError, match="kv_heads=0"):
        arithmetic_intensity(llama, kv_heads=0)


def test_a_steps_flops_are_those_of_the_model(llama):
    step = arithmetic_intensity(llama, 1, 32)
    assert step.attention_flops + step.weight_flops == flops(llama, 32).decode_per_token
    assert arithmetic_intensity(random_model("mistral"), 1, 32).attention_flops == 4 * 2 * 32 * 8


def test_weights_are_read_once_a_step_and_tables_by_the_row():
    tied, apart = (random_model("llama", tied=value) for value in (True, False))
    read = [arithmetic_intensity(model).weight_bytes for model in (tied, apart)]
    assert read[0] == read[1] >= sum(p.nbytes for p in tied.parameters())
    gpt2 = random_model("gpt2")
    everything = sum(p.nbytes for p in gpt2.parameters())
    assert arithmetic_intensity(gpt2).weight_bytes == everything - gpt2.transformer.wpe.weight.nbytes


# quality
def test_with_the_full_cache_it_is_the_nll_of_those_tokens(model):
    ids = ids_of(3, 30)
    with torch.no_grad():
        logp = model(ids).logits[:, 20:-1].log_softmax(-1)
    wanted = -logp.gather(-1, ids[:, 21:, None]).mean().item()
    for step in (None, 1, 4):
        assert continuation_nll(model, [ids], full, prompt=20, step=step) == pytest.approx(wanted, rel=1e-5)


def test_pieces_count_by_their_tokens(llama):
    ids = ids_of(3, 30)
    pieces = [ids[:2], ids[2:, :23]]
    each = [continuation_nll(llama, [piece], full, prompt=20) for piece in pieces]
    wanted = (18 * each[0] + 2 * each[1]) / 20
    assert continuation_nll(llama, pieces, full, prompt=20) == pytest.approx(wanted, rel=1e-6)


def test_a_uniform_models_nll_is_that_of_the_vocabulary(llama):
    llama.get_output_embeddings().weight.data.zero_()
    nll = continuation_nll(llama, [ids_of(1, 30)], full, prompt=8)
    assert nll == pytest.approx(torch.tensor(VOCABULARY).log().item(), rel=1e-6)


def test_a_prompt_rounded_to_one_bit_is_noticed(llama):
    pieces = [ids_of(4, 40)]
    nll = partial(continuation_nll, llama, pieces, prompt=32)
    settings = dict(group_size=8, residual=0)
    assert nll(partial(quantized, residual=40)) == nll(full)
    near, far = (abs(nll(partial(quantized, bits=b, **settings)) - nll(full)) for b in (8, 1))
    assert 0 < near < far


@pytest.mark.parametrize(
    ("pieces", "settings", "words"),
    [
        ([], {}, "no pieces"),
        ([(1, 20)], dict(prompt=19), "prompt=18 or less"),
        ([(1, 20)], dict(prompt=0), "prompt=0"),
        ([(1, 20)], dict(prompt=8, step=0), "step=0"),
        ([(1, 70)], dict(prompt=8), "context of 64"),
    ],
)
def test_pieces_that_leave_nothing_to_predict_are_refused(llama, pieces, settings, words):
    with pytest.raises(ValueError, match=words):
        continuation_nll(llama, [ids_of(*shape) for shape in pieces], full, **settings)
