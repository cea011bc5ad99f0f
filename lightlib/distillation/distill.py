"""Knowledge distillation: a student learns the next-token distributions of its teacher.

Hinton, Vinyals and Dean 2015, arXiv:1503.02531. Sequences that the teacher writes: Kim and Rush 2016,
arXiv:1606.07947. Sequences that the student writes itself: Agarwal et al. 2023 (GKD), arXiv:2306.13649.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightlib.change import changing
from lightlib.compact import letting_gradients_through
from lightlib.decode import generate
from lightlib.decoder import find_blocks
from lightlib.distillation.losses import Loss, forward_kl
from lightlib.distillation.matching import Match, matching, showing_attention
from lightlib.distillation.objective import Objective, cut
from lightlib.quality import device_of
from lightlib.report import Compressed, Report
from lightlib.training import fingerprint, frozen, only, train, whole


def distill(
    model: nn.Module,
    batches: list[Tensor],
    *,
    teacher: nn.Module,
    loss: Loss = forward_kl,
    hard: float | None = None,
    temperature: float = 1.0,
    on_policy: float = 0.0,
    sequence_level: bool = False,
    prompt: int | None = None,
    match: Match | None = None,
    steps: int = 100,
    lr: float = 1e-4,
    accumulate: int = 1,
    precision: str | None = None,
    warmup: int = 0,
    weights: str | Sequence[str] = "all",
    checkpoint: str | Path | None = None,
    watch: Callable[[int, float], None] = lambda step, loss: None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """Train a student, `model`, towards its teacher on `batches` (batch, length), in one loop for all ways.

    A step's value is hard * cross entropy + (1 - hard) * temperature^2 * loss(both logits / temperature), and
    what `match` adds. loss: of lightlib.distillation.losses, or any function of (student, teacher, mask) that
    is a mean over positions. hard: None is 0, and 1 for what the teacher wrote. A student that equals
    its teacher has, with hard = 0, a loss of 0.

    on_policy: the fraction of steps whose text the student draws itself, after the first `prompt` tokens of
    each window (None: half of it), as long as the window was; no gradient passes the draw, which comes from
    torch's global generator. sequence_level: the teacher continues these prompts once, greedily, in place of
    the windows' text. What is written is learned up to its end token, and its prompt is not.

    weights: "all" that are no codes, "blocks", or parts of parameters' names. steps, lr, accumulate,
    precision, warmup, checkpoint, watch: see lightlib.training. The teacher may be on another device and in
    another dtype; it stays as it is. Sparse layers keep their zeros and packed codes stay. The report has no
    rows.
    Raises ValueError for two vocabularies, settings out of range, and where nothing can be trained.
    """
    hard = float(sequence_level if hard is None else hard)
    check(model, teacher, batches, hard, temperature, on_policy, prompt, inplace)
    with changing(model, inplace) as light, only(teacher, []), letting_gradients_through(light):
        learning = chosen(light, weights)
        ready = matching(match, light, teacher, batches) if match else None
        if sequence_level:
            batches = continuations(teacher, batches, prompt=prompt, progress=progress)
        settings = {
            "loss": named(loss), "hard": hard, "temperature": float(temperature), "match": repr(match),
            "on_policy": float(on_policy), "sequence_level": sequence_level, "prompt": str(prompt),
        }  # fmt: skip
        if checkpoint is not None:
            settings["teacher"] = fingerprint(frozen(teacher, []))
        shown = showing_attention(light, teacher) if match and match.attention else nullcontext()
        with shown, whole(learning) if inplace else nullcontext():
            train(
                light,
                learning + (list(ready.projections.values()) if ready else []),
                batches,
                steps=steps,
                lr=lr,
                loss=Objective(teacher, loss, hard, temperature, on_policy, sequence_level, prompt, ready),
                accumulate=accumulate,
                precision=precision,
                warmup=warmup,
                shared=settings,
                checkpoint=checkpoint,
                watch=watch,
                progress=progress,
            )
    return Compressed(light, Report(()))


def continuations(
    model: nn.Module, batches: list[Tensor], *, prompt: int | None = None, progress: bool = True
) -> list[Tensor]:
    """Each batch (batch, length) with its first `prompt` tokens, or half, continued greedily by the model."""
    found = []
    for ids in tqdm(batches, desc="writing", unit="batch", disable=not progress):
        begin = cut(ids, prompt)
        text = ids[:, :begin].to(device_of(model))
        found.append(generate(model, text, ids.shape[1] - begin, compile=False, stop=False).to(ids.device))
    return found


def chosen(model: nn.Module, weights: str | Sequence[str]) -> list[nn.Parameter]:
    """The parameters that learn, once each. Raises ValueError for none, or in half precision."""
    if weights == "blocks":
        found = [p for block in find_blocks(model).values() for p in block.parameters()]
    else:
        parts = ("",) if weights == "all" else (weights,) if isinstance(weights, str) else tuple(weights)
        found = [p for name, p in model.named_parameters() if any(part in name for part in parts)]
    found = [p for p in dict.fromkeys(found) if p.is_floating_point()]
    if not found:
        raise ValueError(f"weights={weights!r}: the student has no such parameters to train beside its codes")
    if other := [p.dtype for p in found if p.dtype != torch.float32]:
        raise ValueError(
            f"parameters in {str(other[0])[6:]} lose small updates; train in float32, "
            'with precision="bf16" for speed'
        )
    return found


def named(loss: Callable) -> str:
    """A loss by its name, with the settings that `partial` gave it."""
    if isinstance(loss, partial):
        return named(loss.func) + "".join(f" {key}={value}" for key, value in sorted(loss.keywords.items()))
    return getattr(loss, "__qualname__", type(loss).__name__)


def check(model, teacher, batches, hard, temperature, on_policy, prompt, inplace) -> None:
    if not batches:
        raise ValueError("distillation needs batches of text, which the teacher reads too")
    find_blocks(model)  # an unknown architecture is refused by its name
    check_vocabulary(model, teacher)
    if model is teacher and inplace:
        raise ValueError("in place, a model that is its own teacher would change what it learns from")
    if not 0 <= hard <= 1 or not 0 <= on_policy <= 1:
        raise ValueError(f"hard={hard}, on_policy={on_policy}: each must lie from 0 to 1")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0; at 1 the logits are as they are")
    shortest = min(ids.shape[1] for ids in batches)
    if shortest < 2 or (prompt is not None and not 1 <= prompt < shortest):
        raise ValueError(f"prompt={prompt}: the shortest window has {shortest} tokens; leave 1 to predict")


def check_vocabulary(model: nn.Module, teacher: nn.Module) -> None:
    """Raise ValueError unless both have as many tokens; the same ones they must be too."""
    sizes = [one.config.vocab_size for one in (model, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the student knows {sizes[0]} tokens and the teacher {sizes[1]}; they are compared token by "
            "token, so take two models of one tokenizer, padded alike (resize_token_embeddings)"
        )
