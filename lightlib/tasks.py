"""Small offline tasks: what a model can still do, beside what guessing scores and a 95% interval."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from lightlib.likelihood import encode, first_line, greedy, log_likelihoods, row_logits
from lightlib.report import table
from lightlib.scores import (
    accuracy,
    bleu_of_counts,
    bootstrap_interval,
    equal_start,
    exact_match,
    f1,
    mean,
    ngram_counts,
    same_start,
    wilson_interval,
)  # fmt: skip
from lightlib.task_data import EXAMPLES, grammar_pairs, question_items
from lightlib.zoo import batches, load_text

LAST_WORD = re.compile(r"(?<=\S) [a-z]{3,}(?=\.\s+[A-Z])")


@dataclass(frozen=True)
class TaskScore:
    """One figure of a task, from 0 to 1, with its 95% interval; `chance`: what guessing scores; n: items."""

    name: str
    metric: str
    value: float
    low: float
    high: float
    chance: float
    n: int
    parts: tuple[TaskScore, ...] = field(default=(), repr=False)

    def _repr_html_(self) -> str:
        return TaskScores((self, *self.parts))._repr_html_()


@dataclass(frozen=True, repr=False)
class TaskScores:
    """Several figures: unpack them, or ask for `scores["questions F1"]`. Shown as a table in a notebook."""

    rows: tuple[TaskScore, ...]

    def __iter__(self) -> Iterator[TaskScore]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, label: str) -> TaskScore:
        return {f"{row.name} {row.metric}": row for row in self.rows}[label]

    def __repr__(self) -> str:
        line = "{:22}{:14}{:7}   [{}]   chance {}   n={}".format
        return "\n".join(line(*cells) for cells in self._cells())

    def _repr_html_(self) -> str:
        return table(("task", "metric", "value", "95% interval", "chance", "items"), self._cells())

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (r.name, r.metric, f"{r.value:.3f}", f"{r.low:.3f} to {r.high:.3f}", f"{r.chance:.3f}", str(r.n))
            for r in self.rows
        ]


def run_tasks(
    model: nn.Module, tokenizer, reference: nn.Module | None = None, *, n: int | None = None, progress=True
) -> TaskScores:
    """All tasks, on at most `n` items each; `agreement` only with a `reference`, the dense model.

    A task raises ValueError for n < 1 and where its prompts exceed the model's context.
    """
    rows = [task(model, tokenizer, n=n, progress=progress) for task in (grammar, cloze)]
    rows += questions(model, tokenizer, n=n, progress=progress)
    if reference is not None:
        prompts = 32 if n is None else min(max(n, 2), 32)
        rows += agreement(model, reference, tokenizer, n=prompts, progress=progress)
    return TaskScores(tuple(rows))


def grammar(model: nn.Module, tokenizer, *, n: int | None = None, progress=True) -> TaskScore:
    """ACC over pairs of sentences that differ in a word: is the grammatical one more likely? Chance is 0.5.

    Likelihood: the sum of the tokens' log-probabilities, not divided by their number; a tie is an error.
    At most `n` of the 240 pairs, of 12 phenomena, whose scores are the `parts`.
    The task is that of BLiMP (Warstadt et al. 2020, arXiv:1912.00582); the sentences are our own.
    """
    pairs = first(grammar_pairs(), n)
    rows = [encode(tokenizer, sentence) for _, good, bad in pairs for sentence in (good, bad)]
    scores = log_likelihoods(model, rows, "grammar", progress)
    hits, kinds = [good > bad for good, bad in zip(scores[::2], scores[1::2], strict=True)], {}
    for (kind, _, _), hit in zip(pairs, hits, strict=True):
        kinds.setdefault(kind, []).append(hit)
    parts = tuple(_proportion(kind, "ACC", part, chance=0.5) for kind, part in kinds.items())
    return _proportion("grammar", "ACC", hits, 0.5, parts)


def cloze(
    model: nn.Module, tokenizer, *, text: str | None = None, n: int | None = None, words=50, progress=True
) -> TaskScore:
    """ACC of sentences' last words, given up to `words` words before them.

    Right where each of the word's tokens is the most likely one, given the true tokens before it.
    Taken are the first `n` sentences of `text` (the held-out prose) that end in a lower-case word of three
    letters or more, with another sentence behind. Chance: always answering with the most frequent last word.
    After LAMBADA (Paperno et al. 2016, arXiv:1606.06031), whose passages were chosen by people, ours are not.
    Raises ValueError where the text has no such sentence.
    """
    text = load_text("prose", "test") if text is None else text
    if words < 1:
        raise ValueError(f"words={words}: the model needs at least one word to go on from")
    ends = first(list(LAST_WORD.finditer(text)), n)
    if not ends:
        raise ValueError("no sentence of the text ends in a lower-case word before another one begins")
    before = [" ".join(text[: end.start()].split()[-words:]) for end in ends]
    rows = [encode(tokenizer, b + end[0]) for b, end in zip(before, ends, strict=True)]
    # some tokenizers cut the words before differently once a word follows
    starts = [max(1, same_start(encode(tokenizer, b), row)) for b, row in zip(before, rows, strict=True)]
    hits = [False] * len(ends)
    for i, logits in row_logits(model, rows, "cloze", progress):
        hits[i] = logits[starts[i] - 1 : -1].argmax(-1).tolist() == rows[i][starts[i] :]
    most = Counter(end[0] for end in ends).most_common(1)[0][1]
    return _proportion("cloze", "ACC", hits, chance=most / len(ends))


def questions(
    model: nn.Module, tokenizer, *, n: int | None = None, new: int = 8, progress=True
) -> TaskScores:
    """(EM, F1) of greedy answers to questions about a story of two or three sentences, just told.

    The prompt is plain text with three worked answers; an answer is what comes before the line's end, at most
    `new` tokens. At most `n` of the 72 questions. Chance: answering with any of the words that fill the
    story's slots. Metrics as in SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250).
    """
    if new < 1:
        raise ValueError(f"new={new}: an answer needs at least one token")
    items = first(question_items(), n)
    prompts = [f"{EXAMPLES}Text: {text}\nQuestion: {asked}\nAnswer:" for text, asked, _, _ in items]
    found = greedy(model, [encode(tokenizer, prompt) for prompt in prompts], new, "questions", progress)
    answers, golds = [first_line(tokenizer, ids) for ids in found], [gold for _, _, gold, _ in items]
    exact, partial = (list(map(metric, answers, golds)) for metric in (exact_match, f1))
    guess_exact, guess_partial = (
        mean([mean([metric(word, gold) for word in words]) for _, _, gold, words in items])
        for metric in (exact_match, f1)
    )
    em = _proportion("questions", "EM", exact, guess_exact)
    return TaskScores((em, _bootstrapped("questions", "F1", partial, mean, guess_partial)))


def agreement(
    model, reference, tokenizer, *, text: str | None = None, n=32, prompt=32, new=32, progress=True
) -> TaskScores:
    """(BLEU, equal tokens) of the model's greedy continuations and the reference's: 1 for the same model.

    `n` prompts of `prompt` tokens, evenly spread over `text` (the held-out prose), are continued by `new`
    tokens, whatever they are. BLEU is over tokens; equal tokens: mean fraction before the first difference.
    Chance: the same figures against the reference's continuations of another prompt.
    Raises ValueError for n < 2, a text of fewer prompts, and models of different vocabularies.
    """
    if n < 2 or new < 1:
        raise ValueError(f"n={n}, new={new}: agreement needs 2 prompts (chance compares two) and 1 new token")
    if model.config.vocab_size != reference.config.vocab_size:
        raise ValueError(
            f"vocabularies of {model.config.vocab_size} and {reference.config.vocab_size} tokens: "
            "the two models must share their tokenizer"
        )
    text = load_text("prose", "test") if text is None else text
    windows = torch.cat(batches(tokenizer, text, None, prompt))  # (windows, prompt)
    if n > len(windows):
        raise ValueError(f"the text holds {len(windows)} prompts of {prompt} tokens, not {n}")
    rows = windows[:: len(windows) // n][:n].tolist()
    ours, theirs = (greedy(part, rows, new, "agreement", progress) for part in (model, reference))
    scores = []
    for metric, each, total in (("BLEU", ngram_counts, bleu_of_counts), ("equal tokens", equal_start, mean)):
        same, other = (list(map(each, ours, against)) for against in (theirs, theirs[1:] + theirs[:1]))
        scores.append(_bootstrapped("agreement", metric, same, total, total(other)))
    return TaskScores(tuple(scores))


def first(items: list, n: int | None) -> list:
    """The first `n` items, or all for None."""
    if n is not None and n < 1:
        raise ValueError(f"n={n}: must be at least 1")
    return items[:n]


def _proportion(name, metric, hits: list[bool], chance: float, parts=()) -> TaskScore:
    low, high = wilson_interval(sum(hits), len(hits))
    return TaskScore(name, metric, accuracy(hits), low, high, chance, len(hits), parts)


def _bootstrapped(name, metric, items: list, statistic: Callable, chance: float) -> TaskScore:
    low, high = bootstrap_interval(items, statistic)
    return TaskScore(name, metric, statistic(items), low, high, chance, len(items))
