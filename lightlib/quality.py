"""How much a model lost: perplexity, and the divergence from the model it came from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightlib.report import facts_table

LOGITS_AT_ONCE = 2**25  # 134 MB in float32: bounds memory, whatever the batch
POSITIONS_AT_ONCE = 128  # of a window's logits, where softmax makes copies of them


def perplexity(model: nn.Module, batches: list[Tensor]) -> float:
    """exp of the mean negative log-likelihood over all predicted tokens; logits in float32.

    A window of T tokens predicts T - 1. A uniform model over V tokens has perplexity V.
    """
    total, count = 0.0, 0
    for targets, logits in _predictions(model, batches):
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += targets.numel()
    return math.exp(total / count)


@dataclass(frozen=True)
class Divergence:
    """How far a model's next-token distributions are from a reference's, over `tokens` positions."""

    mean_kl: float  # nats a token, KL(reference || model)
    top1_agreement: float  # fraction of positions with the same most likely token
    perplexity: float  # the model's own, from the same pass
    tokens: int

    def _repr_html_(self) -> str:
        return facts_table(self, ("top1_agreement", "mean_kl"))


def divergence(model: nn.Module, reference: nn.Module, batches: list[Tensor]) -> Divergence:
    """Mean KL(reference || model) of the next-token distributions. A model against itself has 0."""
    nll, kl, same, count = 0.0, 0.0, 0, 0
    pairs = zip(_predictions(model, batches), _predictions(reference, batches), strict=True)
    for (targets, ours), (_, theirs) in pairs:
        p, q = theirs.log_softmax(-1), ours.log_softmax(-1).to(theirs.device)
        nll -= q.gather(-1, targets[..., None].to(q.device)).sum().item()
        kl += F.kl_div(q, p, reduction="sum", log_target=True).item()
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        count += p[..., 0].numel()
    return Divergence(max(kl / count, 0.0), same / count, math.exp(nll / count), count)


@torch.no_grad()
def _predictions(model: nn.Module, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(targets (b, t), logits (b, t, vocabulary) in float32), a few windows and positions at a time."""
    if not batches:
        raise ValueError("no batches: lightlib.zoo.batches(tokenizer, text) makes them")
    if any(ids.shape[1] < 2 for ids in batches):
        raise ValueError("a window of one token predicts nothing: take length >= 2")
    device = device_of(model)
    model.eval()
    for batch in batches:
        at_once = max(1, LOGITS_AT_ONCE // (batch.shape[1] * model.config.vocab_size))
        for ids in batch.to(device).split(at_once):
            logits = model(ids, use_cache=False).logits[:, :-1]
            parts = (t.split(POSITIONS_AT_ONCE, 1) for t in (ids[:, 1:], logits))
            for targets, some in zip(*parts, strict=True):
                yield targets, some.float()


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs go. Raises ValueError where its weights are not there."""
    places = {weight.device for weight in model.parameters()}
    if torch.device("meta") in places:
        raise ValueError("this model has weights on the meta device, so no numbers; load it with its weights")
    return next(model.get_input_embeddings().parameters()).device
