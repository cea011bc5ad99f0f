"""Caches on a CUDA device hold and give what they do on a CPU: `pytest tests -m gpu`."""

from functools import partial

import pytest
import torch

from lightlib.attention.context_gates import context_gates
from lightlib.attention.context_pruning import prune_context
from lightlib.attention.interface import attend
from lightlib.attention.kv_quantization import quantized
from lightlib.attention.policies import H2O, TOVA, KeyNorm, SnapKV, StreamingLLM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

IDS = torch.randint(3, 96, (2, 33), generator=torch.Generator().manual_seed(0))
CALLS = [13, 1, 1, 6, 1, 1, 1, 9]
CACHES = {
    "streaming": partial(attend, score=StreamingLLM(sinks=2), keep=8),
    "h2o": partial(attend, score=H2O(), keep=8),
    "snapkv": partial(attend, score=SnapKV(window=3, kernel=3), keep=8),
    "tova": partial(attend, score=TOVA(), keep=8),
    "key norm": partial(attend, score=KeyNorm(), keep=8),
    "4 bits": partial(quantized, bits=4, group_size=8, residual=8),
}


@torch.no_grad()
def in_calls(model, open_cache, ids):
    with open_cache(model) as cache:
        logits = [model(part, past_key_values=cache).logits for part in ids.split(CALLS, 1)]
    return torch.cat(logits, 1).cpu(), cache


@pytest.mark.parametrize("open_cache", CACHES.values(), ids=CACHES)
def test_a_compressed_cache_gives_what_it_gives_on_a_cpu(open_cache, model):
    here, _ = in_calls(model, open_cache, IDS)
    there, cache = in_calls(model.cuda(), open_cache, IDS.cuda())
    assert cache.layers[0].keys.is_cuda
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-3)


def test_gates_drop_what_they_drop_on_a_cpu(llama):
    gates = context_gates(llama, rank=8, seed=1).requires_grad_(False)
    for gate in gates:
        gate.bias.fill_(0.02)
    here, cache = in_calls(llama, partial(prune_context, gates=gates), IDS)
    there, other = in_calls(llama.cuda(), partial(prune_context, gates=gates.cuda()), IDS.cuda())
    assert [layer.keys.shape for layer in cache.layers] == [layer.keys.shape for layer in other.layers]
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-3)
