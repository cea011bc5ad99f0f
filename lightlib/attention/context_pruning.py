"""Dynamic context pruning: each block learns which tokens no later query will need.

Anagnostidis et al. 2023, arXiv:2305.15805. A small query and key of each token's hidden state decide. What
one query closes stays closed for all after it, so the cache can let it go. Here the model stays as it is and
the gates alone learn; in the paper the model learns with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightlib.attention.context_gates import alpha_sigmoid, context_gates, kept_so_far
from lightlib.attention.eviction import GONE, EvictingLayer, evicting_cache
from lightlib.attention.interface import check_padding, layer_of, mixed, using
from lightlib.attention.seen import per_query_head, sees
from lightlib.calibration import reading_attention
from lightlib.decoder import find_blocks
from lightlib.training import next_token_loss, train

SOFTEST, HARDEST = 1.0, 8.0  # alpha at the first step of training and at the last


def train_gates(
    model: nn.Module,
    batches: list[Tensor],
    *,
    sparsity_weight: float = 0.3,
    rank: int = 64,
    steps: int = 200,
    lr: float = 1e-3,
    seed: int = 0,
    watch=lambda step, loss, kept: None,
    progress: bool = True,
) -> nn.ModuleList:
    """Gates that learn, on `batches`, to close what the next tokens do not need. The model stays as it is.

    The loss is the mean nll of the next token + sparsity_weight x the mean share of its past that a token
    still sees. Gates are soft at first and nearly hard at the end. watch: called with each step, the loss,
    and that share. Weights of 0 to 10 go from nearly all to nearly nothing.
    """
    if sparsity_weight < 0:
        raise ValueError(f"sparsity_weight={sparsity_weight}: a reward for keeping all; give 0 or more")
    gates = context_gates(model, rank, seed)
    soft, state = Soft(gates), {"step": 0}

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        share = state["step"] / max(steps - 1, 1)
        soft.alpha = SOFTEST + (HARDEST - SOFTEST) * (1 - math.cos(math.pi * share)) / 2
        soft.kept.clear()
        nll = next_token_loss(model, ids)
        state["kept"] = torch.stack(soft.kept).mean()
        return nll + sparsity_weight * state["kept"]

    def seen(step: int, value: float) -> None:
        state["step"] = step + 1
        watch(step, value, state["kept"].item())

    with using(model, soft.attention, soft.mask), reading_attention(model, soft.read):
        train(
            model, list(gates.parameters()), batches, steps=steps, lr=lr, loss=loss, watch=seen,
            progress=progress,
        )  # fmt: skip
    return gates.eval().requires_grad_(False)


class Soft:
    """Attention in which a key counts as far as no gate has closed it; for training, without a cache."""

    def __init__(self, gates: nn.ModuleList):
        self.gates, self.alpha, self.hidden = gates, SOFTEST, {}
        self.kept: list[Tensor] = []

    def read(self, block: int, x: Tensor) -> None:
        self.hidden[block] = x

    def mask(self, *, attention_mask: Tensor | None = None, **_) -> None:
        check_padding(attention_mask)

    def attention(
        self, module, q, k, v, mask, *, scaling, dropout=0.0, softcap=None, sliding_window=None, **_
    ):
        if softcap is not None:
            raise ValueError(
                f"logits are capped at {softcap}, beside which gates cannot learn; take another model"
            )
        x, gate = self.hidden.pop(module.layer_idx), self.gates[module.layer_idx]
        at = torch.arange(x.shape[1], device=x.device)
        kept = kept_so_far(alpha_sigmoid(gate(x, gate.key(x)).float(), self.alpha))  # (B, T, T)
        seen = sees(at, at, sliding_window)
        past = seen & (at[:, None] > at)
        self.kept.append((kept * past).sum() / (len(kept) * past.sum().clamp_min(1)))
        # what is closed entirely is as good as unseen, and has no gradient
        bias = kept.clamp_min(torch.finfo(torch.float32).tiny).log()
        bias = bias.masked_fill(~seen | (kept == 0), -torch.inf)[:, None]
        return sdpa_attention_forward(module, q, k, v, bias.to(q.dtype), dropout=dropout, scaling=scaling)


@contextmanager
def prune_context(model: nn.Module, gates: nn.ModuleList) -> Iterator[Cache]:
    """While it lasts, blocks drop from the cache what their gates close: `generate(past_key_values=cache)`.

    What a query closes, it does not see either. How much stays is up to the gates, and may differ from block
    to block; rows of a batch that close more than others take their room until those close as much. Untrained
    gates keep nearly all. Raises ValueError for gates of another model, and for calls without the cache.
    """
    blocks = find_blocks(model)
    widths = {gate.query.in_features for gate in gates}
    if len(gates) != len(blocks) or widths != {model.config.hidden_size}:
        raise ValueError(
            f"{len(gates)} gates over {sorted(widths)} channels do not fit {len(blocks)} blocks over "
            f"{model.config.hidden_size}; train gates for this model"
        )
    hard = Hard(gates, evicting_cache(model))
    with using(model, hard.attention, hard.mask), reading_attention(model, hard.read):
        yield hard.cache


class Hard(Soft):
    """Attention over a cache from which a closed key is deleted."""

    def __init__(self, gates: nn.ModuleList, cache: Cache):
        super().__init__(gates)
        self.cache = cache

    def attention(
        self, module, q, k, v, mask, *, scaling, dropout=0.0, softcap=None, sliding_window=None, **_
    ):
        layer = layer_of(self.cache, module.layer_idx, k)
        x, gate = self.hidden.pop(module.layer_idx), self.gates[module.layer_idx]
        T, S = q.shape[2], k.shape[2]
        if "gate keys" not in layer.beside:
            layer.beside["gate keys"] = k.new_zeros(len(k), 1, S, gate.key.out_features)
        keys = layer.beside["gate keys"]
        keys[:, 0, S - T :] = gate.key(x)
        kept = kept_so_far((gate(x, keys[:, 0]) > 0).float(), S - T)  # (B, T, S)
        at = torch.arange(layer.seen - T, layer.seen, device=q.device)
        visible = sees(at, layer.positions, sliding_window) & (kept > 0)[:, None]  # (B, K, T, S)
        heads = per_query_head(visible, q.shape[1])
        out = mixed(module, q, k, v, heads, scaling, dropout, softcap)
        drop(layer, (layer.positions[:, 0] != GONE) & (kept[:, -1] > 0))
        return out, None


def drop(layer: EvictingLayer, alive: Tensor) -> None:
    """Let go of what is not alive (B, S); a row in which less is alive than in others has empty slots."""
    n = int(alive.sum(-1).max())
    layer.positions.masked_fill_(~alive[:, None], GONE)
    layer.retain(alive[:, None].float().expand_as(layer.positions), n)
