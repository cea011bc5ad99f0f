"""Fitting: what is kept, what batch norms know afterwards, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from lightlib.quantum.baselines import MLP, SIREN
from lightlib.quantum.fitting import fit, predict, settle
from lightlib.quantum.layer import QIREN
from lightlib.quantum.signals import chirp, grid


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def small(kind="qiren"):
    return {
        "qiren": lambda: QIREN(1, 1, qubits=3, layers=2, generator=drawn()),
        "relu": lambda: MLP(1, 1, width=8, generator=drawn()),
        "siren": lambda: SIREN(1, 1, width=8, generator=drawn()),
    }[kind]()


def learnt(model, **knobs):
    signal = chirp(60)
    return signal, fit(model, signal.x, signal.y, progress=False, **knobs)


@pytest.mark.parametrize("kind", ["qiren", "relu", "siren"])
def test_no_steps_change_no_weight(kind):
    model, before = small(kind), list(small(kind).parameters())
    _, made = learnt(model, steps=0)
    assert made.steps == 0 and made.best == made.last == made.curve[0]
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, was)


@pytest.mark.parametrize("kind", ["qiren", "relu", "siren"])
@pytest.mark.parametrize("keep", ["best", "last"])
def test_in_evaluation_the_model_gives_the_error_that_is_reported(kind, keep):
    model = small(kind)
    signal, made = learnt(model, steps=40, lr=0.5, keep=keep)
    assert not model.training and len(made.curve) == 41
    assert made.best < made.last  # so that the two are told apart
    error = F.mse_loss(predict(model, signal.x), signal.y).item()
    assert error == pytest.approx(getattr(made, keep), rel=1e-4)


def test_a_line_is_learnt():
    x = grid(50)
    made = fit(nn.Linear(1, 1), x, 3 * x - 1, steps=400, lr=0.1, progress=False)
    assert made.best < 1e-8 and made.curve[made.best_step] == made.best


def test_the_steps_are_those_of_adam_by_hand():
    signal, made = learnt(small(), steps=3, lr=0.02)
    model = small()
    optimizer, errors = torch.optim.Adam(model.parameters(), lr=0.02), []
    for _ in range(4):
        error = F.mse_loss(model(signal.x), signal.y)
        errors.append(error.item())
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert made.curve == pytest.approx(errors, rel=1e-5)


def test_settled_batch_norms_give_in_evaluation_what_they_gave_in_training():
    model, x = small(), grid(30)
    with torch.no_grad():
        for _ in range(3):
            model.train()(x)
        trained = model(x)
        lagging = model.eval()(x)
        settle(model, x)
        assert not model.training
        assert_close(model(x), trained, atol=1e-5, rtol=0)
    # full batches alone do not do it: the running statistics are still on their way
    assert (lagging - trained).abs().max() > 1e-2


def test_settled_a_point_does_not_depend_on_its_company():
    model, x = small("relu"), grid(30)
    settle(model, x)
    assert_close(predict(model, x, batch=7), predict(model, x))
    assert_close(predict(model, grid(90)[1::3]), predict(model, x), atol=1e-5, rtol=0)
    assert model.training  # its mode stays


def test_settling_touches_no_weight_and_no_momentum():
    model, before = small(), [p.clone() for p in small().parameters()]
    settle(model, grid(30))
    assert [part.momentum for part in model.modules() if isinstance(part, nn.BatchNorm1d)] == [0.1, 0.1]
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, was)


def test_a_fit_that_is_broken_off_leaves_the_best_weights_settled():
    def stop(step, mse):
        seen.append(mse)
        if step == 20:
            raise KeyboardInterrupt

    model, seen, signal = small(), [], chirp(60)
    with pytest.raises(KeyboardInterrupt):
        fit(model, signal.x, signal.y, lr=0.1, watch=stop, progress=False)
    assert F.mse_loss(predict(model, signal.x), signal.y).item() == pytest.approx(min(seen), rel=1e-4)


def test_watch_sees_the_curve():
    seen = []
    _, made = learnt(small(), steps=5, watch=lambda step, mse: seen.append((step, mse)))
    assert seen == list(enumerate(made.curve))


def test_an_error_without_bounds_is_told():
    x = grid(4)
    with pytest.raises(ValueError, match="lower lr"):
        fit(nn.Linear(1, 1), x, x * 1e30, progress=False)


@pytest.mark.parametrize(
    ("x", "y", "knobs", "said"),
    [
        (grid(4), torch.zeros(4), {}, "points, outputs"),
        (grid(4), torch.zeros(5, 1), {}, "same 2 or more"),
        (grid(4), torch.zeros(4, 2), {}, "1 values a point, but y has 2"),
        (grid(4), torch.zeros(4, 1), {"steps": -1}, "steps=-1"),
        (grid(4), torch.zeros(4, 1), {"keep": "first"}, "keep='first'"),
    ],
)
def test_what_cannot_be_is_refused(x, y, knobs, said):
    with pytest.raises(ValueError, match=said):
        fit(nn.Linear(1, 1), x, y, progress=False, **knobs)
