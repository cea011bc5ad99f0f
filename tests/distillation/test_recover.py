import copy
import itertools
import json

import pytest
import torch

from lightlib.attention import gqa
from lightlib.distillation import recover as module
from lightlib.distillation.distill import distill
from lightlib.distillation.recover import recover, steps_within
from lightlib.lowrank.svd import svd
from lightlib.quality import divergence
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from lightlib.slicing.slicegpt import slicegpt
from lightlib.sparsity.magnitude import magnitude
from lightlib.structured.cfsp import cfsp
from tests.distillation.test_distill import same, sharp, windows


def ticking(monkeypatch, step=1.0):
    """A clock on which every look at it is a step later."""
    ticks = itertools.count()
    monkeypatch.setattr(module, "perf_counter", lambda: step * next(ticks))


def run(light, teacher, batches=None, **settings):
    known = {"minutes": 1.0, "lr": 3e-3, "progress": False}
    return recover(light, teacher, batches or windows(), **known | settings).model


STUDENTS = {
    "sparse": lambda model, data: magnitude(model, sparsity=0.6, progress=False),
    "sliced": lambda model, data: slicegpt(model, data, progress=False),
    "pruned": lambda model, data: cfsp(model, data, fraction=0.5, round_to=1, progress=False),
    "factorized": lambda model, data: svd(model, data, fraction=0.6, progress=False),
    "quantized": lambda model, data: rtn(model, grid=Int(2, group_size=16), progress=False),
    "shared heads": lambda model, data: gqa.share_heads(model, data, progress=False),
}


@pytest.mark.parametrize("kind", STUDENTS)
def test_whatever_was_compressed_comes_nearer_to_its_parent_in_its_own_shape(kind, monkeypatch):
    teacher = sharp()
    light, seen = STUDENTS[kind](teacher, windows()).model, []
    before = copy.deepcopy(light)
    ticking(monkeypatch, step=2.0)
    better = run(light, teacher, lr=2e-4, watch=lambda _, x: seen.append(x))
    # 60 s less a tenth, less 24 s until the trials have ended, at 2 s a step
    assert len(seen) == 15 and same(light, before)
    assert divergence(better, teacher, windows()).mean_kl < divergence(light, teacher, windows()).mean_kl
    shapes = [{name: t.shape for name, t in m.state_dict().items()} for m in (better, light)]
    assert shapes[0] == shapes[1]
    for ours, theirs in zip(better.modules(), light.modules(), strict=True):
        if hasattr(ours, "layouts"):
            assert torch.equal(ours.mask(), theirs.mask())
            assert ((ours.dense() != 0) <= theirs.mask()).all()


def test_timing_moves_nothing_so_it_is_the_distillation_of_as_many_steps(monkeypatch):
    teacher = sharp()
    light = magnitude(teacher, sparsity=0.6, progress=False).model
    ticking(monkeypatch)
    found = run(light, teacher, minutes=0.5)  # 27 s, less 12
    settings = {"lr": 3e-3, "warmup": 1, "weights": "blocks", "progress": False}
    known = distill(light, windows(), teacher=teacher, steps=15, **settings).model
    assert same(found, known)


def test_where_steps_are_slow_two_are_timed_and_the_others_move_something(monkeypatch):
    teacher, seen = sharp(), []
    light = magnitude(teacher, sparsity=0.6, progress=False).model
    ticking(monkeypatch, step=5.0)
    run(light, teacher, watch=lambda step, _: seen.append(step))
    assert seen == list(range(5))  # 54 s, less 25


def test_the_number_of_steps_is_what_fits_by_the_mean_time_a_token():
    assert steps_within(10.0, [5.0, 6.0, 7.0, 8.0], [100]) == 10
    assert steps_within(10.0, [5.0, 6.0, 9.0, 10.0], [100]) == 6
    assert steps_within(10.0, [0.0, 2.0, 3.0, 5.0], [100, 200]) == 6  # 1.5 s: 10 ms a token, 150 tokens
    assert steps_within(10.0, [0.0, 2.0, 4.0, 6.0], [100, 100], accumulate=2) == 5
    assert steps_within(0.5, [0.0, 1.0, 2.0, 3.0], [100]) == 0
    assert steps_within(-3.0, [0.0, 1.0, 2.0, 3.0], [100]) == 0


def test_a_time_in_which_no_step_fits_is_refused_and_the_model_is_as_it_was(monkeypatch):
    teacher = sharp()
    light = magnitude(teacher, sparsity=0.6, progress=False).model
    before = copy.deepcopy(light)
    with pytest.raises(ValueError, match="minutes=0: recovery takes time"):
        run(light, teacher, minutes=0)
    ticking(monkeypatch)
    with pytest.raises(ValueError, match=r"minutes=0.05 leave no time for a step; give more"):
        run(light, teacher, minutes=0.05, inplace=True)
    assert same(light, before)


def test_broken_off_it_goes_on_with_the_steps_that_it_had_planned(monkeypatch, tmp_path):
    teacher = sharp()
    light, steps = magnitude(teacher, sparsity=0.6, progress=False).model, []
    ticking(monkeypatch)
    whole = run(light, teacher, minutes=0.5)

    def broken(step, _):
        if step == 9:
            raise KeyboardInterrupt

    ticking(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(light, teacher, minutes=0.5, checkpoint=tmp_path, watch=broken)
    assert json.loads((tmp_path / "steps.json").read_text()) == {"minutes": 0.5, "steps": 15}
    ticking(monkeypatch, step=0.1)  # the machine is faster now
    again = run(light, teacher, minutes=0.5, checkpoint=tmp_path, watch=lambda s, _: steps.append(s))
    assert steps == list(range(10, 15)) and same(again, whole)
    with pytest.raises(ValueError, match=r"is of a recovery in 0\.5 minutes, now 1\.0; take another folder"):
        run(light, teacher, checkpoint=tmp_path)


def test_in_place_it_is_the_callers_model_that_recovers(monkeypatch):
    teacher = sharp("gpt2")
    light = magnitude(teacher, sparsity=0.6, progress=False).model
    before = copy.deepcopy(light)
    ticking(monkeypatch)
    assert run(light, teacher, minutes=0.2, inplace=True) is light and not same(light, before)


@pytest.mark.alone
def test_it_ends_within_its_minutes():
    from time import perf_counter

    teacher, seen = sharp(), []
    light = magnitude(teacher, sparsity=0.6, progress=False).model
    begin = perf_counter()
    run(light, teacher, minutes=0.05, watch=lambda step, _: seen.append(step))
    assert 0.5 < perf_counter() - begin < 4.5 and len(seen) > 20
