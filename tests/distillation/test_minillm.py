"""Expected gradients, enumerated over all sequences, against the exact divergence of whole sequences."""

from dataclasses import replace

import pytest
import torch

from lightlib.distillation.losses import mixed
from lightlib.distillation.minillm import (
    PAPER,
    RELEASED,
    clipped,
    importance_weights,
    minillm,
    minillm_loss,
    next_token_kl,
    returns,
)
from lightlib.distillation.sampling import until_end
from lightlib.training import next_token_loss
from tests.conftest import CONFIGS, random_model

END = 0
EXACT = {"normalise": False, "clip": None}
SUMS = replace(PAPER, own_reward=True)


class Tables:
    """A language of `length` tokens out of V: for every prefix its own logits."""

    def __init__(self, seed, V=3, length=3, scale=1.0):
        generator = torch.Generator().manual_seed(seed)
        sizes = [(V,) * (n + 1) for n in range(length)]
        draw = (torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes)
        self.tables = [scale * t for t in draw]
        self.sequences = torch.cartesian_prod(*[torch.arange(V)] * length).view(-1, length)  # all V^length

    def learning(self):
        for table in self.tables:
            table.requires_grad_(True)
        return self

    def logits(self):
        """(sequences, length, V)."""
        y = self.sequences
        return torch.stack([t[tuple(y[:, :n].T)].expand(len(y), -1) for n, t in enumerate(self.tables)], 1)

    def logs(self):
        """Log-probability of every token of every sequence, (sequences, length)."""
        return self.logits().log_softmax(-1).gather(-1, self.sequences[..., None])[..., 0]

    def gradient(self, loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.tables, retain_graph=True)])


def pair(**shape):
    return Tables(0, **shape).learning(), Tables(1, **shape)


def everything(end=None, **shape):
    student, teacher = pair(**shape)
    return student, teacher, until_end(student.sequences, 0, end)


def exact_gradient(student, teacher, mask):
    """Of KL(q || p) over sequences that end where the mask says."""
    q, p = (student.logs() * mask).sum(1), (teacher.logs() * mask).sum(1)
    # what would follow an end token sums to one: each ended sequence is counted by the share of its tails
    tails = (student.logs() * ~mask).sum(1).detach()
    return student.gradient(((q + tails).exp() * (q - p)).sum())


def losses(student, teacher, mask, logp=None, **options):
    """(sequences, length) of `minillm_loss`."""
    logp = student.logs().detach() if logp is None else logp
    return minillm_loss(student.logits(), teacher.logits(), student.sequences, logp, mask, **options)


def expected_gradient(student, teacher, mask, logp=None, **options):
    """The mean over what `logp` draws, by default the student: a sum over all sequences."""
    shares = (student.logs().detach() if logp is None else logp).sum(1).exp()
    return student.gradient((shares * losses(student, teacher, mask, logp, **options).sum(1)).sum())


def off(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("single_step", [True, False])
@pytest.mark.parametrize("end", [None, END])
@pytest.mark.parametrize("shape", [{"V": 3, "length": 3}, {"V": 5, "length": 2}])
def test_the_expected_gradient_is_that_of_the_divergence_of_sequences(shape, end, single_step):
    student, teacher, mask = everything(end, **shape)
    wanted = exact_gradient(student, teacher, mask)
    found = expected_gradient(student, teacher, mask, single_step=single_step, **EXACT)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-10)
    assert wanted.norm() > 0.1


@pytest.mark.parametrize("single_step", [True, False])
def test_the_expected_value_is_the_divergence_of_sequences(single_step):
    student, teacher, mask = everything()
    q, p = student.logs().sum(1), teacher.logs().sum(1)
    value = (q.exp() * losses(student, teacher, mask, single_step=single_step, **EXACT).sum(1)).sum()
    torch.testing.assert_close(value, (q.exp() * (q - p)).sum())


def test_a_student_that_is_its_teacher_stays():
    student, _, mask = everything()
    twin = Tables(0)
    assert losses(student, twin, mask).abs().max() < 1e-12
    assert expected_gradient(student, twin, mask).abs().max() < 1e-12


def test_teacher_mixed_draws_are_unbiased_with_the_weights_of_sequences_and_biased_with_those_of_steps():
    student, teacher, mask = everything()
    wanted = exact_gradient(student, teacher, mask)
    bias = {}
    for alpha in (0.2, 0.5):
        drawn = mixed(teacher.logs(), student.logs(), alpha).detach()
        for over in ("step", "prefix", "sequence"):
            found = expected_gradient(student, teacher, mask, drawn, over=over, **EXACT)
            bias[alpha, over] = off(found, wanted)
    assert max(bias[a, "sequence"] for a in (0.2, 0.5)) < 1e-12
    # of the gradient's size: MiniLLM takes the step's alone, whose bias is small for a small part of teacher
    assert bias[0.2, "step"] == pytest.approx(0.13, abs=0.01)
    assert bias[0.5, "step"] == pytest.approx(0.30, abs=0.01)
    # a product up to the step does not help the returns, whose rewards come from later draws
    assert bias[0.2, "prefix"] == pytest.approx(0.08, abs=0.01)
    assert bias[0.5, "prefix"] == pytest.approx(0.21, abs=0.01)


def test_the_product_up_to_a_step_leaves_the_single_step_without_bias():
    student, teacher, mask = everything()
    own = student.logs().detach()
    drawn = mixed(teacher.logs(), own, 0.5).detach()
    kl = next_token_kl(student.logits(), teacher.logits())
    wanted = student.gradient((own.sum(1).exp()[:, None] * kl).sum())

    def single(over):
        weights = importance_weights(own, drawn, mask, over)
        return student.gradient((drawn.sum(1).exp()[:, None] * weights * kl).sum())

    assert off(single("prefix"), wanted) < 1e-12 and off(single("step"), wanted) > 0.2


def spread(student, teacher, mask, **options):
    """(mean, total variance) of one sequence's gradient."""
    rows = losses(student, teacher, mask, **options).sum(1)
    shares = student.logs().sum(1).exp().detach()
    g = torch.stack([student.gradient(row) for row in rows])  # (sequences, parameters)
    mean = shares @ g
    return mean, (shares @ (g - mean).square()).sum().item()


def test_one_token_has_no_variance_left_where_the_single_step_is_exact():
    student, teacher, mask = everything(V=5, length=1)
    mean, variance = spread(student, teacher, mask, single_step=True, **EXACT)
    same, sampled = spread(student, teacher, mask, single_step=False, **EXACT)
    torch.testing.assert_close(mean, same)
    assert variance < 1e-20 and sampled > 0.1


def variance_left(seed, scale):
    """Variance of a sequence's gradient with the exact single step over that without; the means are equal."""
    student, teacher = Tables(2 * seed, scale=scale).learning(), Tables(2 * seed + 1, scale=scale)
    mask = until_end(student.sequences, 0, None)
    mean, with_step = spread(student, teacher, mask, single_step=True, **EXACT)
    same, without = spread(student, teacher, mask, single_step=False, **EXACT)
    torch.testing.assert_close(mean, same)
    return with_step / without


def test_of_several_tokens_the_exact_single_step_takes_away_variance_as_a_rule():
    near = [variance_left(seed, scale=0.3) for seed in range(6)]
    assert max(near) < 0.85 and min(near) < 0.6
    far = [variance_left(seed, scale=2.0) for seed in range(6)]
    assert sum(far) / 6 < 0.8 and max(far) > 1  # a rule, not a law: the parts of a sum may have cancelled


def test_variance_over_samples_is_the_enumerated_one():
    student, teacher, mask = everything()
    _, wanted = spread(student, teacher, mask, **EXACT)
    shares = student.logs().sum(1).exp().detach()
    drawn = torch.multinomial(shares, 4000, replacement=True, generator=torch.Generator().manual_seed(0))
    rows = losses(student, teacher, mask, **EXACT).sum(1)
    g = torch.stack([student.gradient(row) for row in rows])[drawn]
    assert g.var(0).sum().item() == pytest.approx(wanted, rel=0.1)


def test_the_released_return_counts_the_single_step_twice():
    student, teacher, mask = everything()
    shares = student.logs().sum(1).exp().detach()
    single = student.gradient((shares[:, None] * next_token_kl(student.logits(), teacher.logits())).sum())
    found = expected_gradient(student, teacher, mask, variant=SUMS, **EXACT)
    torch.testing.assert_close(found, exact_gradient(student, teacher, mask) + single)


# sequences that end
class Bag(Tables):
    """One distribution for all places."""

    def __init__(self, probabilities, length):
        self.tables = [torch.tensor(probabilities, dtype=torch.float64).log()]
        self.sequences = torch.cartesian_prod(*[torch.arange(len(probabilities))] * length)

    def logits(self):
        return self.tables[0].expand(*self.sequences.shape, -1)


class Alternating(Bag):
    """a and b take turns, nearly always; each place ends the sequence with probability 0.1, as the first."""

    def logits(self):
        turns = torch.tensor([[0.1, 0.45, 0.45], [0.1, 0.02, 0.88], [0.1, 0.88, 0.02]]).double().log()
        first = turns[:1].expand(len(self.sequences), 1, -1)
        return torch.cat([first, turns[self.sequences[:, :-1]]], 1)


def trained_length(length, normalise):
    """Tokens of a sequence after 400 steps down the expected gradient of a student that cannot take turns."""
    student, teacher = (kind([0.1, 0.45, 0.45], length) for kind in (Bag, Alternating))
    student, mask = student.learning(), until_end(student.sequences, 0, END)
    for _ in range(400):
        step = expected_gradient(student, teacher, mask, normalise=normalise, clip=None)
        student.tables[0].detach().sub_(0.1 * step)
    return (student.logs().sum(1).exp() @ mask.double().sum(1)).item()


@pytest.mark.parametrize("length", [3, 5])
def test_without_normalisation_the_end_is_pushed_up_harder(length):
    student, teacher = (kind([0.1, 0.45, 0.45], length) for kind in (Bag, Alternating))
    student, mask = student.learning(), until_end(student.sequences, 0, END)
    plain, normalised = (
        -expected_gradient(student, teacher, mask, normalise=n, clip=None)[END] for n in (False, True)
    )
    # the end is as likely as the teacher has it, and still every token not written saves its divergence
    assert plain > normalised > 0
    assert plain / normalised == pytest.approx({3: 1.25, 5: 1.74}[length], abs=0.02)


def test_without_normalisation_sequences_get_shorter():
    plain, normalised = (trained_length(5, normalise) for normalise in (False, True))
    assert plain == pytest.approx(1.77, abs=0.02) and normalised == pytest.approx(2.34, abs=0.02)  # from 4.10


# the pieces
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("own", "gamma"), [(False, 1.0), (True, 0.95), (False, 0.5)])
def test_returns_are_sums_by_loop(normalise, own, gamma):
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = -torch.rand(2, 3, 5, generator=generator).double()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    found = returns(log_p, log_q, mask, normalise, replace(PAPER, own_reward=own, gamma=gamma))
    for b, length in enumerate((5, 3, 1)):
        for t in range(5):
            later = range(t if own else t + 1, length)
            wanted = sum(gamma ** (s - later[0]) * (log_p - log_q)[b, s] for s in later)
            wanted = wanted / max(1, len(later)) if normalise else wanted
            assert found[b, t] == pytest.approx(float(wanted if t < length else 0))


def test_whitened_returns_of_counted_tokens_have_mean_zero_and_variance_one():
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = -torch.rand(2, 4, 6, generator=generator).double()
    mask = until_end(torch.randint(0, 3, (4, 6), generator=generator), 0, END)
    found = returns(log_p, log_q, mask, variant=RELEASED)
    assert found[mask].mean().abs() < 1e-9 and found[mask].var(correction=0) == pytest.approx(1, abs=1e-4)
    assert (found[~mask] == 0).all() and not mask.all()


def test_clipping_is_the_gradient_of_ppos_minimum():
    generator = torch.Generator().manual_seed(0)
    R, log_w = torch.randn(2, 200, generator=generator).double()
    log_w = (0.4 * log_w).requires_grad_(True)
    w = log_w.exp()
    (wanted,) = torch.autograd.grad(torch.minimum(w * R, w.clamp(0.8, 1.2) * R).sum(), log_w)
    kept = ~clipped(w.detach(), R, 0.2)
    torch.testing.assert_close(wanted, w.detach() * R * kept)
    assert 20 < (~kept).sum() < 120


def test_weights_of_an_unmixed_draw_are_one_and_an_unknown_kind_is_refused():
    logs, mask = -torch.rand(2, 4), torch.ones(2, 4)
    for over in ("step", "prefix", "sequence"):
        assert torch.equal(importance_weights(logs, logs, mask, over), torch.ones(2, 4))
    with pytest.raises(ValueError, match="over='token'"):
        importance_weights(logs, logs, mask, "token")


# the method
def tiny(seed, vocabulary=5):
    """A Llama of so few tokens that all its sequences can be listed."""
    config = CONFIGS["llama"]()
    config.vocab_size = vocabulary
    model = type(random_model("llama"))(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    return model


PROMPTS = [torch.tensor([[1, 3], [4, 2], [0, 1], [3, 3]])]


@torch.no_grad()
def divergence_of_sequences(student, teacher, new=3):
    """KL(student || teacher) of all continuations of the prompts up to an end (2), nats a sequence."""
    total, ends = 0.0, torch.cartesian_prod(*[torch.arange(5)] * new)
    for prompt in PROMPTS[0]:
        ids = torch.cat([prompt.expand(len(ends), -1), ends], 1)
        q, p = (
            m(ids).logits[:, 1:-1].log_softmax(-1).gather(-1, ids[:, 2:, None])[..., 0]
            for m in (student, teacher)
        )
        total += (q.sum(1).exp() @ ((q - p) * until_end(ids, 2, end=2)).sum(1)).item()
    return total / len(PROMPTS[0])


def trained(student, teacher, **options):
    settings = dict(prompt=2, new=3, steps=40, lr=1e-2, lm_weight=0.0, progress=False)
    torch.manual_seed(0)
    return minillm(student, PROMPTS, teacher=teacher, **{**settings, **options}).model


@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 0.0}, {"single_step": False}, {"normalise": False, "clip": None}, {"variant": RELEASED}],
)
def test_a_student_comes_nearer_to_its_teacher(options):
    student, teacher = tiny(0), tiny(1)
    before = [t.clone() for t in (*student.state_dict().values(), *teacher.state_dict().values())]
    light = trained(student, teacher, **options)
    far, near = (divergence_of_sequences(m, teacher) for m in (student, light))
    assert near < 0.7 * far
    after = [*student.state_dict().values(), *teacher.state_dict().values()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_the_value_that_is_watched_is_the_divergence():
    """Of many draws and no step."""
    student, teacher = tiny(0), tiny(1)
    many, values = [PROMPTS[0].repeat(500, 1)], []
    torch.manual_seed(0)
    minillm(
        student, many, teacher=teacher, prompt=2, new=3, alpha=0.0, lm_weight=0.0, steps=1, lr=0.0,
        watch=lambda _, value: values.append(value), progress=False,
    )  # fmt: skip
    assert values[0] == pytest.approx(divergence_of_sequences(student, teacher), rel=0.1)


def test_the_text_counts_by_its_weight():
    student, losses = tiny(0), []
    for weight in (0.0, 2.0):
        trained(student, tiny(1), steps=1, lm_weight=weight, watch=lambda _, value: losses.append(value))
    with torch.no_grad():
        assert losses[1] - losses[0] == pytest.approx(2 * next_token_loss(student, PROMPTS[0]).item())


def test_broken_off_it_goes_on_to_the_same_weights(tmp_path):
    student, teacher = tiny(0), tiny(1)
    straight = trained(student, teacher, steps=6)

    def interrupt(step, _):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(student, teacher, steps=6, checkpoint=tmp_path, watch=interrupt)
    torch.manual_seed(5)  # another process: the checkpoint brings its generator along
    light = minillm(
        student, PROMPTS, teacher=teacher, prompt=2, new=3, steps=6, lr=1e-2, lm_weight=0.0,
        checkpoint=tmp_path, progress=False,
    ).model  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), light.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"alpha 0.2, now 0.5"):
        trained(student, teacher, steps=6, checkpoint=tmp_path, alpha=0.5)
    with pytest.raises(ValueError, match="with teacher"):
        trained(student, tiny(2), steps=6, checkpoint=tmp_path)


def test_broken_off_in_place_it_leaves_the_values_as_they_were():
    student, teacher = tiny(0), tiny(1)
    before, flags = (
        [p.detach().clone() for p in student.parameters()],
        [p.requires_grad for p in teacher.parameters()],
    )

    def interrupt(step, _):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(student, teacher, inplace=True, watch=interrupt)
    assert all(torch.equal(p, old) for p, old in zip(student.parameters(), before, strict=True))
    assert [p.requires_grad for p in teacher.parameters()] == flags


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt"])
def test_other_families_learn_too(family):
    student, teacher = random_model(family), random_model(family)
    teacher.get_output_embeddings().weight.data *= 2
    light, report = minillm(
        student, [torch.arange(24).view(2, 12)], teacher=teacher, prompt=4, new=5, steps=2, progress=False
    )
    assert len(report) == 0
    assert any(not torch.equal(a, b) for a, b in zip(light.parameters(), student.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "needs batches of text"),
        ({"prompt": 3}, "prompt=3, new=3: a window has 2 tokens"),
        ({"new": 0}, "new=0"),
        ({"alpha": 1.0}, "alpha=1.0, the teacher's part of the draw"),
        ({"teacher": tiny(1, vocabulary=7)}, "the student knows 5 tokens and the teacher 7"),
    ],
)
def test_what_cannot_be_trained_is_refused(change, message):
    given = {"batches": PROMPTS, "teacher": tiny(1), "prompt": 2, "new": 3, "progress": False, **change}
    with pytest.raises(ValueError, match=message):
        minillm(tiny(0), given.pop("batches"), **given)
