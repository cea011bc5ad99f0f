"""What a step of distillation lowers: on which text the two models are compared, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as computed_again

from lightlib.distillation.losses import Loss, forward_kl, hard_and_soft
from lightlib.distillation.matching import Matching
from lightlib.distillation.sampling import sample, until_end
from lightlib.quality import device_of

LOGITS_AT_ONCE = 2**24  # 67 MB in float32: the losses hold several copies of so many


@dataclass(frozen=True)
class Objective:
    """What a step lowers: a function of the student and ids (batch, length)."""

    teacher: nn.Module
    loss: Loss = forward_kl
    hard: float = 0.0
    temperature: float = 1.0
    on_policy: float = 0.0
    written: bool = False  # whether ids behind the prompt were written by the teacher
    prompt: int | None = None
    matching: Matching | None = None

    def __call__(self, student: nn.Module, ids: Tensor) -> Tensor:
        ids, first, counts = ids.to(device_of(student)), 1, None
        own = self.on_policy > 0 and bool(torch.rand(()) < self.on_policy)
        if own or self.written:
            first = cut(ids, self.prompt)
            if own:
                ids = sample(student, ids[:, :first], ids.shape[1] - first).ids
            counts = until_ends(student, ids, first)  # (batch, length - first)
        ours, theirs = self.outputs(student, ids, first)
        rows = [ours.logits[:, :-1], ids[:, first:]]
        if theirs is not None:
            rows.append(theirs.logits[:, :-1].to(ids.device))
        rows = [x.flatten(0, 1) if counts is None else x[counts] for x in rows]  # (positions, ...)
        value = in_parts(self.compared, rows)
        return value + self.matching.loss(ours, theirs) if self.matching else value

    def outputs(self, student: nn.Module, ids: Tensor, first: int):
        """What both models give for ids; their logits begin with those of the token at `first`."""
        kept = {"use_cache": False, "logits_to_keep": ids.shape[1] - first + 1}
        kept |= self.matching.wanted() if self.matching else {}
        ours, theirs = student(ids, **kept), None
        if self.hard < 1 or self.matching:
            with torch.no_grad():
                theirs = self.teacher(ids.to(device_of(self.teacher)), **kept)
        return ours, theirs

    def compared(self, student: Tensor, targets: Tensor, teacher: Tensor | None = None) -> Tensor:
        """The mean over logits (positions, vocabulary) and targets (positions)."""
        settings = {"alpha": self.hard, "temperature": self.temperature, "loss": self.loss}
        return hard_and_soft(student, teacher, targets, **settings)


def in_parts(loss: Callable[..., Tensor], rows: list[Tensor]) -> Tensor:
    """loss(*rows), a mean over their first axis, a part at a time where logits, which come first, are many.

    Each part's float32 copies are then dropped and computed again for the gradient.
    """
    count, vocabulary = rows[0].shape
    parts = list(zip(*(x.split(max(1, LOGITS_AT_ONCE // vocabulary)) for x in rows), strict=True))
    if len(parts) == 1:
        return loss(*rows)
    again = partial(computed_again, loss, use_reentrant=False, preserve_rng_state=False)
    return sum(again(*part) * (len(part[0]) / count) for part in parts)


def cut(ids: Tensor, prompt: int | None) -> int:
    """How many tokens of ids (batch, length) are a prompt."""
    return ids.shape[1] // 2 if prompt is None else prompt


def until_ends(model: nn.Module, ids: Tensor, prompt: int) -> Tensor:
    """Which tokens behind the prompt count (batch, new): up to each first end token of the model, it too."""
    end = model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    return torch.stack([until_end(ids, prompt, one) for one in ends]).all(0)
