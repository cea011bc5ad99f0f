import contextlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightlib.attention.kv_quantization import quantized
from lightlib.attention.open_cache import full
from lightlib.attention.retrieval import CITIES, haystack, needles, retrieval_map, retrieve
from lightlib.zoo import load_model

ANIMALS, PLACES = ("dog", "cat", "hen", "goose"), ("house", "river", "wood", "town", "field")
FILLER = " ".join(
    f"The {age} {animal} went to the {place}."
    for age in ("old", "new", "big")
    for animal in ANIMALS
    for place in PLACES
)


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", progress=False)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return tiny[1]


class Memory:
    """A cache that holds ids; `keep` says which of them stay after each call."""

    def __init__(self, keep):
        self.ids, self.keep = [], keep


def memory(keep=lambda ids: ids):
    return lambda model: contextlib.nullcontext(Memory(keep))


class Copier(nn.Module):
    """Says what came after the same words before: as many of them as the cache holds, and the last time."""

    def __init__(self, vocabulary):
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=1000, vocab_size=vocabulary)
        self.table = nn.Embedding(1, 1)

    def get_input_embeddings(self):
        return self.table

    def forward(self, ids, past_key_values, use_cache, logits_to_keep):
        past_key_values.ids += ids[0].tolist()
        following = copied(past_key_values.ids)
        past_key_values.ids = past_key_values.keep(past_key_values.ids)
        logits = torch.zeros(1, 1, self.config.vocab_size)
        logits[..., following] = 20.0
        return SimpleNamespace(logits=logits)


def copied(ids):
    for n in range(12, 0, -1):
        for begin in range(len(ids) - n - 1, -1, -1):
            if ids[begin : begin + n] == ids[-n:]:
                return ids[begin + n]
    return 0


@pytest.fixture
def copier(tokenizer):
    return Copier(len(tokenizer))


# texts
def test_a_haystack_has_its_length_and_holds_the_needle_whole(tokenizer):
    needle = needles(1)[0]
    for depth in (0, 0.3, 0.5, 1):
        ids = haystack(tokenizer, FILLER, needle.sentence, depth, 300)
        assert ids.shape == (300,) and tokenizer.decode(ids).count(needle.sentence) == 1


def test_depth_is_where_the_needle_stands_and_no_sentence_is_cut(tokenizer):
    needle = needles(1)[0].sentence
    before = [
        tokenizer.decode(haystack(tokenizer, FILLER, needle, d, 400)).split(needle)[0] for d in (0, 0.5, 1)
    ]
    whole = len(tokenizer.decode(haystack(tokenizer, FILLER, needle, 1, 400))) - len(needle)
    assert before[0] == "" and len(before[2]) == whole
    assert before[1].endswith(".") and abs(len(before[1]) - whole / 2) < 40


def test_the_rest_of_a_haystack_is_the_filler(tokenizer):
    needle = needles(1)[0].sentence
    ids = tokenizer(FILLER, add_special_tokens=False).input_ids
    fact = len(tokenizer(needle, add_special_tokens=False).input_ids)
    text = tokenizer.decode(haystack(tokenizer, FILLER, needle, 0.5, 200, start=50))
    assert text.replace(needle, "") == tokenizer.decode(ids[50 : 250 - fact])


def test_needles_differ_and_are_the_same_each_time():
    found = needles(len(CITIES), seed=3)
    assert found == needles(len(CITIES), seed=3) != needles(len(CITIES), seed=4)
    assert len({needle.question for needle in found}) == len(CITIES)
    for needle in found:
        assert needle.sentence == f"{needle.question}{needle.answer}." and len(needle.answer) == 6


def test_a_text_that_is_too_short_is_refused(tokenizer):
    needle = needles(1)[0].sentence
    with pytest.raises(ValueError, match="take a length from"):
        haystack(tokenizer, "Too short.", needle, 0.5, 300)
    with pytest.raises(ValueError, match="take a length from"):
        haystack(tokenizer, FILLER, needle, 0.5, 5)
    with pytest.raises(ValueError, match=r"depth=1\.5"):
        haystack(tokenizer, FILLER, needle, 1.5, 300)


# what is found
@pytest.mark.parametrize("question", ["after", "within"])
def test_what_is_held_is_found_and_what_is_gone_is_not(copier, tokenizer, question):
    find = partial(retrieve, copier, tokenizer, filler=FILLER, length=200, trials=3, question=question)
    for depth in (0, 0.5, 1):
        found = find(memory(), depth=depth)
        assert found.hit_rate == 1 and found.nll < 1e-3
    recent = memory(lambda ids: ids[-100:])
    assert find(recent, depth=0).hit_rate == 0 and find(recent, depth=0).nll > 5
    assert find(recent, depth=0.9).hit_rate == 1


def test_a_cache_that_keeps_what_is_asked_for_needs_the_question_in_the_prompt(copier, tokenizer):
    def like_the_end(ids):
        """The last ten tokens, and thirty from where the words before the last were first said."""
        end = ids[-3:]
        first = next(i for i in range(len(ids)) if ids[i : i + 3] == end)
        return ids[max(0, first - 20) : first + 30] + ids[-20:] if len(ids) > 100 else ids

    find = partial(retrieve, copier, tokenizer, memory(like_the_end), FILLER, length=200, depth=0.4, trials=3)
    assert find(question="within").hit_rate == 1
    assert find(question="after").hit_rate == 0


def test_every_token_of_the_answer_is_read_from_the_compressed_cache(copier, tokenizer):
    forgetful = memory(lambda ids: [])
    for question in ("after", "within"):
        found = retrieve(copier, tokenizer, forgetful, FILLER, length=200, trials=2, question=question)
        assert found.hit_rate == 0 and found.nll == pytest.approx(20, abs=0.1)


def test_with_a_full_cache_it_makes_no_difference_when_the_question_comes(tiny):
    model, tokenizer = tiny
    find = partial(retrieve, model, tokenizer, full, FILLER, length=120, trials=2)
    assert find(question="after").nll == pytest.approx(find(question="within").nll, rel=1e-4)
    cache = partial(quantized, bits=1, group_size=8, residual=0)
    assert retrieve(model, tokenizer, cache, FILLER, length=120, trials=2).nll != find().nll


def test_a_map_has_a_row_for_each_budget_and_a_column_for_each_depth(copier, tokenizer):
    found = retrieval_map(
        copier, tokenizer, lambda n: memory(lambda ids: ids[-n:]), [60, 400], [0, 0.5, 0.95], FILLER,
        length=200, trials=2,
    )  # fmt: skip
    assert found.hits.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert found.nll.shape == (2, 3) and found.nll[0, 0] > found.nll[1, 0]
    assert found.budgets == (60, 400) and "depth 0.95" in found._repr_html_()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(question="before"), "'before'"),
        (dict(trials=0), "n=0"),
        (dict(depth=-0.1), r"depth=-0\.1"),
        (dict(length=990), "context, 1000"),
    ],
)
def test_settings_that_do_not_fit_are_refused(copier, tokenizer, settings, words):
    with pytest.raises(ValueError, match=words):
        retrieve(copier, tokenizer, memory(), FILLER * 5, **{"length": 200, **settings})


def test_a_map_of_nothing_is_refused(copier, tokenizer):
    with pytest.raises(ValueError, match="no budgets"):
        retrieval_map(copier, tokenizer, lambda n: memory(), [], [0.5], FILLER)
