"""Words as morphemes: govern|ment|s. The table that says which vectors of an embedding words share.

A segmenter learns from the words alone: the fewest morphemes that spell them briefly (Morfessor Baseline,
Creutz & Lagus 2002; the package `morfessor`). Beside its table stand the controls: the same rows handed to
other words, random codes, and pads that are told apart by a hash.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

PAD = ""
SPACE, CAPITAL, CAPITALS = "\u2581", "<Aa>", "<AA>"  # a space in front, a first letter, all letters
MARKERS = ("\u0120", "\u2581")  # what tokenizers write for the space in front of a piece


@dataclass(frozen=True)
class Morphemes:
    """Which morphemes make each word.

    names: the morphemes; the first, "", is the pad. index (words, order): the place of each in `names`; where
    a word has more than `order`, the last ones are joined to one. fits: the share of words that have not.
    """

    names: tuple[str, ...]
    index: Tensor
    fits: float

    def of(self, word: int) -> list[str]:
        """The morphemes of a word, given its row, without pads."""
        return [self.names[i] for i in self.index[word].tolist() if i]


def train_segmenter(words: Sequence[str], *, most: int = 6000, seed: int = 0):
    """A Morfessor model of the first `most` different words in lower case, each counted once.

    Counted as often as they occur, frequent words would stay whole. 6000 words take some 10 seconds.
    """
    from morfessor import BaselineModel

    model = BaselineModel()
    kinds = list(dict.fromkeys(word.lower() for word in words if word))[:most]
    if not kinds:
        raise ValueError("no words to learn morphemes from")
    model.load_data((1, word) for word in kinds)
    with quiet_and_repeatable(seed):
        model.train_batch()
    return model


@contextmanager
def quiet_and_repeatable(seed: int) -> Iterator[None]:
    """Morfessor without its dots on the screen; Python's own random numbers go on as if it had not run."""
    from morfessor import utils

    shown, state = utils.show_progress_bar, random.getstate()
    utils.show_progress_bar = False
    random.seed(seed)
    try:
        yield
    finally:
        utils.show_progress_bar = shown
        random.setstate(state)


def segment(words: Sequence[str], order: int = 3, segmenter=None) -> Morphemes:
    """The morphemes of words in lower case, by a segmenter that is trained on them if none is given."""
    segmenter = segmenter or train_segmenter(words)
    return indexed([split(word.lower(), segmenter) for word in words], order)


def of_vocabulary(tokenizer, order: int = 3, segmenter=None) -> Morphemes:
    """The morphemes of each piece of a tokenizer, by its id.

    A space in front and capitals are morphemes of their own, before those of the letters in lower case. A
    piece of digits, signs, bytes or mixed letters is one morpheme, and so is a special token.
    """
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    # byte-level vocabularies spell other letters than ASCII as bytes, which look like letters
    ascii_only = any(piece.startswith(MARKERS[0]) for piece in pieces)
    special = set(tokenizer.all_special_tokens)
    cut = [[piece] if piece in special else marked(piece) for piece in pieces]
    words = [parts[-1] for parts in cut if is_word(parts[-1], ascii_only)]
    segmenter = segmenter or train_segmenter(words)
    spelled = [
        [*parts[:-1], *cased(parts[-1], segmenter)] if is_word(parts[-1], ascii_only) else parts
        for parts in cut
    ]
    return indexed(spelled, order)


def marked(piece: str) -> list[str]:
    """A piece without the space in front of it, and the mark for that."""
    return [SPACE, piece[1:]] if piece.startswith(MARKERS) and len(piece) > 1 else [piece]


def is_word(text: str, ascii_only: bool) -> bool:
    """Whether these are letters, in lower case, capitals, or with a first capital."""
    letters = text.isalpha() and (text.isascii() or not ascii_only)
    return letters and text in (text.lower(), text.upper(), text.capitalize())


def cased(word: str, segmenter) -> list[str]:
    """What its capitals say, if there are any, and its morphemes in lower case."""
    flag = [] if word.islower() else [CAPITAL] if len(word) == 1 or not word.isupper() else [CAPITALS]
    return flag + split(word.lower(), segmenter)


def split(word: str, segmenter) -> list[str]:
    """The morphemes of a word: those it was given in training, otherwise the likeliest."""
    try:
        return segmenter.segment(word)
    except KeyError:
        return segmenter.viterbi_segment(word)[0]


def indexed(spelled: list[list[str]], order: int) -> Morphemes:
    """Morphemes of words that are spelled in them; after the first order - 1, what is left becomes one."""
    if order < 1:
        raise ValueError(f"order={order}: a word has at least one morpheme")
    short = [
        parts if len(parts) <= order else [*parts[: order - 1], "".join(parts[order - 1 :])]
        for parts in spelled
    ]
    place = {name: i for i, name in enumerate(dict.fromkeys([PAD, *(m for parts in short for m in parts)]))}
    rows = [[place[m] for m in parts] + [0] * (order - len(parts)) for parts in short]
    fits = sum(len(parts) <= order for parts in spelled) / max(len(spelled), 1)
    return Morphemes(tuple(place), torch.tensor(rows).view(-1, order), fits)


def shuffled(morphemes: Morphemes, seed: int = 0) -> Morphemes:
    """The same rows handed to other words: as much is shared as before, by words that share nothing."""
    order = torch.randperm(len(morphemes.index), generator=torch.Generator().manual_seed(seed))
    return replace(morphemes, index=morphemes.index[order])


def random_codes(words: int, order: int, count: int, seed: int = 0) -> Morphemes:
    """`order` codes for each word, drawn evenly from as many as `count` morphemes with their pad would be."""
    drawn = torch.randint(1, count, (words, order), generator=torch.Generator().manual_seed(seed))
    return Morphemes((PAD, *map(str, range(1, count))), drawn, 1.0)


def hash_pads(morphemes: Morphemes) -> Morphemes:
    """Every pad gives way to a morpheme that a hash of the word chooses.

    Short words share one pad in a third of all places, which tells none of them apart.
    """
    index = morphemes.index.clone()
    for word, slot in (index == 0).nonzero().tolist():
        spelled = f"{''.join(morphemes.of(word))}/{slot}"
        index[word, slot] = 1 + zlib.crc32(spelled.encode()) % (len(morphemes.names) - 1)
    return replace(morphemes, index=index)
