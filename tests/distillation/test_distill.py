import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from lightlib.adapters.lora import add_lora
from lightlib.decode import generate
from lightlib.decoder import cast
from lightlib.distillation import objective
from lightlib.distillation.distill import continuations, distill
from lightlib.distillation.losses import (
    LOSSES,
    cross_entropy,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    soft_labels,
)
from lightlib.distillation.matching import Match
from lightlib.distillation.objective import Objective
from lightlib.distillation.sampling import sample
from lightlib.distillation.students import fewer_layers
from lightlib.quality import divergence
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from lightlib.sparsity.magnitude import magnitude
from lightlib.training import next_token_loss
from tests.conftest import VOCABULARY, random_model

ROOT = Path(__file__).parents[2]


def windows(count=4, shape=(2, 16), seed=7):
    """Ids without the end token, 2, which would end what is learned."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, shape, generator=generator) for _ in range(count)]


def sharp(family="llama"):
    """A teacher with an opinion: the tiny random model's logits are nearly flat."""
    model = random_model(family)
    model.get_output_embeddings().weight.data *= 2 / model.get_output_embeddings().weight.data.std() / 32**0.5
    return model


def student_of(teacher):
    """Its teacher with other weights in the blocks."""
    student = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(1)
    for p in student.base_model.layers.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return student


def run(student, teacher, batches=None, **settings):
    known = {"steps": 6, "lr": 3e-3, "progress": False}
    return distill(student, batches or windows(), teacher=teacher, **known | settings).model


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def first_loss(student, teacher, **settings):
    seen = []
    run(student, teacher, steps=1, lr=0.0, watch=lambda _, x: seen.append(x), **settings)
    return seen[0]


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


# limits
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(loss):
    teacher = sharp()
    settings = {"loss": loss, "on_policy": 0.5, "match": Match(attention=1.0)}
    assert first_loss(teacher, teacher, **settings) == pytest.approx(0, abs=1e-5)
    student = copy.deepcopy(teacher)
    Objective(teacher, loss)(student, windows()[0]).backward()
    assert max(p.grad.abs().max() for p in student.parameters()) < 1e-5


def test_the_loss_is_the_weighted_sum_on_the_tokens_after_the_first():
    teacher = sharp()
    student, ids = student_of(teacher), windows()[0]
    ours, theirs = (logits_of(one, ids)[:, :-1] for one in (student, teacher))
    soft = soft_labels(ours, theirs, temperature=2.0, loss=reverse_kl)
    by_hand = 0.3 * cross_entropy(ours, ids[:, 1:]) + 0.7 * soft
    found = first_loss(student, teacher, loss=reverse_kl, hard=0.3, temperature=2.0)
    assert found == pytest.approx(by_hand.item(), rel=1e-5)


def test_with_hard_labels_alone_it_is_training_on_the_text_and_asks_no_teacher():
    teacher = sharp()
    student = student_of(teacher)
    teacher.forward = None
    found = first_loss(student, teacher, hard=1.0)
    assert found == pytest.approx(next_token_loss(student, windows()[0]).item(), rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"on_policy": 1.0}, {"sequence_level": True}, {"match": Match()}])
def test_a_student_comes_nearer_to_its_teacher_who_stays_as_it_was(settings):
    teacher = sharp()
    student, before = student_of(teacher), copy.deepcopy(teacher)
    teacher.train()
    teacher.model.layers[0].eval()
    flags = [p.requires_grad_(i % 2 == 0).requires_grad for i, p in enumerate(teacher.parameters())]
    kept = copy.deepcopy(student)
    torch.manual_seed(0)
    learned = run(student, teacher, steps=40, **settings)
    teacher.zero_grad()
    # what the teacher writes stands for its distribution: its likeliest tokens alone
    tests = (
        windows() if not settings.get("sequence_level") else continuations(before, windows(), progress=False)
    )
    measure = next_token_loss if settings.get("sequence_level") else None
    if measure:
        losses = [sum(measure(m, ids).item() for ids in tests) for m in (learned, student)]
    else:
        losses = [divergence(m, before, tests).mean_kl for m in (learned, student)]
    assert losses[0] < 0.8 * losses[1]
    assert same(teacher, before) and same(student, kept)
    assert [p.requires_grad for p in teacher.parameters()] == flags
    assert teacher.training and not teacher.model.layers[0].training


def test_every_family_learns_from_its_teacher_with_all_that_can_be_asked(family, calib):
    teacher = sharp(family)
    student, seen = fewer_layers(teacher, keep=1), []
    torch.manual_seed(0)
    learned = run(
        student, teacher, calib, steps=20, on_policy=0.5, match=Match(hidden=0.1, attention=0.1),
        loss=jensen_shannon, watch=lambda _, x: seen.append(x),
    )  # fmt: skip
    assert all(x == x and x < 100 for x in seen) and len(seen) == 20
    assert divergence(learned, teacher, calib).mean_kl < divergence(student, teacher, calib).mean_kl
    assert learned.config._attn_implementation == student.config._attn_implementation


# what is read
def test_on_policy_the_student_reads_what_it_drew_itself_and_learns_what_follows_the_prompt():
    teacher = sharp()
    student, ids = student_of(teacher), windows()[0]
    torch.manual_seed(3)
    found = first_loss(student, teacher, on_policy=1.0, prompt=5)
    torch.manual_seed(3)
    torch.rand(())
    drawn = sample(student, ids[:, :5], 11).ids
    values = [logits_of(one, drawn)[:, 4:-1] for one in (student, teacher)]
    ended = (drawn[:, 5:] == 2).long()
    by_hand = forward_kl(*values, (ended.cumsum(1) - ended == 0))
    assert found == pytest.approx(by_hand.item(), rel=1e-5)
    assert not torch.equal(drawn, ids)


def test_the_fraction_of_on_policy_steps_is_the_one_asked_for(llama, monkeypatch):
    drawn = []

    def draw(model, prompts, new):
        drawn.append(new)
        return sample(model, prompts, new)

    monkeypatch.setattr(objective, "sample", draw)
    torch.manual_seed(0)
    run(llama, llama, windows(shape=(1, 6)), steps=60, on_policy=0.25, lr=0.0)
    assert 8 <= len(drawn) <= 22 and set(drawn) == {3}


def test_the_teacher_writes_once_and_greedily_and_its_tokens_are_the_labels():
    teacher = sharp()
    student, ids = student_of(teacher), windows()[0]
    written = continuations(teacher, windows(), prompt=6, progress=False)
    assert torch.equal(written[0], generate(teacher, ids[:, :6], 10, compile=False, stop=False))
    assert torch.equal(written[0][:, :6], ids[:, :6])
    found = first_loss(student, teacher, sequence_level=True, prompt=6)
    ended = (written[0][:, 6:] == 2).long()
    counts = ended.cumsum(1) - ended == 0
    by_hand = cross_entropy(logits_of(student, written[0])[:, 5:-1], written[0][:, 6:], counts)
    assert found == pytest.approx(by_hand.item(), rel=1e-5)


def test_nothing_behind_any_of_the_end_tokens_counts(llama):
    llama.generation_config.eos_token_id = [7, 9]
    ids = torch.tensor([[5, 5, 5, 7, 5, 9], [5, 9, 9, 5, 5, 5], [9, 5, 5, 5, 5, 5]])
    expected = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert torch.equal(objective.until_ends(llama, ids, 2), expected)


def test_many_logits_are_compared_a_part_at_a_time_with_the_same_gradient(monkeypatch):
    teacher = sharp()
    student, ids = student_of(teacher), windows()[0]
    compare, found = Objective(teacher, hard=0.2, temperature=2.0), []
    for at_once in (2**24, 7 * VOCABULARY, 1):
        monkeypatch.setattr(objective, "LOGITS_AT_ONCE", at_once)
        student.zero_grad()
        value = compare(student, ids)
        value.backward()
        found.append((value.detach(), student.model.layers[0].mlp.up_proj.weight.grad.clone()))
    for value, slope in found[1:]:
        assert_close(value, found[0][0])
        assert_close(slope, found[0][1], atol=1e-6, rtol=1e-4)


def test_matching_adds_its_loss_and_its_projections_learn_beside():
    teacher = sharp()
    student = student_of(teacher)
    plain = first_loss(student, teacher)
    more = first_loss(student, teacher, match=Match(hidden=2.0))
    again = first_loss(student, teacher, match=Match(hidden=4.0))
    assert more > plain and again - plain == pytest.approx(2 * (more - plain), rel=1e-3)
    seen = []
    run(
        student,
        teacher,
        match=Match(project=True, attention=1.0),
        watch=lambda _, x: seen.append(x),
        steps=12,
    )
    assert seen[-1] < seen[0]


# how it learns
def test_which_weights_learn_is_told():
    teacher = sharp()
    student = student_of(teacher)

    def moved(weights):
        learned = run(student, teacher, steps=2, weights=weights)
        pairs = zip(learned.named_parameters(), student.parameters(), strict=True)
        return {name for (name, p), q in pairs if not torch.equal(p, q)}

    every = {name for name, _ in student.named_parameters()}
    assert moved("all") == every
    assert moved("blocks") == {name for name in every if ".layers." in name}
    assert moved(("1.mlp.up", "model.norm")) == {"model.layers.1.mlp.up_proj.weight", "model.norm.weight"}


def test_two_halves_of_a_batch_teach_as_the_batch_does():
    teacher = sharp()
    student = student_of(teacher)
    halves = [half[None] for ids in windows() for half in ids]
    whole = run(student, teacher)
    for p, q in zip(
        run(student, teacher, halves, accumulate=2).parameters(), whole.parameters(), strict=True
    ):
        assert_close(p, q, atol=1e-4, rtol=0)


def test_in_bf16_the_student_draws_and_learns_and_keeps_float32():
    teacher = sharp()
    student, seen = student_of(teacher), {}
    for precision in (None, "bf16"):
        torch.manual_seed(0)
        seen[precision] = first_loss(student, teacher, precision=precision)
    assert seen["bf16"] == pytest.approx(seen[None], rel=0.05) and seen["bf16"] != seen[None]
    learned = run(student, teacher, precision="bf16", on_policy=1.0, steps=30)
    assert {p.dtype for p in learned.parameters()} == {torch.float32}
    kl = [divergence(m, teacher, windows()).mean_kl for m in (learned, student)]
    assert kl[0] < kl[1]


def test_a_teacher_in_another_dtype_teaches_about_the_same():
    teacher = sharp()
    student = student_of(teacher)
    rounded = cast(copy.deepcopy(teacher), torch.bfloat16)
    assert first_loss(student, rounded) == pytest.approx(first_loss(student, teacher), rel=0.05)
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_sparse_students_keep_their_zeros_and_packed_ones_their_codes(precision):
    teacher = sharp()
    sparse = magnitude(teacher, sparsity=0.6, progress=False).model
    packed = rtn(teacher, grid=Int(2, group_size=16), progress=False).model
    for light in (sparse, packed):
        learned = run(light, teacher, steps=25, precision=precision)
        assert divergence(learned, teacher, windows()).mean_kl < divergence(light, teacher, windows()).mean_kl
        for ours, theirs in zip(learned.modules(), light.modules(), strict=True):
            if hasattr(ours, "layouts"):
                assert torch.equal(ours.mask(), theirs.mask())
            if hasattr(ours, "codes"):
                assert torch.equal(ours.codes, theirs.codes)


def test_updates_of_low_rank_may_be_all_that_learns():
    teacher = sharp()
    student = rtn(teacher, grid=Int(2, group_size=16), progress=False).model
    add_lora(student, rank=4)
    learned = run(student, teacher, steps=25, weights=(".A", ".B"))
    pairs = zip(learned.named_parameters(), student.parameters(), strict=True)
    moved = {name.rpartition(".")[2] for (name, p), q in pairs if not torch.equal(p, q)}
    assert moved == {"A", "B"}
    kl = [divergence(m, teacher, windows()).mean_kl for m in (learned, student)]
    assert kl[0] < kl[1]


# broken off
@pytest.mark.parametrize(
    "settings", [{"on_policy": 0.5}, {"sequence_level": True}, {"match": Match(project=True)}]
)
def test_broken_off_it_goes_on_to_the_same_weights_bit_by_bit(tmp_path, settings):
    teacher = sharp()
    student, steps = student_of(teacher), []

    def broken(step, _):
        if step == 3:
            raise KeyboardInterrupt

    torch.manual_seed(3)
    whole = run(student, teacher, steps=8, **settings)
    torch.manual_seed(3)
    with pytest.raises(KeyboardInterrupt):
        run(student, teacher, steps=8, checkpoint=tmp_path, watch=broken, **settings)
    torch.manual_seed(4)  # another session begins otherwise
    again = run(
        student, teacher, steps=8, checkpoint=tmp_path, watch=lambda s, _: steps.append(s), **settings
    )
    assert steps == [4, 5, 6, 7] and same(again, whole) and not same(again, student)


def test_a_checkpoint_of_another_distillation_is_refused(tmp_path):
    teacher = sharp()
    student = student_of(teacher)
    run(student, teacher, checkpoint=tmp_path, loss=partial(jensen_shannon, beta=0.2))
    calls = [
        (
            "loss jensen_shannon beta=0.2, now jensen_shannon beta=0.3;",
            partial(jensen_shannon, beta=0.3),
            teacher,
        ),
        (r"teacher \w+, now \w+;", partial(jensen_shannon, beta=0.2), student),
    ]
    for said, loss, other in calls:
        with pytest.raises(ValueError, match=said):
            run(student, other, checkpoint=tmp_path, loss=loss)


def test_broken_off_in_place_it_leaves_the_students_values_as_they_were():
    teacher = sharp()
    student = student_of(teacher)
    before = copy.deepcopy(student)

    def broken(step, _):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(student, teacher, watch=broken, inplace=True, match=Match(attention=1.0))
    assert same(student, before) and student.config._attn_implementation == "sdpa"
    assert run(student, teacher, inplace=True) is student and not same(student, before)


# doors
def test_what_cannot_be_distilled_is_refused(llama):
    other = random_model("llama")
    other.resize_token_embeddings(VOCABULARY + 8)
    calls = [
        ({"teacher": other}, "the student knows 96 tokens and the teacher 104; .*resize_token_embeddings"),
        ({"batches": []}, "needs batches of text"),
        ({"hard": 1.5}, "hard=1.5, on_policy=0.0: each must lie from 0 to 1"),
        ({"on_policy": -0.1}, "on_policy=-0.1"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"prompt": 16}, "prompt=16: the shortest window has 16 tokens"),
        ({"weights": ("nothing",)}, "has no such parameters to train"),
        ({"inplace": True}, "its own teacher"),
        ({"accumulate": 0}, "accumulate=0"),
    ]
    for settings, said in calls:
        known = {"teacher": llama, "batches": windows(), "progress": False}
        with pytest.raises(ValueError, match=said):
            distill(llama, **known | settings)
    with pytest.raises(ValueError, match="parameters in bfloat16 lose small updates; train in float32"):
        run(cast(copy.deepcopy(llama), torch.bfloat16), llama)
    with pytest.raises(ValueError, match="'Linear' is not a decoder that lightlib knows"):
        run(torch.nn.Linear(2, 2), llama)
    packed = rtn(llama, grid=Int(8), progress=False).model
    with pytest.raises(ValueError, match="no such parameters to train beside its codes"):
        run(packed, llama, weights=("q_proj",))


def test_a_bar_is_shown_or_nothing(llama, capsys):
    run(llama, llama, sequence_level=True, steps=1, progress=True)
    shown = capsys.readouterr().err
    assert "writing" in shown and "train" in shown
    run(llama, llama, sequence_level=True, steps=1)
    assert capsys.readouterr() == ("", "")


# several processes
SCRIPT = """
import os
import sys
import torch
from tests.distillation.test_distill import run, sharp, student_of, windows

seen, teacher = [], sharp()
learned = run(student_of(teacher), teacher, steps=3, hard=0.2, watch=lambda _, x: seen.append(x))
torch.save([seen, *learned.parameters()], f"{sys.argv[1]}/{os.environ['RANK']}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_distil_as_one_does_from_both_batches(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    ran = subprocess.run(
        [*command, "--nproc-per-node=2", str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    teacher, losses = sharp(), []
    one = run(
        student_of(teacher), teacher, steps=3, hard=0.2, accumulate=2, watch=lambda _, x: losses.append(x)
    )
    for i in range(2):
        seen, *weights = torch.load(tmp_path / f"{i}.pt", weights_only=False)
        assert seen == pytest.approx(losses, abs=1e-5) and len(seen) == 3
        for p, q in zip(weights, one.parameters(), strict=True):
            assert_close(p, q, atol=1e-4, rtol=0)
