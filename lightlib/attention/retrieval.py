"""A needle in a haystack: a fact in a long text, and whether a model still finds it after its cache was cut.

After Kamradt 2023, "Needle in a haystack: pressure testing LLMs". The fact and its question share their
wording, so that a small model that only copies finds it with a full cache; what is lost is the cache's fault.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from lightlib.attention.open_cache import OpenCache
from lightlib.quality import device_of
from lightlib.report import table, tidy

QUESTIONS = ("after", "within")
CITIES = (
    "Paris", "London", "Rome", "Madrid", "Berlin", "Vienna", "Athens", "Dublin", "Oslo", "Cairo", "Lisbon",
    "Warsaw", "Prague", "Tokyo", "Boston", "Chicago",
)  # fmt: skip


@dataclass(frozen=True)
class Needle:
    """A sentence that states a fact, and the words that ask for it, which its answer continues."""

    sentence: str
    question: str
    answer: str


def needles(n: int, seed: int = 0, digits: int = 5) -> list[Needle]:
    """`n` needles, each with a city and a number of so many digits; the first ones have different cities."""
    if n < 1 or digits < 1:
        raise ValueError(f"n={n}, digits={digits}: both must be at least 1")
    lots, found = random.Random(seed), []
    order = lots.sample(CITIES, len(CITIES))
    for i in range(n):
        question = f" Remember this: the secret code of {order[i % len(order)]} is"
        answer = " " + "".join(lots.choice("0123456789") for _ in range(digits))
        found.append(Needle(f"{question}{answer}.", question, answer))
    return found


def haystack(tokenizer, filler: str, needle: str, depth: float, length: int, start: int = 0) -> Tensor:
    """Ids (length,): `filler` from token `start` on, with the needle at the end of a sentence near `depth`.

    depth 0 puts the needle first, 1 puts it last. Raises ValueError where it cannot be placed.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth}: give the share of the filler that comes before the needle, 0 to 1")
    fact, hay = ids_of(tokenizer, needle), ids_of(tokenizer, filler)[start:]
    room = length - len(fact)
    if not 0 < room <= len(hay):
        raise ValueError(
            f"length={length}: the needle has {len(fact)} tokens and the filler {len(hay)} from its token "
            f"{start} on; take a length from {len(fact) + 1} to {len(fact) + len(hay)}"
        )
    ends = [0, room, *(i + 1 for i in range(room) if tokenizer.decode(hay[i]).endswith("."))]
    place = min(ends, key=lambda end: abs(end - depth * room))
    return torch.tensor(hay[:place] + fact + hay[place:room])


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


@dataclass(frozen=True)
class Retrieval:
    """How often the answer was found whole, and its nll in nats a token, over `trials` needles."""

    hit_rate: float
    nll: float
    trials: int
    depth: float
    length: int


def retrieve(
    model: nn.Module,
    tokenizer,
    open_cache: OpenCache,
    filler: str,
    *,
    depth: float = 0.5,
    length: int = 512,
    question: str = "after",
    trials: int = 8,
    seed: int = 0,
) -> Retrieval:
    """Ask for facts at `depth` in `length` tokens of `filler`, of which each trial takes another part.

    question: "after", where the cache has compressed the context before it is asked, or "within", where the
    question is part of the prompt, so that a policy can see what will be needed. Its last token comes after
    the prompt in both cases: all of the answer is read from the compressed cache. A hit: each token of the
    answer is the most likely one, so greedy decoding writes it. With a full cache it makes no difference
    when the question comes. Raises ValueError for a text that does not fit, and for another `question`.
    """
    prompts = check(model, tokenizer, filler, depth, length, question, trials, seed)
    hits, nll, model = 0, 0.0, model.eval()
    for context, asked, answer in prompts:
        if question == "within":
            context, asked = context + asked[:-1], asked[-1:]
        with open_cache(model) as cache:
            logp = answer_logp(model, cache, context, asked, answer)  # (answer, vocabulary)
        wanted = torch.tensor(answer)
        hits += bool((logp.argmax(-1) == wanted).all())
        nll -= logp.gather(-1, wanted[:, None]).mean().item()
    return Retrieval(hits / trials, nll / trials, trials, depth, length)


@torch.no_grad()
def answer_logp(
    model: nn.Module, cache: Cache, context: list[int], asked: list[int], answer: list[int]
) -> Tensor:
    """Log-probabilities (answer, vocabulary), where the answer's tokens come one by one, as in generation."""
    found, device = [], device_of(model)
    for i, part in enumerate((context, asked, *([token] for token in answer[:-1]))):
        ids = torch.tensor([part], device=device)
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        if i > 0:
            found.append(logits[0, -1].float().log_softmax(-1).cpu())
    return torch.stack(found)


def check(model, tokenizer, filler, depth, length, question, trials, seed) -> list[tuple[list[int], ...]]:
    """Context, question and answer of each trial, in ids. Raises ValueError where they do not fit."""
    if question not in QUESTIONS:
        raise ValueError(f"question={question!r}: choose one of {', '.join(QUESTIONS)}")
    tokens, prompts = len(ids_of(tokenizer, filler)), []
    for i, needle in enumerate(needles(trials, seed)):
        start = i * length % max(1, tokens - length)
        context = haystack(tokenizer, filler, needle.sentence, depth, length, start).tolist()
        prompts.append((context, ids_of(tokenizer, needle.question), ids_of(tokenizer, needle.answer)))
    longest = max(sum(map(len, prompt)) for prompt in prompts)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and longest > limit:
        raise ValueError(
            f"length={length}: {longest} tokens with question and answer exceed the model's context, {limit}"
        )
    return prompts


@dataclass(frozen=True)
class RetrievalMap:
    """Hit rates (budgets, depths), 0 to 1, and the answers' nll (budgets, depths)."""

    hits: Tensor
    nll: Tensor
    budgets: tuple[float, ...]
    depths: tuple[float, ...]

    def _repr_html_(self) -> str:
        head = ("hit rate at budget", *(f"depth {tidy(depth)}" for depth in self.depths))
        lines = [(tidy(b), *map(tidy, row)) for b, row in zip(self.budgets, self.hits.tolist(), strict=True)]
        return table(head, lines)


def retrieval_map(
    model: nn.Module,
    tokenizer,
    open_budget: Callable[[float], OpenCache],
    budgets: Sequence[float],
    depths: Sequence[float],
    filler: str,
    *,
    length: int = 512,
    question: str = "after",
    trials: int = 8,
    seed: int = 0,
) -> RetrievalMap:
    """`retrieve` for each budget and depth; `lambda keep: partial(attend, score=H2O(), keep=keep)` opens one.

    The same needles and parts of the text in each cell. Raises ValueError without budgets or depths.
    """
    if not budgets or not depths:
        raise ValueError("no budgets or no depths: give at least one of each")

    def one(budget: float, depth: float) -> Retrieval:
        settings = dict(depth=depth, length=length, question=question, trials=trials, seed=seed)
        return retrieve(model, tokenizer, open_budget(budget), filler, **settings)

    rows = [[one(budget, depth) for depth in depths] for budget in budgets]
    hits, nll = (
        torch.tensor([[getattr(r, key) for r in row] for row in rows]) for key in ("hit_rate", "nll")
    )
    return RetrievalMap(hits, nll, tuple(budgets), tuple(depths))
