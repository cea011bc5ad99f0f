"""What is drawn has the frequencies that it says it has."""

import pytest
import torch

from lightlib.distillation.sampling import sample, until_end
from tests.conftest import CONFIGS, VOCABULARY, random_model


def sharp(family="llama", by=1.5, seed=0):
    """A tiny model whose next tokens are not all alike."""
    model = random_model(family, tied=False)
    head = model.get_output_embeddings().weight
    head.data = (
        by * torch.randn(head.shape, generator=torch.Generator().manual_seed(seed)) / head.shape[1] ** 0.5
    )
    return model


@torch.no_grad()
def next_log_probabilities(model, ids, prompt):
    """(batch, new, V) of one forward without a cache."""
    return model(ids, use_cache=False).logits[:, prompt - 1 : -1].float().log_softmax(-1)


def some_prompts(batch=3, length=5):
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(3))


def a_draw(model, new=6, seed=0, **options):
    return sample(model, some_prompts(), new, generator=torch.Generator().manual_seed(seed), **options)


def test_log_probabilities_are_those_of_the_models_own_forward(model):
    drawn = a_draw(model, new=8)  # longer than the sliding windows of some
    logs = next_log_probabilities(model, drawn.ids, 5).gather(-1, drawn.ids[:, 5:, None])[..., 0]
    assert drawn.ids.shape == (3, 13) and torch.equal(drawn.ids[:, :5], some_prompts())
    torch.testing.assert_close(drawn.logp, logs, atol=2e-4, rtol=0)
    assert torch.equal(drawn.logp, drawn.own_logp) and not drawn.logp.requires_grad


def chi_square(tokens, probabilities):
    """Sum of (seen - expected)^2 / expected, tokens of which fewer than 5 are expected taken together."""
    seen = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = len(tokens) * probabilities.double()
    rare = expected < 5
    if rare.any():
        seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    return ((seen - expected).square() / expected).sum().item(), len(seen) - 1


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.0), (0.5, 0.0), (1.0, 0.3), (2.0, 1.0)])
def test_frequencies_are_those_of_the_distribution_it_draws_from(temperature, alpha):
    student, teacher = sharp(), sharp(seed=1)
    prompts = some_prompts(1).expand(4000, -1)
    generator = torch.Generator().manual_seed(0)
    mix = (teacher, alpha) if alpha else None
    drawn = sample(student, prompts, 1, temperature=temperature, generator=generator, mix=mix)
    with torch.no_grad():
        q, p = ((m(prompts[:1]).logits[0, -1].double() / temperature).softmax(-1) for m in (student, teacher))
    far, freedom = chi_square(drawn.ids[:, -1], alpha * p + (1 - alpha) * q)
    assert freedom > 10 and far < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations
    other, freedom = chi_square(drawn.ids[:, -1], alpha * q + (1 - alpha) * p)
    assert other > freedom + 40 * (2 * freedom) ** 0.5  # the bound tells the two apart


def test_towards_temperature_zero_it_is_greedy(llama):
    drawn = a_draw(llama, temperature=1e-6)
    greedy = next_log_probabilities(llama, drawn.ids, 5).argmax(-1)
    assert torch.equal(drawn.ids[:, 5:], greedy)
    torch.testing.assert_close(drawn.logp, torch.zeros(3, 6))


def test_all_of_the_teacher_is_the_teacher_and_none_of_it_the_student():
    student, teacher = sharp(), sharp(seed=1)
    whole, alone = a_draw(student, mix=(teacher, 1.0)), a_draw(teacher)
    assert torch.equal(whole.ids, alone.ids) and torch.equal(whole.logp, alone.logp)
    none, own = a_draw(student, mix=(teacher, 0.0)), a_draw(student)
    assert torch.equal(none.ids, own.ids) and torch.equal(none.logp, own.logp)
    logs = next_log_probabilities(student, whole.ids, 5).gather(-1, whole.ids[:, 5:, None])[..., 0]
    torch.testing.assert_close(whole.own_logp, logs, atol=2e-4, rtol=0)


def test_importance_weights_of_a_mixture_have_mean_one():
    student, teacher = sharp(by=1.0), sharp(by=1.0, seed=1)
    prompts, generator = some_prompts(1).expand(3000, -1), torch.Generator().manual_seed(0)
    drawn = sample(student, prompts, 2, generator=generator, mix=(teacher, 0.2))
    weights = (drawn.own_logp - drawn.logp).exp()
    assert weights.max() <= 1 / 0.8 + 1e-5  # the student has four fifths of every draw
    error = weights[:, 0].std() / 3000**0.5
    assert abs(weights[:, 0].mean() - 1) < 4 * error and weights.std() > 0.1


def test_the_same_random_state_gives_the_same_tokens(llama):
    assert torch.equal(a_draw(llama).ids, a_draw(llama).ids)
    assert not torch.equal(a_draw(llama).ids, a_draw(llama, seed=1).ids)
    state, runs = torch.get_rng_state(), []
    for _ in range(2):  # without a generator the global state decides, and moves on
        torch.set_rng_state(state)
        runs += [sample(llama, some_prompts(), 6).ids, sample(llama, some_prompts(), 6).ids]
    assert torch.equal(runs[0], runs[2]) and torch.equal(runs[1], runs[3])
    assert not torch.equal(runs[0], runs[1])


def test_what_follows_the_first_end_token_does_not_count():
    ids = torch.tensor([[7, 5, 2, 5, 2], [2, 2, 5, 5, 5], [2, 5, 5, 5, 5]])
    counted = until_end(ids, prompt=1, end=2)
    assert counted.int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert until_end(ids, prompt=1, end=None).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": torch.zeros(4, dtype=torch.long)}, r"shape \(4,\), not \(batch, prompt\)"),
        ({"new": 0}, "new=0"),
        ({"new": 60}, "prompt 5 \\+ new 60 tokens exceed a context of 64"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"mix": 1.5}, "alpha=1.5"),
    ],
)
def test_what_cannot_be_drawn_is_refused(llama, change, message):
    if "mix" in change:
        change["mix"] = (llama, change["mix"])
    with pytest.raises(ValueError, match=message):
        sample(**{"model": llama, "prompts": some_prompts(), "new": 3, **change})


def test_a_teacher_of_another_vocabulary_is_refused(llama):
    config = CONFIGS["llama"]()
    config.vocab_size = 50
    other = type(llama)(config)
    with pytest.raises(ValueError, match="the teacher knows 50 tokens and the model 96"):
        sample(llama, some_prompts(), 2, mix=(other, 0.5))
