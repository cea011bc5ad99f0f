"""MiniLLM: the student writes, the teacher judges.  Gu et al. 2023, arXiv:2306.08543

Minimises KL(student || teacher) of whole sequences, which seeks the teacher's modes. Its gradient is the
policy gradient of rewards r_t = log p(y_t) / q(y_t), p the teacher and q the student. What the reward of
the next token itself gives is taken exactly over the vocabulary; what later ones give is sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lightlib.change import changing
from lightlib.compact import letting_gradients_through
from lightlib.distillation.distill import check_vocabulary, chosen
from lightlib.distillation.losses import kl
from lightlib.distillation.objective import until_ends
from lightlib.distillation.sampling import sample
from lightlib.quality import device_of
from lightlib.report import Compressed, Report
from lightlib.training import fingerprint, frozen, next_token_loss, only, train, whole


@dataclass(frozen=True)
class Variant:
    """Where the paper and its released code (microsoft/LMOps) differ.

    The code's scaling of rewards is left out, as its whitening undoes it; it whitens padding too, which here
    does not count. It takes four passes over each draw; here each step draws anew.
    """

    own_reward: bool  # the return at t holds r_t too, which the single step holds already
    gamma: float  # by how much each later reward counts less
    whiten: bool  # the batch's returns are moved to mean 0 and scaled to variance 1
    weigh_single: bool  # importance weights for the single step too
    token_mean: bool  # mean over the batch's tokens; otherwise the mean over sequences of their sums


PAPER = Variant(own_reward=False, gamma=1.0, whiten=False, weigh_single=True, token_mean=False)
RELEASED = Variant(own_reward=True, gamma=0.95, whiten=True, weigh_single=False, token_mean=True)


def next_token_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The single step: KL(student || teacher) of each next token, (..., V) -> (...). 0 where equal."""
    return kl(student_logits.log_softmax(-1), teacher_logits.log_softmax(-1))


def returns(
    log_p: Tensor, log_q: Tensor, mask: Tensor, normalise: bool = True, variant: Variant = PAPER
) -> Tensor:
    """Sum of the rewards log p - log q after each token, all (batch, T); 0 after a sequence's last.

    normalise: the mean of these rewards instead. The paper divides by T - t - 1, where T - t rewards remain.

    >>> returns(tensor([[-1., -2., -3.]]), tensor([[0., 0., 0.]]), torch.ones(1, 3), normalise=False)
    tensor([[-5., -3., 0.]])
    """
    mask = mask.to(log_p)
    at = torch.arange(mask.shape[1], device=mask.device)
    ahead = at[:, None] - at - int(not variant.own_reward)  # (later token, token)
    follows = (ahead >= 0).to(log_p)
    R = ((log_p - log_q) * mask) @ (follows * variant.gamma ** ahead.clamp(min=0).to(log_p))  # (B, T)
    if normalise:
        R = R / (mask @ follows).clamp(min=1)
    if variant.whiten:
        mean = (R * mask).sum() / mask.sum()
        R = (R - mean) / (((R - mean).square() * mask).sum() / mask.sum() + 1e-8).sqrt()
    return R * mask


def importance_weights(log_q: Tensor, logp: Tensor, mask: Tensor, over: str = "step") -> Tensor:
    """How much likelier the student is to draw a token than what drew it (logp): (batch, T); 1 where alike.

    over: "step", that token alone, which MiniLLM takes; "prefix", the tokens up to it; "sequence", all.
    Only "sequence" leaves the gradient without bias, as returns depend on later draws; its variance grows
    with every token.
    """
    ratio = (log_q - logp) * mask
    if over == "prefix":
        ratio = ratio.cumsum(1)
    elif over == "sequence":
        ratio = ratio.sum(1, keepdim=True).expand_as(ratio)
    elif over != "step":
        raise ValueError(f"over={over!r}: importance weights go over 'step', 'prefix' or 'sequence'")
    return ratio.exp()


def clipped(weights: Tensor, R: Tensor, clip: float) -> Tensor:
    """Where PPO stops: what is likelier now than when drawn gets no more reward, what is rarer no blame."""
    return ((R > 0) & (weights > 1 + clip)) | ((R < 0) & (weights < 1 - clip))


def minillm_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    logp: Tensor,
    mask: Tensor,
    *,
    single_step: bool = True,
    normalise: bool = True,
    clip: float | None = 0.2,
    over: str = "step",
    variant: Variant = PAPER,
) -> Tensor:
    """What each drawn token adds, (batch, T): the divergence found there, with MiniLLM's gradient.

    Logits (batch, T, V) are those that `tokens` (batch, T) were to be drawn from, logp under what they were.
    The returns add gradient and no value. Without single_step, each return holds its own token's reward and
    the value is that of the tokens drawn. Without normalise and clip, the student drawing by itself, the
    expected gradient is that of KL(q || p) of whole sequences.
    """
    log_q, log_p = (
        logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        for logits in (student_logits, teacher_logits)
    )
    fixed, mask = log_q.detach(), mask.to(log_q)
    w = importance_weights(fixed, logp, mask, over)
    R = returns(log_p, fixed, mask, normalise, variant if single_step else replace(variant, own_reward=True))
    kept = 1.0 if clip is None else ~clipped(w, R, clip)
    long = -w * kept * R * (log_q - fixed)
    here = next_token_kl(student_logits, teacher_logits) if single_step else fixed - log_p
    return (long + (w if variant.weigh_single else 1.0) * here) * mask


def minillm(
    model: nn.Module,
    batches: list[Tensor],
    *,
    teacher: nn.Module,
    prompt: int = 16,
    new: int = 32,
    alpha: float = 0.2,
    single_step: bool = True,
    normalise: bool = True,
    clip: float | None = 0.2,
    lm_weight: float = 1.0,
    variant: Variant = PAPER,
    steps: int = 100,
    lr: float = 1e-4,
    weights: str | Sequence[str] = "all",
    checkpoint: str | Path | None = None,
    watch: Callable[[int, float], None] = lambda step, loss: None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """Train a student of `teacher` on what it writes itself after the first `prompt` tokens of each window.

    Each step draws `new` tokens from alpha * teacher + (1 - alpha) * student and moves once, so PPO's several
    passes over a draw do not arise; nothing counts after an end token. lm_weight: of the loss of the windows
    as text, a mean a token, beside a divergence that is a sum over the new ones. The paper starts from a
    student that was fine-tuned on such text. Draws come from torch's global generator, so that a
    `checkpoint` (lightlib.training) goes on bit-equal. weights: which learn, as in `distill`. watch: called
    with each step and its loss, an estimate of the divergence in nats a sequence plus the weighted text
    loss. The report has no rows. Raises ValueError for two vocabularies and for settings out of range.
    """
    check(model, teacher, batches, prompt, new, alpha, inplace)
    options = {"single_step": single_step, "normalise": normalise, "clip": clip, "variant": variant}

    def loss(student: nn.Module, ids: Tensor) -> Tensor:
        value = on_draws(student, teacher, ids[:, :prompt], new, alpha, options)
        return value + lm_weight * next_token_loss(student, ids) if lm_weight else value

    settings = {"prompt": prompt, "new": new, "alpha": alpha, "lm_weight": lm_weight, "loss": repr(options)}
    if checkpoint is not None:
        settings["teacher"] = fingerprint(frozen(teacher, []))
    with changing(model, inplace) as light, only(teacher, []), letting_gradients_through(light):
        learning = chosen(light, weights)
        with whole(learning) if inplace else nullcontext():
            train(
                light, learning, batches, steps=steps, lr=lr, loss=loss,
                shared=settings, checkpoint=checkpoint, watch=watch, progress=progress,
            )  # fmt: skip
    return Compressed(light, Report(()))


def on_draws(
    student: nn.Module, teacher: nn.Module, prompts: Tensor, new: int, alpha: float, options: dict
) -> Tensor:
    """`minillm_loss` of what is drawn after the prompts (batch, prompt), as one number."""
    drawn = sample(student, prompts, new, mix=(teacher, alpha) if alpha else None)
    first = prompts.shape[1]
    mask = until_ends(student, drawn.ids, first)
    ours = logits_of_new(student, drawn.ids, first)
    with torch.no_grad():
        theirs = logits_of_new(teacher, drawn.ids, first).to(ours.device)
    losses = minillm_loss(ours, theirs, drawn.ids[:, first:], drawn.logp, mask, **options)
    return losses.sum() / (mask.sum() if options["variant"].token_mean else len(prompts))


def logits_of_new(model: nn.Module, ids: Tensor, prompt: int) -> Tensor:
    """Logits (batch, new, V), in float32, that each token of ids after `prompt` is drawn from."""
    kept = ids.shape[1] - prompt + 1
    return model(ids.to(device_of(model)), use_cache=False, logits_to_keep=kept).logits[:, :-1].float()


def check(model, teacher, batches, prompt: int, new: int, alpha: float, inplace: bool) -> None:
    if not batches:
        raise ValueError("minillm needs batches of text, whose beginnings are the prompts")
    check_vocabulary(model, teacher)
    if model is teacher and inplace:
        raise ValueError("in place, a model that is its own teacher would change what it learns from")
    shortest = min(ids.shape[1] for ids in batches)
    if not 1 <= prompt <= shortest or new < 1:
        raise ValueError(
            f"prompt={prompt}, new={new}: a window has {shortest} tokens for the prompt, and 1 is to be drawn"
        )
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha={alpha}, the teacher's part of the draw, must lie from 0 to below 1")
