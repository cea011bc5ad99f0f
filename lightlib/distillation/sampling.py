"""Tokens that a student draws itself, or a teacher and a student together.

Teacher-mixed sampling: Gu et al. 2023 (MiniLLM), arXiv:2306.08543
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from lightlib.distillation.losses import mixed
from lightlib.quality import device_of


@dataclass(frozen=True)
class Sample:
    """Sequences and how likely their new tokens were; log-probabilities in nats, (batch, new).

    logp: under what each token was drawn from. own_logp: under the model alone, at the same temperature;
    without a teacher the two are equal. exp(own_logp - logp) are one-step importance weights.
    """

    ids: Tensor  # (batch, prompt + new)
    logp: Tensor
    own_logp: Tensor


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: Tensor,
    new: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    mix: tuple[nn.Module, float] | None = None,
) -> Sample:
    """Draw `new` tokens after each of `prompts` (batch, prompt), which hold no padding.

    mix: (teacher, alpha) draws from alpha * teacher + (1 - alpha) * model; alpha = 1 is the teacher. Towards
    temperature 0 every token is the likeliest. An end token ends nothing here: `until_end` masks what
    follows it. Every draw comes from `generator`, on the model's device, or without one from that device's
    global generator, whose state lightlib.training keeps: a training that draws from it goes on bit-equal.
    Raises ValueError for ids of another shape, vocabularies that differ, or settings out of range.
    """
    teacher, alpha = mix or (None, 0.0)
    check(model, teacher, prompts, new, temperature, alpha)
    ids = prompts.to(device_of(model))
    own, other = Decoding(model), Decoding(teacher) if alpha else None
    logp, own_logp = [], []
    for _ in range(new):
        q = (own.next(ids) / temperature).log_softmax(-1)  # (B, V)
        p = q
        if other is not None:
            p = (other.next(ids).to(q) / temperature).log_softmax(-1)
            p = p if alpha == 1 else mixed(p, q, alpha)
        token = torch.multinomial(p.exp(), 1, generator=generator)  # (B, 1)
        logp.append(p.gather(1, token))
        own_logp.append(q.gather(1, token))
        ids = torch.cat([ids, token], 1)
    return Sample(ids, torch.cat(logp, 1), torch.cat(own_logp, 1))


def until_end(ids: Tensor, prompt: int, end: int | None) -> Tensor:
    """Which new tokens of ids (batch, prompt + new) count: (batch, new), up to each first `end`, it too.

    >>> until_end(tensor([[7, 5, 2, 5, 2]]), prompt=1, end=2)
    tensor([[ True,  True, False, False]])
    """
    ended = (ids[:, prompt:] == (-1 if end is None else end)).long()
    return ended.cumsum(1) - ended == 0


class Decoding:
    """One model reading a growing text: a cache, and how far it has read."""

    def __init__(self, model: nn.Module):
        self.model, self.cache, self.read = model, DynamicCache(config=model.config), 0

    def next(self, ids: Tensor) -> Tensor:
        """Logits (batch, vocabulary), in float32, of the token after ids (batch, length)."""
        unread = ids[:, self.read :].to(device_of(self.model))
        self.read = ids.shape[1]
        logits = self.model(unread, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].float()


def check(
    model: nn.Module, teacher: nn.Module | None, prompts: Tensor, new: int, temperature: float, alpha: float
) -> None:
    if prompts.dim() != 2 or not prompts.numel():
        raise ValueError(f"prompts have shape {tuple(prompts.shape)}, not (batch, prompt)")
    if new < 1:
        raise ValueError(f"new={new}: must be at least 1")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0; lightlib.decode.generate is greedy")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}, the teacher's part of the mixture, must lie from 0 to 1")
    if teacher is not None and teacher.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the teacher knows {teacher.config.vocab_size} tokens and the model {model.config.vocab_size}; "
            "a mixture needs one vocabulary"
        )
    for one in (model, teacher):
        limit = getattr(one.config, "max_position_embeddings", None) if one is not None else None
        if limit and prompts.shape[1] + new > limit:
            raise ValueError(f"prompt {prompts.shape[1]} + new {new} tokens exceed a context of {limit}")
