"""Learned gates: their sigmoid against its definition, and the cache that drops what they close."""

import math

import pytest
import torch
from transformers.cache_utils import DynamicCache

from lightlib.attention.context_gates import (
    alpha_sigmoid,
    context_gates,
    kept_so_far,
    load_gates,
    save_gates,
)
from lightlib.attention.context_pruning import Soft, prune_context, train_gates
from lightlib.attention.eviction import GONE
from lightlib.attention.interface import using
from lightlib.calibration import reading_attention
from lightlib.quality import perplexity
from lightlib.zoo import batches, load_model, load_text
from tests.conftest import random_model

IDS = torch.randint(3, 96, (2, 26), generator=torch.Generator().manual_seed(0))
CALLS = (11, 1, 1, 6, 1, 1, 5)


def random_gates(model, scale=3.0):
    """Gates that close about half, differently in each row."""
    gates = context_gates(model, rank=8, seed=1)
    for gate in gates:
        for linear in (gate.query, gate.key):
            linear.weight.data *= scale
        gate.bias.data.fill_(0.3)
    return gates.requires_grad_(False)


def hardened(gates, hard):
    """Attention for a plain forward, without a cache, with gates at `hard` alpha."""
    soft = Soft(gates)
    soft.alpha = hard
    return soft


def test_at_1_it_is_the_sigmoid_and_at_2_a_ramp():
    z = torch.linspace(-3, 3, 61)
    torch.testing.assert_close(alpha_sigmoid(z, 1.0), z.sigmoid())
    torch.testing.assert_close(alpha_sigmoid(z, 1.01), z.sigmoid(), rtol=0, atol=5e-3)
    torch.testing.assert_close(alpha_sigmoid(z, 2.0), ((z + 1) / 2).clamp(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 4.0, 8.0])
def test_it_solves_its_equation_and_is_exactly_closed_or_open_outside(alpha):
    z = torch.linspace(-2, 2, 401, dtype=torch.float64)
    p = alpha_sigmoid(z, alpha)
    inside = z.abs() < 1 / (alpha - 1) - 1e-9
    left = p ** (alpha - 1) - (1 - p) ** (alpha - 1)
    torch.testing.assert_close(left[inside], (alpha - 1) * z[inside], rtol=0, atol=1e-5)
    assert set(p[~inside & (z < 0)].tolist()) <= {0.0} and set(p[~inside & (z > 0)].tolist()) <= {1.0}
    torch.testing.assert_close(p + alpha_sigmoid(-z, alpha), torch.ones_like(p), rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, 4.0])
def test_its_slope_is_that_of_finite_differences(alpha):
    z = torch.linspace(-0.3, 0.3, 25, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(alpha_sigmoid(z, alpha).sum(), z)[0]
    with torch.no_grad():
        differences = (alpha_sigmoid(z + 1e-3, alpha) - alpha_sigmoid(z - 1e-3, alpha)) / 2e-3
    torch.testing.assert_close(slope, differences, rtol=0, atol=1e-3)


def test_a_closed_key_stays_closed_and_a_token_does_not_judge_itself():
    gates = torch.tensor(
        [[0.0, 0.9, 0.9, 0.9], [0.5, 0.0, 0.9, 0.9], [1.0, 0.5, 0.0, 0.9], [0.0, 1.0, 0.5, 0.0]]
    )
    kept = kept_so_far(gates[None])[0]
    expected = torch.tensor([[1.0, 1, 1, 1], [0.5, 1, 1, 1], [0.5, 0.5, 1, 1], [0.0, 0.5, 0.5, 1]])
    assert torch.equal(kept.tril(), expected.tril())
    # the last two queries alone, over all four keys
    later = kept_so_far(gates[None, 2:], first=2)[0]
    assert torch.equal(later.tril(2), torch.tensor([[1.0, 0.5, 1, 0], [0.0, 0.5, 0.5, 1]]).tril(2))


@torch.no_grad()
def test_open_gates_change_nothing_and_untrained_ones_keep_nearly_all(model):
    plain = DynamicCache(config=model.config)
    logits = [model(part, past_key_values=plain).logits for part in IDS.split(CALLS, 1)]
    gates = context_gates(model, rank=8).requires_grad_(False)
    for gate in gates:
        gate.bias.fill_(1e4)
    with prune_context(model, gates) as cache:
        ours = [model(part, past_key_values=cache).logits for part in IDS.split(CALLS, 1)]
    torch.testing.assert_close(torch.cat(ours, 1), torch.cat(logits, 1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_cache_in_chunks_equals_the_whole_with_hard_gates(llama):
    """At alpha = 1e4 the soft gates of training are hard; they mask, and the cache deletes."""
    gates = random_gates(llama)
    hard = hardened(gates, 1e4)
    with using(llama, hard.attention, hard.mask), reading_attention(llama, hard.read):
        whole = llama(IDS, use_cache=False).logits
    held = []
    with prune_context(llama, gates) as cache:
        logits = []
        for part in IDS.split(CALLS, 1):
            logits.append(llama(part, past_key_values=cache).logits)
            held.append(cache.layers[0].keys.shape[2])
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=0, atol=1e-5)
    assert held[-1] < 20 and cache.get_seq_length() == 26
    empty = (cache.layers[0].positions == GONE).sum((1, 2))
    assert empty.min() == 0 and empty.max() > 0, "one row fills the rectangle, the other has empty slots"


@torch.no_grad()
def test_it_generates_on_every_family(model):
    gates = random_gates(model)
    ids = IDS[:, :16]
    settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=5, eos_token_id=None, do_sample=False)
    with prune_context(model, gates) as cache:
        out = model.generate(ids, past_key_values=cache, **settings)
    assert out.shape == (2, 21) and min(layer.keys.shape[2] for layer in cache.layers) < 20


def test_gates_that_pay_for_what_they_keep_keep_less_and_the_model_stays_as_it_is():
    model, tokenizer = load_model("tiny", progress=False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    text = batches(tokenizer, load_text("plays", "calibration"), n=32, length=64, batch_size=4)
    (test,) = batches(tokenizer, load_text("plays", "test"), n=4, length=64, batch_size=4)
    found = {}
    for weight in (0.0, 5.0):
        seen = []
        gates = train_gates(
            model, text, sparsity_weight=weight, rank=8, steps=20, lr=2e-2, progress=False,
            watch=lambda step, loss, share, seen=seen: seen.append(share),
        )  # fmt: skip
        with prune_context(model, gates) as cache, torch.no_grad():
            logits = model(test, past_key_values=cache).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), test[:, 1:].flatten()).item()
        found[weight] = nll, seen[-1], sum(layer.keys.shape[2] for layer in cache.layers)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(p.requires_grad for p in gates.parameters())
    dense = math.log(perplexity(model, [test]))
    print(dense, found)
    assert dense - 0.02 < found[0.0][0] < found[5.0][0] < dense + 1.5
    assert found[5.0][1] < 0.7 * found[0.0][1] and found[5.0][2] < found[0.0][2]


def test_gates_come_back_from_a_file_and_fit_their_model_alone(llama, tmp_path):
    gates = random_gates(llama)
    again = load_gates(save_gates(gates, tmp_path / "gates.safetensors"), llama)
    for name, tensor in gates.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    other = random_model("llama")
    del other.model.layers[1]
    with pytest.raises(ValueError, match="2 gates over"), prune_context(other, gates):
        pass
    with pytest.raises(ValueError, match="gates of another model"):
        load_gates(tmp_path / "gates.safetensors", other)
    with pytest.raises(ValueError, match=r"sparsity_weight=-0\.1"):
        train_gates(llama, [IDS], sparsity_weight=-0.1)
    with prune_context(llama, gates), pytest.raises(ValueError, match="without the cache"):
        llama(IDS)
