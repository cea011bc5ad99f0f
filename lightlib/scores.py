"""Figures of small tasks: ACC, EM, F1, BLEU, and intervals that say how little a few dozen items prove."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import string
from collections import Counter
from collections.abc import Callable, Sequence


def accuracy(hits: Sequence[bool]) -> float:
    """The fraction that is right.

    >>> accuracy([True, True, False, True])
    0.75
    """
    return mean(hits)


def exact_match(answer: str, gold: str) -> bool:
    """Whether the two have the same words after `normalise`."""
    return normalise(answer) == normalise(gold)


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the answer's words after `normalise`, each occurrence counted.

    >>> f1("in the old garden", "garden")
    0.5
    """
    ours, theirs = normalise(answer), normalise(gold)
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * (Counter(ours) & Counter(theirs)).total() / (len(ours) + len(theirs))


def normalise(answer: str) -> list[str]:
    """The words of an answer in lower case, without punctuation, a, an, the."""
    plain = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def bleu(candidates: Sequence[Sequence], references: Sequence[Sequence]) -> float:
    """Corpus BLEU-4 of lists of words or tokens, a reference each. Identical lists have 1, disjoint ones 0.

    The geometric mean of the clipped n-gram precisions, n = 1..4, times exp(1 - r / c) where the candidates'
    length c is below the references' r. For n > 1 matches and totals are raised by one, or else a single
    short text without a common 4-gram would have 0.
    Papineni et al. 2002, doi:10.3115/1073083.1073135; smoothing: Lin & Och 2004, doi:10.3115/1220355.1220427
    """
    if not candidates or len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates, {len(references)} references: give one for each")
    return bleu_of_counts(list(map(ngram_counts, candidates, references)))


def ngram_counts(candidate: Sequence, reference: Sequence) -> list[int]:
    """What BLEU needs of one pair: 4 numbers of matches, 4 of n-grams in the candidate, and both lengths."""
    ours, theirs = (
        [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in (1, 2, 3, 4)]
        for words in (candidate, reference)
    )
    matches = [(a & b).total() for a, b in zip(ours, theirs, strict=True)]
    return [*matches, *(a.total() for a in ours), len(candidate), len(reference)]


def bleu_of_counts(counts: Sequence[list[int]]) -> float:
    """BLEU of the whole from the `ngram_counts` of its pairs."""
    *grams, c, r = map(sum, zip(*counts, strict=True))
    matches, totals = grams[:4], grams[4:]
    if matches[0] == 0:
        return 0.0
    logs = [math.log((matches[k] + (k > 0)) / (totals[k] + (k > 0))) for k in range(4)]
    return math.exp(min(0.0, 1 - r / c) + mean(logs))


def same_start(ours: list[int], theirs: list[int]) -> int:
    """How many tokens are the same before the first that differs."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def equal_start(ours: list[int], theirs: list[int]) -> float:
    """The fraction of our tokens before the first that differs."""
    return same_start(ours, theirs) / len(ours)


def wilson_interval(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a proportion, `right` of `n`, from 0 to 1.  Wilson 1927, doi:10.2307/2276774"""
    if n < 1 or not 0 <= right <= n:
        raise ValueError(f"{right} right of {n}: an interval needs at least one item, and right from 0 to n")
    p, shrink = right / n, 1 + z * z / n
    middle = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_interval(
    items: Sequence, statistic: Callable[[list], float], samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95% interval of `statistic(items)`: percentiles over `samples` draws of all items with replacement.

    Items that are all equal give it no width.  Efron 1979, doi:10.1214/aos/1176344552
    """
    if not items or samples < 1:
        raise ValueError(f"{len(items)} items, {samples} samples: a bootstrap needs at least one of each")
    rng = random.Random(seed)
    values = sorted(statistic(rng.choices(items, k=len(items))) for _ in range(samples))
    return values[int(0.025 * samples)], values[math.ceil(0.975 * samples) - 1]


def t_interval(values: Sequence[float], coverage: float = 0.95) -> tuple[float, float]:
    """Interval of the mean of a few independent values, as of seeds, by Student's t.

    Student 1908, doi:10.1093/biomet/6.1.1
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"{n} values do not tell how far they scatter: an interval of a mean needs 2")
    half = t_quantile((1 + coverage) / 2, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return mean(values) - half, mean(values) + half


def t_quantile(share: float, freedom: int) -> float:
    """Below which `share` of Student's t of so many degrees of freedom lies; share from 0.5 to below 1."""
    # in t = sqrt(freedom) tan(angle) the density is a power of a cosine, on a bounded interval
    steps = 20000
    angles = [(i + 0.5) * math.pi / 2 / steps for i in range(steps)]
    density = [math.cos(angle) ** (freedom - 1) for angle in angles]
    wanted, below = (2 * share - 1) * sum(density), itertools.accumulate(density)
    reached = next(i for i, total in enumerate(below) if total >= wanted)
    return math.sqrt(freedom) * math.tan(angles[reached])


def mean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("no items: nothing to take the mean of")
    return sum(values) / len(values)
