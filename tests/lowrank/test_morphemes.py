"""Words as morphemes, and the tables that are held against them."""

import random

import pytest
import torch

from lightlib.lowrank.morphemes import (
    CAPITAL,
    CAPITALS,
    SPACE,
    hash_pads,
    indexed,
    of_vocabulary,
    random_codes,
    segment,
    shuffled,
    train_segmenter,
)
from lightlib.zoo import load_model

STEMS = ("teach", "govern", "sing", "walk", "read", "paint", "lead", "farm", "help", "kill")
WORDS = [stem + end for stem in STEMS for end in ("", "er", "ers", "ing", "ed", "ment", "ments")]


class ByHand:
    """A segmenter that knows how its words are spelled."""

    def __init__(self, *spelled):
        self.known = {word.replace("|", ""): word.split("|") for word in spelled}

    def segment(self, word):
        return self.known[word]

    def viterbi_segment(self, word):
        return list(word), 0.0


def test_endings_that_words_share_are_found():
    found = segment(WORDS)
    teachers = found.of(WORDS.index("teachers"))
    assert "".join(teachers) == "teachers" and teachers[0] == "teach"
    assert len(found.names) < len(WORDS) / 2
    assert found.names[0] == "" and found.index.shape == (len(WORDS), 3)


def test_a_segmenter_is_silent_repeats_itself_and_leaves_pythons_random_numbers_alone(capfd):
    random.seed(5)
    expected = random.random()
    random.seed(5)
    first, second = (segment(WORDS) for _ in range(2))
    assert random.random() == expected
    assert first.names == second.names and torch.equal(first.index, second.index)
    assert capfd.readouterr() == ("", "")


def test_words_count_once_and_in_lower_case():
    once, often = (segment(words, segmenter=None) for words in (WORDS, [*WORDS, *["Teachers"] * 50]))
    assert torch.equal(often.index[: len(WORDS)], once.index)
    assert often.of(-1) == once.of(WORDS.index("teachers"))


def test_a_segmenter_spells_words_that_it_never_saw():
    (unseen,) = (segment(["painters", "teacher"], segmenter=train_segmenter(WORDS)).of(0),)
    assert "".join(unseen) == "painters"
    assert "".join(segment(["zebra"], 5, train_segmenter(WORDS)).of(0)) == "zebra"
    with pytest.raises(ValueError, match="no words"):
        train_segmenter([""])


def test_of_long_words_the_last_morphemes_are_joined():
    found = indexed([["a"], ["a", "b"], ["a", "b", "c", "d"]], 3)
    assert found.names == ("", "a", "b", "cd")
    assert found.index.tolist() == [[1, 0, 0], [1, 2, 0], [1, 2, 3]]
    assert found.fits == pytest.approx(2 / 3)
    assert indexed([["a", "b"]], 1).of(0) == ["ab"]
    with pytest.raises(ValueError, match="order=0"):
        indexed([["a"]], 0)


class Pieces:
    def __init__(self, *pieces):
        self.pieces, self.all_special_tokens = pieces, ["<s>"]

    def __len__(self):
        return len(self.pieces)

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[i] for i in ids]


def test_spaces_and_capitals_of_a_tokenizers_pieces_are_morphemes_of_their_own():
    pieces = Pieces(
        "<s>",
        "\u0120Teachers",
        "teachers",
        "TEACHERS",
        "\u0120I",
        "\u0120",
        "12",
        "\u0120,",
        "iPod",
        "\u00c3",
    )
    found = of_vocabulary(pieces, 4, ByHand("teach|er|s", "i"))
    assert [found.of(i) for i in range(len(pieces))] == [
        ["<s>"],
        [SPACE, CAPITAL, "teach", "ers"],
        ["teach", "er", "s"],
        [CAPITALS, "teach", "er", "s"],
        [SPACE, CAPITAL, "i"],
        ["\u0120"],
        ["12"],
        [SPACE, ","],
        ["iPod"],
        ["\u00c3"],  # a byte, not a letter
    ]


def test_letters_that_are_no_bytes_are_spelled_too():
    assert of_vocabulary(Pieces("\u2581\u00dcber"), 3, ByHand("\u00fcb|er")).of(0) == [
        SPACE,
        CAPITAL,
        "\u00fcber",
    ]


def test_every_piece_of_a_real_tokenizer_has_a_spelling_of_its_own():
    _, tokenizer = load_model("tiny", progress=False)
    found = of_vocabulary(tokenizer, 5, train_segmenter(WORDS))
    assert len(found.index) == len(tokenizer)
    rows = {tuple(row) for row in found.index.tolist()}
    assert len(rows) == len(tokenizer) and (0,) * 5 not in rows


def test_shuffled_words_share_as_much():
    found = segment(WORDS)
    other = shuffled(found)
    assert not torch.equal(other.index, found.index)
    assert sorted(other.index.tolist()) == sorted(found.index.tolist())
    assert torch.equal(shuffled(found).index, other.index)
    assert not torch.equal(shuffled(found, seed=1).index, other.index)


def test_random_codes_are_drawn_evenly_and_come_again():
    codes = random_codes(4000, 3, 11)
    assert torch.equal(codes.index, random_codes(4000, 3, 11).index) and len(codes.names) == 11
    counts = codes.index.flatten().bincount(minlength=11)
    assert counts[0] == 0 and counts[1:].min() > 0.85 * 1200


def test_hashed_pads_tell_words_apart_and_leave_morphemes_alone():
    found = segment(WORDS)
    hashed = hash_pads(found)
    pads = found.index == 0
    assert pads.any() and (hashed.index > 0).all()
    assert torch.equal(hashed.index[~pads], found.index[~pads])
    assert len(hashed.index[pads].unique()) > 5
    assert torch.equal(hash_pads(found).index, hashed.index)
