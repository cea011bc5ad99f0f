import copy
import math
import re
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import nn
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from lightlib.likelihood import encode, first_line, greedy, log_likelihoods, row_logits
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from lightlib.scores import (
    accuracy,
    bleu,
    bootstrap_interval,
    exact_match,
    f1,
    mean,
    ngram_counts,
    t_interval,
    wilson_interval,
)
from lightlib.task_data import EXAMPLES, GRAMMAR, STORIES, grammar_pairs, question_items
from lightlib.tasks import TaskScore, agreement, cloze, grammar, questions, run_tasks

TEXT = "We sat in the garden. She ran to the park. He came from the park. They saw the old house. At last."
QUIET = dict(progress=False)


@pytest.fixture(scope="session")
def tokenizer():
    """A token a word or mark, no padding token, and the end token that answers may close with."""
    texts = [s for _, *both in grammar_pairs() for s in both] + [TEXT, EXAMPLES]
    texts += ["\n".join(["Text: Question: Answer:", *item[:3]]) for item in question_items()]
    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    tokens = {word: i for i, word in enumerate(["[END]", "[UNK]", *words])}
    made = Tokenizer(WordLevel(tokens, unk_token="[UNK]"))
    made.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="[END]", unk_token="[UNK]")


@pytest.fixture
def random_llama(tokenizer):
    def make(seed=0):
        torch.manual_seed(seed)
        shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        shape |= dict(attention_dropout=0.5)  # acts in training mode alone
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).eval()

    return make


class Fake(nn.Module):
    """A causal model that knows nothing but `next_logits(tokens so far)`; it remembers them in the cache."""

    def __init__(self, tokenizer, next_logits):
        super().__init__()
        self.config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1)
        self.embedding, self.next_logits = nn.Embedding(len(tokenizer), 1), next_logits

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, ids, attention_mask=None, past_key_values=None, use_cache=False, logits_to_keep=0):
        seen = getattr(past_key_values, "seen", ids[:, :0])
        whole = torch.cat([seen, ids], 1)
        if past_key_values is not None:
            past_key_values.seen = whole
        ends = range(seen.shape[1] + 1, whole.shape[1] + 1)
        rows = [[self.next_logits(tuple(row[:end])) for end in ends] for row in whole.tolist()]
        return SimpleNamespace(logits=torch.stack([torch.stack(row) for row in rows])[:, -logits_to_keep:])


def knowing(tokenizer, rows, last=None):
    """A model that knows these rows by heart, or just their `last` tokens, and finds all else alike."""
    follows = {tuple(row[:k]): row[k] for row in rows for k in range(1, len(row))[-(last or 0) :]}

    def next_logits(before):
        logits = torch.zeros(len(tokenizer))
        if before in follows:
            logits[follows[before]] = 9.0
        return logits

    return Fake(tokenizer, next_logits)


def noise(tokenizer):
    """A model that knows nothing: every context has logits of its own, drawn at random."""
    return Fake(
        tokenizer,
        lambda before: torch.randn(
            len(tokenizer), generator=torch.Generator().manual_seed(hash(before) % 2**31)
        ),
    )


def answering(tokenizer, answer_of):
    """A model that answers each question with `answer_of(item)`, then stops."""
    rows = [
        encode(tokenizer, f"{EXAMPLES}Text: {item[0]}\nQuestion: {item[1]}\nAnswer: {answer_of(item)} [END]")
        for item in question_items()
    ]
    return knowing(tokenizer, rows)


# the metrics


def test_accuracy_is_the_fraction_that_is_right():
    assert accuracy([True, False, True, True]) == 0.75


def test_case_punctuation_and_articles_do_not_count_in_an_answer():
    assert exact_match(" The Red hat.", "red hat") and not exact_match("red hats", "red hat")
    assert exact_match("an apple", "Apple!") and not exact_match("theatre", "atre")


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("in the old garden", "garden", 0.5),  # precision 1/3, recall 1
        ("red red hat", "red red coat", 2 / 3),  # each occurrence counts,
        ("red red red", "red hat coat", 1 / 3),  # as often as both have it
        ("Garden", "the garden", 1.0),
        ("park", "garden", 0.0),
        ("", "garden", 0.0),
        ("the", "", 1.0),
    ],
)
def test_f1_by_hand(answer, gold, expected):
    assert f1(answer, gold) == pytest.approx(expected)


@pytest.mark.parametrize("length", [1, 3, 4, 20])
def test_identical_text_has_bleu_one_and_disjoint_text_zero(length):
    text = [list(range(length)), list(range(length))]
    assert bleu(text, text) == 1.0
    assert bleu(text, [[-1] * length] * 2) == 0.0


def test_bleu_by_hand():
    ours, theirs = (f"the cat {verb} on the mat".split() for verb in ("sat", "is"))
    # 5 of 6 words, 3 of 5 pairs, 1 of 4 triples, 0 of 3 fours; one added from the pairs on
    assert bleu([ours], [theirs]) == pytest.approx((5 / 6 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25)


def test_bleu_clips_repeated_words_and_punishes_shortness_alone():
    counts = ngram_counts(list("aaaaaaa"), list("abcdea"))
    assert (counts[0], counts[4]) == (2, 7)
    assert bleu([list("abcd")], [list("abcdefgh")]) == pytest.approx(math.exp(1 - 8 / 4))
    longer = (4 / 8 * 4 / 8 * 3 / 7 * 2 / 6) ** 0.25
    assert bleu([list("abcdefgh")], [list("abcd")]) == pytest.approx(longer)


def test_bleu_counts_over_the_corpus_and_is_no_mean_of_sentences():
    ours, theirs = [list("abcdef"), list("xy")], [list("abcdef"), list("pq")]
    both = (6 / 8 * 6 / 7 * 1 * 1) ** 0.25
    assert bleu(ours, theirs) == pytest.approx(both)
    assert both != pytest.approx((bleu(ours[:1], theirs[:1]) + bleu(ours[1:], theirs[1:])) / 2)


def test_wilson_interval_has_its_known_values():
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)
    assert wilson_interval(10, 10) == pytest.approx((1 - 0.2775, 1.0), abs=5e-5)


@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (3, 4.303), (4, 3.182), (10, 2.262), (31, 2.042)])
def test_t_interval_has_its_known_widths(n, t):
    values = [1.0, 3.0] + [2.0] * (n - 2)
    half = t * math.sqrt(2 / (n - 1) / n)
    assert t_interval(values) == pytest.approx((2 - half, 2 + half), rel=1e-3)


def test_t_interval_of_equal_values_has_no_width_and_one_value_is_refused():
    assert t_interval([0.5] * 3) == (0.5, 0.5)
    with pytest.raises(ValueError, match="1 values do not tell"):
        t_interval([0.5])


def test_bootstrap_interval_agrees_with_the_normal_one_and_repeats_itself():
    items = [0.0, 1.0] * 200
    low, high = bootstrap_interval(items, mean)
    half = 1.96 * 0.5 / math.sqrt(400)
    assert low == pytest.approx(0.5 - half, abs=0.01) and high == pytest.approx(0.5 + half, abs=0.01)
    assert (low, high) == bootstrap_interval(items, mean) != bootstrap_interval(items, mean, seed=1)
    assert bootstrap_interval([0.25] * 9, mean) == (0.25, 0.25)


def test_metrics_refuse_nothing_with_a_sentence():
    with pytest.raises(ValueError, match="nothing to take the mean of"):
        accuracy([])
    with pytest.raises(ValueError, match="2 candidates, 1 references"):
        bleu([[1], [2]], [[1]])
    with pytest.raises(ValueError, match="0 candidates"):
        bleu([], [])
    for right, n in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"{right} right of {n}: an interval needs"):
            wilson_interval(right, n)
    with pytest.raises(ValueError, match="0 items, 1000 samples"):
        bootstrap_interval([], mean)


# the sentences and questions


def test_every_pair_is_different_and_differs_in_one_word_that_is_not_the_first():
    pairs = grammar_pairs()
    assert len(pairs) == len(set(pairs)) == 240
    for _, good, bad in pairs:
        ours, theirs = good.split(), bad.split()
        assert len(ours) == len(theirs) and sum(a != b for a, b in zip(ours, theirs, strict=True)) == 1
        assert ours[0] == theirs[0] and "_" not in good and "/" not in good + bad


def test_the_first_pairs_hold_all_phenomena_alike():
    assert [kind for kind, *_ in grammar_pairs()] == list(GRAMMAR) * 20


def test_every_answer_is_in_its_story_and_neither_in_its_question_nor_in_the_examples():
    items = question_items()
    assert len(items) == len({(story, question) for story, question, *_ in items}) == 72
    for story, question, answer, candidates in items:
        assert answer in candidates and all(word in story for word in candidates)
        assert not {answer} & set(re.findall(r"\w+", question + EXAMPLES))


def test_the_questions_ask_for_every_slot_alike():
    asked = [answer for _, _, answer, _ in question_items(each=1)]
    assert len(asked) == sum(map(len, STORIES.values())) == 18
    assert question_items(each=1) == question_items()[:18]


# running a model


def test_padding_changes_no_logit(model):
    rows = [[5, 9, 11], list(range(20, 41)), [7], [3, 4, 5, 6, 7, 8, 9, 10, 11]]
    seen = dict(row_logits(model, rows))
    assert sorted(seen) == [0, 1, 2, 3]
    for i, row in enumerate(rows):
        assert_close(seen[i], model(torch.tensor([row])).logits[0], atol=1e-5, rtol=1e-4)


def test_likelihood_is_the_sum_over_all_tokens_but_the_first(llama):
    rows = [[5, 9, 11, 40], [3, 8]]
    expected = []
    for row in rows:
        logp = llama(torch.tensor([row])).logits[0].log_softmax(-1)
        expected.append(sum(logp[k, token].item() for k, token in enumerate(row[1:])))
    assert log_likelihoods(llama, rows) == pytest.approx(expected, rel=1e-5)


def test_greedy_with_its_cache_equals_a_full_forward_for_each_token(model):
    rows = [[5, 9, 11], list(range(20, 35)), [40, 41, 42]]
    for row, new in zip(rows, greedy(model, rows, new=6), strict=True):
        assert len(new) == 6
        for k, token in enumerate(new):
            logits = model(torch.tensor([row + new[:k]])).logits[0, -1]
            assert logits[token] >= logits.max() - 1e-5


def test_rows_that_do_not_fit_are_refused(llama):
    with pytest.raises(ValueError, match="65 tokens and 0 new ones exceed the model's context of 64"):
        list(row_logits(llama, [[1] * 65]))
    with pytest.raises(ValueError, match="60 tokens and 5 new ones exceed"):
        greedy(llama, [[1] * 60], new=5)
    for rows in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one token"):
            greedy(llama, rows, new=1)


def test_an_answer_ends_at_its_end_token_or_line():
    words = ["[END]", "the", "park", "\n", "Question"]
    fake = SimpleNamespace(
        eos_token_id=0, decode=lambda ids, skip_special_tokens: " ".join(words[i] for i in ids)
    )
    assert first_line(fake, [1, 2, 0, 4]) == "the park"
    assert first_line(fake, [1, 2, 3, 4]).strip() == "the park"
    assert first_line(fake, [0, 2]) == ""


# the tasks


def test_a_model_that_prefers_the_good_sentence_scores_one_and_its_opposite_zero(tokenizer):
    for side, value in ((1, 1.0), (2, 0.0)):
        model = knowing(tokenizer, [encode(tokenizer, pair[side]) for pair in grammar_pairs()])
        score = grammar(model, tokenizer, **QUIET)
        assert (score.value, score.chance, score.n) == (value, 0.5, 240)
        assert {part.name: (part.value, part.n) for part in score.parts} == dict.fromkeys(
            GRAMMAR, (value, 20)
        )


def test_a_model_that_knows_nothing_scores_chance(tokenizer):
    score = grammar(noise(tokenizer), tokenizer, **QUIET)
    assert score.low < score.chance < score.high
    assert score.value == pytest.approx(mean([part.value for part in score.parts]))


def test_a_tie_between_two_sentences_is_an_error(tokenizer):
    assert grammar(knowing(tokenizer, []), tokenizer, n=12, **QUIET).value == 0.0


def test_cloze_asks_for_the_last_words_and_counts_the_most_frequent_as_chance(tokenizer):
    sentences = TEXT.split(". ")
    by_heart = [encode(tokenizer, ". ".join(sentences[: k + 1])) for k in range(4)]
    score = cloze(knowing(tokenizer, by_heart), tokenizer, text=TEXT, **QUIET)
    # garden, park, park, house: the last sentence has none behind it
    assert (score.value, score.chance, score.n) == (1.0, 0.5, 4)
    half = cloze(knowing(tokenizer, by_heart[:2], last=1), tokenizer, text=TEXT, **QUIET)
    assert half.value == 0.5 and (half.low, half.high) == wilson_interval(2, 4)


def test_cloze_sees_no_more_than_the_words_before(tokenizer):
    model = knowing(tokenizer, [encode(tokenizer, "in the garden"), encode(tokenizer, "to the park")])
    assert cloze(model, tokenizer, text=TEXT, words=2, **QUIET).value == 0.5
    assert cloze(model, tokenizer, text=TEXT, words=3, **QUIET).value == 0.0


def test_every_token_of_the_last_word_must_be_right(tokenizer):
    letters = {letter: i for i, letter in enumerate("[?abcdefghijklmnopqrstuvwxyzW .")}
    made = Tokenizer(WordLevel(letters, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    spelling = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")
    row = encode(spelling, "We sat in the park")
    assert len(row) == 18
    text = "We sat in the park. We"
    assert cloze(knowing(spelling, [row]), spelling, text=text, **QUIET).value == 1.0
    assert cloze(knowing(spelling, [row[:-1]]), spelling, text=text, **QUIET).value == 0.0


def test_cloze_is_the_same_behind_a_token_that_the_tokenizer_puts_first(tokenizer):
    opening = copy.deepcopy(tokenizer)
    made = processors.TemplateProcessing(single="[END] $A", special_tokens=[("[END]", 0)])
    opening.backend_tokenizer.post_processor = made
    by_heart = [encode(opening, "We sat in the garden")]
    assert by_heart[0] == [0, *encode(tokenizer, "We sat in the garden")]
    assert cloze(knowing(opening, by_heart), opening, text=TEXT, **QUIET).value == 0.25


def test_right_answers_have_em_and_f1_one_and_chance_is_one_of_the_words(tokenizer):
    em, partial = questions(answering(tokenizer, lambda item: item[2]), tokenizer, **QUIET)
    assert (em.metric, em.value, partial.metric, partial.value, em.n) == ("EM", 1.0, "F1", 1.0, 72)
    guess = mean([mean([word == gold for word in words]) for _, _, gold, words in question_items()])
    assert em.chance == pytest.approx(guess) and 1 / 8 < guess < 1 / 6


def test_a_wordy_answer_has_f1_and_no_em(tokenizer):
    scores = questions(answering(tokenizer, lambda item: f"{item[2]} at"), tokenizer, n=18, **QUIET)
    assert scores["questions EM"].value == 0.0
    assert scores["questions F1"].value == pytest.approx(2 / 3)


def test_a_model_agrees_with_itself_and_less_with_another(tokenizer, random_llama):
    text = " ".join(sentence for _, sentence, _ in grammar_pairs())
    knobs = dict(text=text, n=8, prompt=5, new=12, **QUIET)
    score, same = agreement(random_llama(), random_llama(), tokenizer, **knobs)
    assert (score.value, score.low, score.high, same.value) == (1.0, 1.0, 1.0, 1.0)
    assert max(score.chance, same.chance) < 1
    other, other_same = agreement(random_llama(1), random_llama(), tokenizer, **knobs)
    assert other.value < 0.5 and other_same.value < 0.5 and other.low <= other.value <= other.high


def test_equal_tokens_end_at_the_first_difference(tokenizer):
    ours, theirs = (encode(tokenizer, f"We sat in the {end}") for end in ("park and red", "park in red"))
    text = "We sat in the We sat in the"  # four prompts of two tokens, of which the first and the third
    models = (knowing(tokenizer, [row]) for row in (ours, theirs))
    _, same = agreement(*models, tokenizer, text=text, n=2, prompt=2, new=5, **QUIET)
    assert same.value == pytest.approx(3 / 5)


def test_all_tasks_repeat_themselves_also_from_training_mode(tokenizer, random_llama, monkeypatch):
    monkeypatch.setattr("lightlib.tasks.load_text", lambda name, split: TEXT * 20)
    first = run_tasks(random_llama().train(), tokenizer, random_llama(1), n=12, **QUIET)
    assert first == run_tasks(random_llama(), tokenizer, random_llama(1), n=12, **QUIET)
    assert [(row.name, row.metric, row.n) for row in first] == [
        ("grammar", "ACC", 12),
        ("cloze", "ACC", 12),
        ("questions", "EM", 12),
        ("questions", "F1", 12),
        ("agreement", "BLEU", 12),
        ("agreement", "equal tokens", 12),
    ]
    assert all(0 <= row.low <= row.value <= row.high <= 1 and 0 <= row.chance <= 1 for row in first)
    assert len(run_tasks(random_llama(), tokenizer, n=1, **QUIET)) == 4


def test_scores_are_shown_as_tables(tokenizer):
    score = TaskScore(
        "grammar", "ACC", 0.75, 0.7, 0.8, 0.5, 240, (TaskScore("a & b", "ACC", 1, 0.9, 1, 0.5, 20),)
    )
    shown = score._repr_html_()
    assert (
        "0.750" in shown and "0.700 to 0.800" in shown and "a &amp; b" in shown and shown.count("<tr>") == 3
    )


def test_bad_knobs_are_refused_with_a_sentence(tokenizer, random_llama, llama):
    model = random_llama()
    for task in (grammar, cloze, questions):
        with pytest.raises(ValueError, match="n=0: must be at least 1"):
            task(model, tokenizer, n=0, **({"text": TEXT} if task is cloze else {}), **QUIET)
    for text in ("", "nothing here"):
        with pytest.raises(ValueError, match="no sentence of the text ends"):
            cloze(model, tokenizer, text=text, **QUIET)
    with pytest.raises(ValueError, match="text is empty"):
        agreement(model, model, tokenizer, text="", **QUIET)
    with pytest.raises(ValueError, match="words=0"):
        cloze(model, tokenizer, text=TEXT, words=0, **QUIET)
    with pytest.raises(ValueError, match="new=0"):
        questions(model, tokenizer, new=0, **QUIET)
    with pytest.raises(ValueError, match="n=1, new=32: agreement needs 2 prompts"):
        agreement(model, model, tokenizer, text=TEXT, n=1, **QUIET)
    with pytest.raises(ValueError, match="holds 5 prompts of 5 tokens, not 9"):
        agreement(model, model, tokenizer, text=TEXT, n=9, prompt=5, **QUIET)
    with pytest.raises(ValueError, match="must share their tokenizer"):
        agreement(model, llama, tokenizer, text=TEXT, **QUIET)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tasks_run_where_the_model_is(tokenizer, random_llama):
    here, there = (random_llama().to(device) for device in ("cpu", "cuda"))
    text = " ".join(sentence for _, sentence, _ in grammar_pairs())
    _, same = agreement(there, here, tokenizer, text=text, n=8, prompt=5, new=12, **QUIET)
    assert same.value > 0.8
    assert abs(grammar(there, tokenizer, **QUIET).value - grammar(here, tokenizer, **QUIET).value) < 0.05


@pytest.mark.model
def test_the_real_model_is_far_above_chance_and_two_bits_are_not(smollm):
    model, tokenizer = smollm
    light = rtn(model, grid=Int(2, group_size=64), progress=False).model
    dense, two = (grammar(part, tokenizer, n=72, **QUIET) for part in (model, light))
    assert dense.low > 0.7 and two.high < dense.low
    em, _ = questions(model, tokenizer, n=18, **QUIET)
    assert em.low > em.chance
