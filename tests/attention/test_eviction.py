"""Caches that evict, against dense models whose masks hide what was evicted."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from lightlib.attention.eviction import EvictingLayer, best, budget
from lightlib.attention.interface import attend
from lightlib.attention.policies import H2O, TOVA, KeyNorm, Random, SnapKV, StreamingLLM
from lightlib.decoder import cast, find_blocks
from tests.conftest import CONFIGS

POLICIES = {
    "streaming": StreamingLLM(sinks=2),
    "h2o": H2O(),
    "snapkv": SnapKV(window=3, kernel=3),
    "tova": TOVA(),
    "key norm": KeyNorm(),
    "random": Random(),
}
CALLS = (13, 1, 1, 6, 1, 1, 1, 9)  # a prompt, tokens one by one, another turn, and so on
IDS = torch.randint(3, 96, (2, sum(CALLS)), generator=torch.Generator().manual_seed(0))

every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


@torch.no_grad()
def in_calls(model, cache, ids=IDS, calls=CALLS, watch=lambda: None):
    """Logits (B, T, V) of ids, run over a cache in calls of so many tokens."""
    logits = []
    for part in ids.split(list(calls), 1):
        watch()
        logits.append(model(part, past_key_values=cache).logits)
    return torch.cat(logits, 1)


def held(cache, heads) -> list:
    """For each block which positions each query head holds: (B, H, T) booleans."""
    found = []
    for layer in cache.layers:
        there = torch.zeros(len(IDS), heads, IDS.shape[1] + 1, dtype=torch.bool)
        if layer.positions is not None:
            of_heads = layer.positions.repeat_interleave(heads // layer.positions.shape[1], 1)
            there.scatter_(2, of_heads, True)
        found.append(there)
    return found


@every_policy
def test_chunks_turns_and_single_tokens_equal_a_dense_model_that_may_not_see_what_is_gone(policy, model):
    heads, records = model.config.num_attention_heads, []
    with attend(model, score=policy, keep=8) as cache:
        logits = in_calls(model, cache, watch=lambda: records.append(held(cache, heads)))
        assert all(layer.keys.shape[2] <= 8 for layer in cache.layers)
    call_of = torch.repeat_interleave(torch.arange(len(CALLS)), torch.tensor(CALLS))

    def pattern(block, batch, head, query, key):
        there = torch.stack([record[block] for record in records])  # (calls, B, H, T)
        call = call_of[query]
        return there[call, batch, head, key] | (call_of[key] == call)

    patterns = [partial(pattern, i) for i in range(len(find_blocks(model)))]
    with attend(model, pattern=patterns), torch.no_grad():
        dense = model(IDS, use_cache=False).logits
    torch.testing.assert_close(logits, dense, rtol=0, atol=2e-5)


@every_policy
def test_keeping_all_changes_nothing(policy, model):
    plain = in_calls(model, DynamicCache(config=model.config))
    for keep in (1.0, IDS.shape[1]):
        with attend(model, score=policy, keep=keep) as cache:
            torch.testing.assert_close(in_calls(model, cache), plain, rtol=0, atol=1e-6)


@every_policy
def test_it_generates_and_the_tensors_are_as_small_as_promised(policy, model):
    ids = IDS[:, :20]
    with attend(model, score=policy, keep=8) as cache:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=6,
            do_sample=False, eos_token_id=None,
        )  # fmt: skip
    assert out.shape == (2, 26) and cache.get_seq_length() == 25
    for layer in cache.layers:
        assert layer.keys.shape[2] <= 8 and layer.positions.shape[2] <= 8
        storage, a_token = layer.keys.untyped_storage(), layer.keys[:, :, :1].nbytes
        assert storage.nbytes() <= layer.keys.nbytes + a_token, (
            "a slot for the next, and nothing larger, behind it"
        )


def test_generation_with_all_kept_gives_the_tokens_of_a_plain_cache(model):
    ids = IDS[:, :12]
    settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None)
    plain = model.generate(ids, **settings)
    for policy in POLICIES.values():
        with attend(model, score=policy, keep=64) as cache:
            assert torch.equal(model.generate(ids, past_key_values=cache, **settings), plain)


def test_beam_search_reorders_what_is_held(llama):
    ids = IDS[:, :12]
    settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, num_beams=3, eos_token_id=None)
    settings |= dict(do_sample=False)
    plain = llama.generate(ids, **settings)
    for policy in POLICIES.values():
        with attend(llama, score=policy, keep=64) as cache:
            assert torch.equal(llama.generate(ids, past_key_values=cache, **settings), plain)
        assert {len(layer.positions) for layer in cache.layers} == {6}
        assert all(
            len(t) == 6 for layer in cache.layers for t in (*layer.beside.values(), *layer.recent.values())
        )


def test_a_share_is_kept_of_all_that_came_by(llama):
    with attend(llama, score=StreamingLLM(sinks=1), keep=0.25) as cache:
        in_calls(llama, cache, IDS[:, :32], (20, 12))
    assert {layer.keys.shape[2] for layer in cache.layers} == {8}
    assert budget(0.25, 33) == 8 and budget(0.001, 3) == 1 and budget(7, 3) == 7


def test_a_window_keeps_no_token_that_no_query_can_see():
    torch.manual_seed(0)
    mistral = AutoModelForCausalLM.from_config(CONFIGS["mistral"]()).eval()
    with attend(mistral, score=H2O(), keep=30) as cache:
        logits = in_calls(mistral, cache)
    assert all(layer.keys.shape[2] == 7 for layer in cache.layers), "of a window of 8 the query is one"
    plain = in_calls(mistral, DynamicCache(config=mistral.config))
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-5)


def test_it_runs_in_bfloat16(llama):
    cast(llama, torch.bfloat16)
    for policy in POLICIES.values():
        with attend(llama, score=policy, keep=6) as cache:
            assert torch.isfinite(in_calls(llama, cache)).all()
        assert cache.layers[0].keys.dtype == torch.bfloat16


def test_heads_keep_tokens_of_their_own(llama):
    with attend(llama, score=KeyNorm(), keep=8) as cache:
        in_calls(llama, cache)
    first, second = cache.layers[0].positions[0]
    assert not torch.equal(first, second)


def test_sinks_and_the_newest_are_what_streaming_keeps(llama):
    with attend(llama, score=StreamingLLM(sinks=3), keep=8) as cache:
        in_calls(llama, cache)
    assert cache.layers[0].positions.unique().tolist() == [0, 1, 2, 28, 29, 30, 31, 32]


def test_heavy_hitters_are_scored_by_the_past_alone(llama):
    """Scores of chunks are those of one call, and each query gives a weight of 1 a head."""

    def masses(calls):
        with attend(llama, score=H2O(), keep=64) as cache:
            in_calls(llama, cache, IDS[:, : sum(calls)], calls)
        return [layer.beside["mass"] for layer in cache.layers]

    for whole, chunks in zip(masses((20,)), masses((11, 1, 8)), strict=True):
        torch.testing.assert_close(whole, chunks)
        torch.testing.assert_close(whole.sum(-1), torch.full((2, 2), 20.0 * 2))


def test_the_newest_share_of_h2o_is_kept_whatever_it_scores(llama):
    with attend(llama, score=H2O(recent=1.0), keep=5) as all_recent:
        in_calls(llama, all_recent)
    assert all_recent.layers[1].positions.unique().tolist() == [28, 29, 30, 31, 32]
    with attend(llama, score=H2O(recent=0.0), keep=5) as heavy:
        in_calls(llama, heavy, calls=(33,))
    mass = watched_mass(llama, IDS)[1]
    assert torch.equal(heavy.layers[1].positions, best(mass, 5))


def watched_mass(model, ids):
    """The weight (B, K, T) that each key gets in each block, from the weights themselves."""
    found = {}

    def watch(seen):
        found[seen.block] = seen.weights().unflatten(1, (seen.keys.shape[1], -1)).sum((2, 3))

    with attend(model, score=watch), torch.no_grad():
        model(ids)
    return found


def test_snapkv_scores_by_its_last_queries_alone(llama):
    weights = {}
    with attend(llama, score=lambda seen: weights.update({seen.block: seen.weights()})), torch.no_grad():
        llama(IDS)
    votes = weights[0][:, :, -4:].mean(2).unflatten(1, (2, -1)).mean(2)  # (B, K, S)
    with attend(llama, score=SnapKV(window=4, kernel=1), keep=9) as cache:
        in_calls(llama, cache, calls=(33,))
    votes[..., -4:] = torch.inf
    assert torch.equal(cache.layers[0].positions, best(votes, 9))


def test_snapkv_remembers_queries_of_earlier_calls(llama):
    def positions(calls):
        with attend(llama, score=SnapKV(window=6, kernel=3), keep=33) as cache:
            in_calls(llama, cache, calls=calls)
        return cache.layers[0].recent["queries"]

    torch.testing.assert_close(positions((33,)), positions((20, 10, 1, 1, 1)))


def test_pooling_keeps_the_neighbours_of_a_hit():
    seen = one_hit()
    assert SnapKV(window=1, kernel=1)(seen)[0, 0].argsort(descending=True)[1] == 5
    around = SnapKV(window=1, kernel=3)(seen)[0, 0]
    assert torch.equal(around[4:7], around[5].expand(3)) and around[3] < around[4]


def one_hit():
    """A call in which the last query looks at key 5 of 12 alone."""
    from lightlib.attention.seen import Seen

    layer = EvictingLayer()
    keys = torch.zeros(1, 1, 12, 4)
    keys[..., 5, 0] = 30.0
    layer.update(keys, keys)
    queries = torch.zeros(1, 1, 12, 4)
    queries[..., 0] = 1.0
    at = torch.arange(12)
    return Seen(
        0, queries, layer.keys, layer.values, at, layer.positions, 1.0, None, None, layer=layer, keep=4
    )


def test_best_places_rise_and_are_all_where_there_is_room():
    scores = torch.tensor([[[0.1, 3.0, 2.0, -1.0], [5.0, 1.0, 4.0, 2.0]]])
    assert best(scores, 2).tolist() == [[[1, 2], [0, 2]]]
    assert best(scores, 9).tolist() == [[[0, 1, 2, 3], [0, 1, 2, 3]]]


def test_what_cannot_be_evicted_is_refused(llama):
    refused = partial(pytest.raises, ValueError)
    for keep in (0, -3, 1.5, 0.0, True):
        with refused(match=f"keep={keep}"), attend(llama, score=H2O(), keep=keep):
            pass
    with refused(match="keep=8 needs a score"), attend(llama, keep=8):
        pass
    with refused(match="3 patterns for 2 blocks"), attend(llama, pattern=[None] * 3):
        pass
    with attend(llama, score=H2O(), keep=8) as cache:
        padded = torch.ones_like(IDS)
        padded[0, :3] = 0
        with refused(match="1 of 2 rows are padded"):
            llama(IDS, attention_mask=padded, past_key_values=cache)
        with refused(match="without the cache"):
            llama(IDS)
        with refused(match="four dimensions"):
            llama(IDS, attention_mask=torch.zeros(2, 1, 33, 33), past_key_values=cache)
        in_calls(llama, cache)
        with refused(match="cannot be taken back"):
            cache.crop(-1)
    with attend(llama, score=StreamingLLM(), keep=4) as cache, refused(match="no room beside 4 sinks"):
        llama(IDS, past_key_values=cache)


def test_reset_empties_the_cache(llama):
    with attend(llama, score=H2O(), keep=8) as cache:
        first = in_calls(llama, cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(in_calls(llama, cache), first)


def test_a_conversation_goes_on_in_the_same_cache_and_prompts_may_come_in_chunks(llama):
    settings = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    first, more = IDS[:1, :20], IDS[:1, 20:]
    for keep in (64, 8):
        with attend(llama, score=H2O(), keep=keep) as cache:
            said = llama.generate(first, past_key_values=cache, prefill_chunk_size=6, **settings)
            turn = torch.cat([said, more], 1)
            answer = llama.generate(turn, past_key_values=cache, **settings)
        assert cache.get_seq_length() == answer.shape[1] - 1
        assert cache.layers[0].keys.shape[2] == min(keep, answer.shape[1] - 1)
        if keep == 64:
            assert torch.equal(answer, llama.generate(turn, **settings))
