"""Generation watched: the tokens it writes, and what the cache holds at each step."""

from functools import partial

import pytest
import torch

from lightlib.attention.interface import attend
from lightlib.attention.open_cache import full
from lightlib.attention.policies import KeyNorm, StreamingLLM
from lightlib.attention.trace import trace

IDS = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(0))


def test_streaming_holds_its_sinks_and_the_newest_at_every_step(llama):
    found = trace(llama, IDS, partial(attend, score=StreamingLLM(sinks=2), keep=6), new=4)
    assert found.first == 12 and found.held.shape == (4, 2, 16)
    for step, blocks in enumerate(found.held):
        seen = 12 + step
        expected = torch.zeros(16)
        expected[:2] = expected[seen - 4 : seen] = 1.0
        expected[seen:] = -1.0  # not cached yet: the last token written never is
        assert all(torch.equal(block, expected) for block in blocks)


def test_it_writes_what_generation_writes(llama):
    found = trace(llama, IDS, partial(attend, score=KeyNorm(), keep=8), new=6)
    settings = dict(attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False, eos_token_id=None)
    with attend(llama, score=KeyNorm(), keep=8) as cache:
        assert torch.equal(llama.generate(IDS, past_key_values=cache, **settings)[0], found.ids)
    shares = found.held[found.held >= 0]
    assert set(shares.tolist()) <= {0.0, 0.5, 1.0}, "two key-value heads"
    torch.testing.assert_close(found.held.clamp_min(0).sum(-1), torch.full((6, 2), 8.0))


def test_what_cannot_be_traced_is_refused(llama):
    with pytest.raises(ValueError, match=r"shape \(2, 12\); one row"):
        trace(llama, IDS.expand(2, -1), full, new=2)
    with pytest.raises(ValueError, match="DynamicLayer does not say which tokens it holds"):
        trace(llama, IDS, full, new=2)
