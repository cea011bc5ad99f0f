import copy
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from lightlib.distillation.matching import (
    ATTENTION,
    HIDDEN,
    Match,
    attention_kl,
    attention_mse,
    even_places,
    fit_projection,
    hidden_cosine,
    matching,
    showing_attention,
)
from lightlib.distillation.students import fewer_layers
from tests.conftest import VOCABULARY, random_model


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(n, seed=0):
    return torch.linalg.qr(normal(seed, n, n)).Q


IDS = torch.randint(0, VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(5))


def inside(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False, output_hidden_states=True, output_attentions=True)


# on tensors
def test_equal_streams_and_maps_differ_by_0():
    x, weights = normal(0, 2, 5, 8), normal(1, 2, 4, 5, 5).softmax(-1)
    assert all(abs(f(x, x)) < 1e-6 for f in HIDDEN.values())
    assert all(abs(f(weights, weights)) < 1e-6 for f in ATTENTION.values())


def test_the_cosine_knows_directions_alone():
    x = normal(0, 2, 5, 8)
    assert_close(hidden_cosine(7 * x, x), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert hidden_cosine(-x, x).item() == pytest.approx(2)


def test_attention_is_compared_by_rows_and_hidden_keys_count_nothing():
    p, q = (normal(s, 3, 4).softmax(-1) for s in (0, 1))
    by_hand = sum(a * (a / b).log() for a, b in zip(p.flatten(), q.flatten(), strict=True)) / 3
    assert_close(attention_kl(q, p), by_hand)
    padded = [torch.cat([w, torch.zeros(3, 2)], -1) for w in (q, p)]
    assert_close(attention_kl(*padded), by_hand)
    assert_close(attention_mse(*padded), attention_mse(q, p))
    assert attention_mse(torch.eye(2), torch.eye(2).flip(0)) == 2


def test_a_key_that_a_student_ignores_has_a_finite_gradient():
    logits = torch.zeros(1, 2, requires_grad=True)
    p = torch.tensor([[0.3, 0.7]])
    attention_kl(logits.softmax(-1), p).backward()
    assert_close(logits.grad, 0.5 - p)


def test_places_are_even_with_both_ends():
    assert even_places(2, 6) == {0: 0, 1: 3, 2: 6}
    assert even_places(4, 4) == {i: i for i in range(5)}
    assert all(
        even_places(m, n)[m] == n and list(even_places(m, n).values()) == sorted(even_places(m, n).values())
        for m in range(1, 9)
        for n in range(m, 20)
    )


def fitted(x, y, **settings):
    return fit_projection(x.T @ x, y.T @ x, **settings)


def test_a_projection_finds_a_rotation_and_a_wider_stream():
    x, Q, W = normal(0, 80, 8), rotation(8), normal(2, 12, 8)
    assert_close(fitted(x, x @ Q.T, damping=0), Q, atol=1e-5, rtol=0)
    assert_close(fitted(x, x @ W.T, damping=0), W, atol=1e-5, rtol=0)
    assert_close(fitted(x, x @ Q.T), Q, atol=0.05, rtol=0)


def test_a_projection_from_fewer_tokens_than_channels_is_no_larger_than_it_has_to_be():
    x, Q = normal(3, 3, 8), rotation(8)
    W = fitted(x, x @ Q.T)
    assert_close(x @ W.T, x @ Q.T, atol=0.1, rtol=0)
    assert torch.linalg.matrix_norm(W, 2) <= 1.001


# on models
@pytest.mark.parametrize("by", [("mse", "kl"), ("cosine", "mse")])
def test_a_teacher_against_itself_has_0(model, by):
    match, before = (
        Match(attention=1.0, hidden_by=by[0], attention_by=by[1]),
        model.config._attn_implementation,
    )
    with showing_attention(model):
        found = matching(match, model, model, [IDS])
        value = found.loss(inside(model), inside(model))
    assert abs(value.item()) < 1e-5 and not found.projections
    assert model.config._attn_implementation == before


def test_a_rotated_stream_is_far_off_and_a_learned_projection_finds_it_back(llama):
    other, Q = copy.deepcopy(llama), rotation(32)
    student, teacher = inside(llama), inside(llama)
    turned = SimpleNamespace(hidden_states=tuple(x @ Q.T for x in student.hidden_states))
    ids = torch.randint(0, VOCABULARY, (4, 60), generator=torch.Generator().manual_seed(1))
    plain = matching(Match(), llama, other, [ids[:2], ids[2:]])
    assert plain.loss(turned, teacher) > 0.1
    learned = matching(Match(project=True), llama, other, [ids[:2], ids[2:]])
    assert set(learned.projections) == {0, 1, 2}
    for place, weight in learned.projections.items():
        assert_close(weight.detach(), torch.eye(32), atol=0.3, rtol=0, msg=f"place {place}")
        weight.data = Q.T.clone()
    assert learned.loss(turned, teacher).item() == pytest.approx(0, abs=1e-9)


def test_what_is_compared_is_the_mean_over_the_places_asked_for(llama):
    student = random_model("llama")
    for p in student.parameters():
        p.data *= 1.1
    ours, theirs = inside(student), inside(llama)
    found = matching(Match(hidden=3.0, places={1: 1, 2: 2}), student, llama, [IDS])
    by_hand = [torch.nn.functional.mse_loss(ours.hidden_states[i], theirs.hidden_states[i]) for i in (1, 2)]
    assert_close(found.loss(ours, theirs), 3 * sum(by_hand) / 2)


def test_a_narrower_student_learns_its_projections_and_other_heads_compare_by_their_mean(llama):
    config = copy.deepcopy(llama.config)
    config.hidden_size, config.num_attention_heads, config.num_key_value_heads = 16, 2, 1
    config.head_dim = 8
    torch.manual_seed(0)
    student = type(llama)(config).eval()
    with showing_attention(student, llama):
        found = matching(Match(attention=0.5), student, llama, [IDS])
        ours, theirs = inside(student), inside(llama)
    assert {i: tuple(p.shape) for i, p in found.projections.items()} == dict.fromkeys(range(3), (32, 16))
    value = found.loss(ours, theirs)
    value.backward()
    # at the least squares there is nothing to gain from the projections alone
    assert value > 0 and all(p.grad.abs().max() < 0.01 for p in found.projections.values())
    means = [
        attention_kl(a.mean(1), b.mean(1)) for a, b in zip(ours.attentions, theirs.attentions, strict=True)
    ]
    hidden = matching(Match(), student, llama, [IDS]).loss(ours, theirs)
    assert_close(value, hidden + 0.5 * sum(means) / 2)


def test_a_student_of_fewer_layers_looks_at_every_other_one(llama):
    student = fewer_layers(llama, keep=1)
    found = matching(Match(attention=1.0), student, llama, [IDS])
    assert found.places == {0: 0, 1: 2}


def test_settings_that_do_not_fit_are_refused(llama):
    student = fewer_layers(llama, keep=1)
    calls = [
        (Match(hidden=0.0), "give one a weight above 0"),
        (Match(hidden=-1.0, attention=3.0), "hidden=-1.0"),
        (Match(hidden_by="kl"), "choose from mse, cosine and from kl, mse"),
        (Match(places={0: 0, 1: 3}), "the student has 0 to 1, the teacher 0 to 2"),
        (Match(places={1: 1}), "only matches the last; take 1: 2"),
        (Match(places={0: 0}, attention=1.0), "attention needs one behind a block"),
    ]
    for match, said in calls:
        with pytest.raises(ValueError, match=said):
            matching(match, student, llama, [IDS])
