"""What the tasks ask of a model: likelihoods of rows of tokens, and greedy continuations, in batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightlib.quality import LOGITS_AT_ONCE, device_of


def log_likelihoods(model: nn.Module, rows: list[list[int]], title="rows", progress=False) -> list[float]:
    """For each row of token ids the sum of log p(token | those before), in nats, from its second token on."""
    sums = [0.0] * len(rows)
    for i, logits in row_logits(model, rows, title, progress):
        following = torch.tensor(rows[i][1:], dtype=torch.long, device=logits.device)[:, None]
        sums[i] = logits[:-1].log_softmax(-1).gather(-1, following).sum().item()
    return sums


@torch.no_grad()
def row_logits(
    model: nn.Module, rows: list[list[int]], title="rows", progress=False
) -> Iterator[tuple[int, Tensor]]:
    """(index of a row, its logits (tokens, vocabulary) in float32), for every row; the longest come first.

    Shorter rows of a batch are padded behind, where a causal model does not look, so any id will do.
    """
    device, order = ready(model, rows), sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    with tqdm(total=len(rows), desc=title, disable=not progress) as bar:
        while order:
            length = len(rows[order[0]])
            size = max(1, LOGITS_AT_ONCE // (length * model.config.vocab_size))
            batch, order = order[:size], order[size:]
            ids = torch.tensor([rows[i] + [0] * (length - len(rows[i])) for i in batch], device=device)
            mask = torch.tensor([[k < len(rows[i]) for k in range(length)] for i in batch], device=device)
            found = model(
                ids, attention_mask=mask.long(), use_cache=False
            ).logits  # (batch, length, vocabulary)
            for i, logits in zip(batch, found, strict=True):
                yield i, logits[: len(rows[i])].float()
            bar.update(len(batch))


@torch.no_grad()
def greedy(model, rows: list[list[int]], new: int, title="rows", progress=False) -> list[list[int]]:
    """The `new` most likely tokens after each row of ids. Rows of one length run together: no padding."""
    from transformers import DynamicCache

    device, found = ready(model, rows, new), [[] for _ in rows]
    with tqdm(total=len(rows), desc=title, disable=not progress) as bar:
        for batch in equal_lengths(rows):
            ids = torch.tensor([rows[i] for i in batch], device=device)  # (batch, length), then (batch, 1)
            cache = DynamicCache(config=model.config)
            for _ in range(new):
                logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                ids = logits[:, -1:].argmax(-1)
                for i, token in zip(batch, ids[:, 0].tolist(), strict=True):
                    found[i].append(token)
            bar.update(len(batch))
    return found


def equal_lengths(rows: list[list[int]], at_most: int = 32) -> Iterator[list[int]]:
    """The indices of rows of one length, `at_most` at once."""
    lengths: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        lengths.setdefault(len(row), []).append(i)
    for same in lengths.values():
        yield from (same[k : k + at_most] for k in range(0, len(same), at_most))


def ready(model: nn.Module, rows: list[list[int]], new: int = 0) -> torch.device:
    """The device for inputs. Raises ValueError where the rows, with `new` tokens after them, do not fit."""
    if not rows or not all(rows):
        raise ValueError("no tokens: give at least one row, and in each row at least one token")
    longest, limit = max(map(len, rows)), getattr(model.config, "max_position_embeddings", None)
    if limit and longest + new > limit:
        raise ValueError(f"{longest} tokens and {new} new ones exceed the model's context of {limit}")
    model.eval()
    return device_of(model)


def encode(tokenizer, text: str) -> list[int]:
    """Token ids, with the special tokens that this tokenizer adds by itself."""
    return tokenizer(text, verbose=False).input_ids


def first_line(tokenizer, ids: list[int]) -> str:
    """The text of an answer, up to its end token or the end of its first line."""
    ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
    return (tokenizer.decode(ids, skip_special_tokens=True).strip().splitlines() or [""])[0]
