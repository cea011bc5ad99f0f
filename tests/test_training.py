import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from lightlib.adapters.recover import recover
from lightlib.sparsity.magnitude import magnitude
from lightlib.training import fingerprint, next_token_loss, share, train
from tests.conftest import VOCABULARY, random_model

ROOT = Path(__file__).parents[1]


class Bigrams(nn.Module):
    """The least model of tokens: next-token logits from the last token, with noise that can be asked for."""

    def __init__(self, noise=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.noise = noise
        self.embedding = nn.Embedding.from_pretrained(torch.randn(11, 6, generator=generator))
        self.head = nn.Linear(6, 11)
        self.head.weight.data = torch.randn(11, 6, generator=generator)
        self.head.bias.data.zero_()

    def forward(self, ids):
        x = self.embedding(ids)
        return self.head(x + self.noise * torch.randn_like(x))


def bigram_loss(model, ids):
    return cross_entropy(model(ids[..., :-1]).flatten(0, -2), ids[..., 1:].flatten())


def some_ids(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 11, (2, 9), generator=generator) for _ in range(count)]


def fit(model, batches, **settings):
    known = {"steps": 7, "lr": 0.1, "loss": bigram_loss, "progress": False}
    train(model, list(model.head.parameters()), batches, **known | settings)
    return model


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def broken_off(after):
    def watch(step, _):
        if step == after:
            raise KeyboardInterrupt

    return watch


# the loop
def test_it_is_the_plain_loop_bit_by_bit(llama, calib):
    plain, steps, lr, losses, seen = copy.deepcopy(llama), 5, 3e-3, [], []
    weights = list(plain.model.layers.parameters())
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) * 0.5
        ids = calib[step % 2]
        optimizer.zero_grad()
        loss = cross_entropy(plain(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
    learning = list(llama.model.layers.parameters())
    train(llama, learning, calib, steps=steps, lr=lr, watch=lambda _, x: seen.append(x), progress=False)
    assert same(llama, plain) and seen == losses


def test_a_warm_up_is_a_line_up_to_the_cosine_and_joins_it():
    cosine = [share(step, 10, 0) for step in range(10)]
    warmed = [share(step, 10, 4) for step in range(10)]
    assert warmed == pytest.approx([c * min(1, (step + 1) / 5) for step, c in enumerate(cosine)])
    assert cosine[0] == 1 and cosine[5] == 0.5 and warmed[4:] == cosine[4:] and max(warmed) < 1


def test_adams_first_step_moves_each_weight_by_the_whole_rate_and_warmed_up_by_its_share():
    for warmup, rate in ((0, 0.1), (3, 0.025)):
        model, before = Bigrams(), Bigrams()
        fit(model, some_ids(1), warmup=warmup, steps=1)
        step = (model.head.weight - before.head.weight).abs()
        assert_close(step, torch.full_like(step, rate), rtol=1e-3, atol=0)


def test_what_it_turns_off_comes_back():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 1))
    model[0].weight.requires_grad_(False)
    model[2].eval()
    before, flags = copy.deepcopy(model), []

    def loss(m, x):
        flags.append(([p.requires_grad for p in m.parameters()], m[1].training))
        return m(x).square().mean()

    train(model, [model[0].weight], [torch.ones(2, 3)], steps=2, lr=0.1, loss=loss, progress=False)
    assert flags == [([True, False, False, False], False)] * 2
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert [part.training for part in model] == [True, True, False] and model.training
    assert all(p.grad is None for p in model.parameters())
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)]
    assert moved == [True, False, False, False]


def test_settings_without_sense_are_refused():
    with pytest.raises(ValueError, match="no batches"):
        fit(Bigrams(), [])
    with pytest.raises(ValueError, match="every=0"):
        fit(Bigrams(), some_ids(1), every=0)
    with pytest.raises(ValueError, match="steps=7, warmup=-1"):
        fit(Bigrams(), some_ids(1), warmup=-1)
    with pytest.raises(ValueError, match="accumulate=0, precision=None"):
        fit(Bigrams(), some_ids(1), accumulate=0)
    with pytest.raises(ValueError, match="precision='fp8'"):
        fit(Bigrams(), some_ids(1), precision="fp8")


def test_the_bar_shows_the_loss_or_nothing(capsys):
    losses = []
    fit(Bigrams(), some_ids(2), progress=True, watch=lambda _, x: losses.append(x))
    shown = capsys.readouterr().err
    assert "train" in shown and f"loss {losses[-1]:.3f}" in shown
    fit(Bigrams(), some_ids(2))
    assert capsys.readouterr() == ("", "")


# several batches a step, and fewer bits
def test_two_halves_of_a_batch_are_that_batch():
    batches, losses = some_ids(3), [[], []]
    halves = [half[None] for ids in batches for half in ids]
    whole = fit(Bigrams(), batches, watch=lambda _, x: losses[0].append(x))
    both = fit(Bigrams(), halves, accumulate=2, watch=lambda _, x: losses[1].append(x))
    assert losses[1] == pytest.approx(losses[0], abs=1e-6) and len(losses[0]) == 7
    for p, q in zip(whole.parameters(), both.parameters(), strict=True):
        assert_close(p, q, atol=1e-5, rtol=0)


def test_the_same_batch_twice_a_step_is_that_batch_bit_by_bit():
    ids = some_ids(2)
    twice = [ids[0], ids[0], ids[1], ids[1]]
    assert same(fit(Bigrams(), twice, accumulate=2), fit(Bigrams(), ids))


def test_in_bf16_the_forward_rounds_and_weights_and_optimizer_do_not(llama, calib):
    exact, seen = copy.deepcopy(llama), []
    learning = list(llama.model.layers.parameters())

    def loss(model, ids):
        out = model(ids).logits
        seen.append(out.dtype)
        return cross_entropy(out[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    losses = [[], []]
    settings = {"steps": 4, "lr": 3e-3, "loss": loss, "progress": False}
    train(llama, learning, calib, precision="bf16", watch=lambda _, x: losses[0].append(x), **settings)
    train(
        exact, [*exact.model.layers.parameters()], calib, watch=lambda _, x: losses[1].append(x), **settings
    )
    assert seen == [torch.bfloat16] * 4 + [torch.float32] * 4
    assert all(p.dtype == torch.float32 for p in llama.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=5e-3) and losses[0] != losses[1]
    assert not torch.is_autocast_enabled("cpu")


def test_a_weight_seen_without_gradients_first_has_its_gradient_in_bf16(llama, calib):
    def loss(model, ids):
        with torch.no_grad():
            model(ids)
        return next_token_loss(model, ids)

    before, learning = copy.deepcopy(llama), list(llama.model.layers.parameters())
    train(llama, learning, calib, steps=2, lr=1e-2, loss=loss, precision="bf16", progress=False)
    assert all(not torch.equal(p, q) for p, q in zip(learning, before.model.layers.parameters(), strict=True))


# checkpoints
@pytest.mark.parametrize("after", [0, 2, 3, 6])
def test_broken_off_it_goes_on_to_the_same_weights_bit_by_bit(tmp_path, after):
    torch.manual_seed(3)
    whole, steps = fit(Bigrams(noise=0.5), some_ids(3)), []
    torch.manual_seed(3)
    with pytest.raises(KeyboardInterrupt):
        fit(Bigrams(noise=0.5), some_ids(3), checkpoint=tmp_path, watch=broken_off(after))
    torch.manual_seed(4)  # another session begins otherwise
    again = Bigrams(noise=0.5)
    fit(again, some_ids(3), checkpoint=str(tmp_path), watch=lambda step, _: steps.append(step))
    assert steps == list(range(after + 1, 7))
    assert same(again, whole)
    assert [file.name for file in tmp_path.iterdir()] == ["training.pt"]


def test_killed_it_goes_on_from_the_last_round_number(tmp_path):
    def killed(step, _):
        if step == 4:
            raise SystemExit

    whole, steps = fit(Bigrams(), some_ids(3)), []
    with pytest.raises(SystemExit):
        fit(Bigrams(), some_ids(3), checkpoint=tmp_path, every=2, watch=killed)
    again = fit(Bigrams(), some_ids(3), checkpoint=tmp_path, watch=lambda step, _: steps.append(step))
    assert steps == [4, 5, 6] and same(again, whole)


def test_a_step_that_is_broken_off_half_way_is_taken_again_whole(tmp_path, monkeypatch):
    whole = fit(Bigrams(), some_ids(3))
    step, count = torch.optim.AdamW.step, []

    def half(self, *args, **named):
        count.append(1)
        if len(count) == 4:
            self.param_groups[0]["params"][0].data.zero_()
            raise KeyboardInterrupt
        return step(self, *args, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", half)
    with pytest.raises(KeyboardInterrupt):
        fit(Bigrams(), some_ids(3), checkpoint=tmp_path, every=2)
    again, steps = Bigrams(), []
    fit(again, some_ids(3), checkpoint=tmp_path, watch=lambda s, _: steps.append(s))
    assert steps == [2, 3, 4, 5, 6] and same(again, whole)


def test_when_it_has_ended_the_same_call_gives_the_same_weights_at_once(tmp_path):
    whole = fit(Bigrams(), some_ids(3), checkpoint=tmp_path)
    assert torch.load(tmp_path / "training.pt", weights_only=True)["finished"] is True
    again = fit(Bigrams(), some_ids(3), checkpoint=tmp_path, watch=broken_off(0))
    assert same(again, whole) and not same(again, Bigrams())


def test_another_training_is_refused_and_what_differs_is_named(tmp_path):
    fit(Bigrams(), some_ids(3), checkpoint=tmp_path)
    other = Bigrams()
    other.embedding.weight.data[0, 0] += 1
    wide = Bigrams()
    wide.head = nn.Linear(6, 11, bias=False)
    calls = [
        ("of another training, with steps 7, now 8; take another folder", Bigrams(), {"steps": 8}),
        ("with lr 0.1, now 0.2;", Bigrams(), {"lr": 0.2}),
        ("with accumulate 1, now 2;", Bigrams(), {"accumulate": 2}),
        ("with precision None, now bf16;", Bigrams(), {"precision": "bf16"}),
        ("with loss None, now another;", Bigrams(), {"shared": {"loss": "another"}}),
        (r"with batches 3 \(\w+\), now 3 \(\w+\);", Bigrams(), {"batches": some_ids(3, seed=1)}),
        (r"with frozen weights \w+, now \w+;", other, {}),
        (r"with weights 2 tensors, 77 values \(\w+\), now 1 tensors, 66 values", wide, {}),
    ]
    for said, model, settings in calls:
        before = copy.deepcopy(model)
        with pytest.raises(ValueError, match=said):
            fit(model, settings.pop("batches", some_ids(3)), checkpoint=tmp_path, **settings)
        assert same(model, before)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    (tmp_path / "training.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"training.pt is damaged .* remove it to begin from the start"):
        fit(Bigrams(), some_ids(1), checkpoint=tmp_path)


def test_a_fingerprint_changes_with_any_value_shape_or_type():
    x = torch.arange(6.0)
    others = [x.view(2, 3), x.double(), x + 1e-6, x[:5], torch.tensor(1.0), x.bfloat16()]
    assert fingerprint([x]) == fingerprint([x.clone()])
    assert len({fingerprint([t]) for t in [x, *others]}) == 7


@pytest.mark.parametrize("rank", [None, 2])
def test_recover_goes_on_from_its_checkpoint(llama, calib, tmp_path, rank):
    light = magnitude(llama, sparsity="2:4", progress=False).model
    settings = {"steps": 6, "lr": 1e-2, "rank": rank, "progress": False}
    whole, steps = recover(light, calib, **settings).model, []
    with pytest.raises(KeyboardInterrupt):
        recover(light, calib, checkpoint=tmp_path, watch=broken_off(3), **settings)
    again = recover(light, calib, checkpoint=tmp_path, watch=lambda s, _: steps.append(s), **settings).model
    assert steps == [4, 5] and same(again, whole) and not same(again, light)
    other = magnitude(random_model("llama"), sparsity="1:2", scope="layer", progress=False).model
    with pytest.raises(ValueError, match="is of another training"):
        recover(other, calib, checkpoint=tmp_path, **settings)


# several processes
SCRIPT = """
import os
import sys
import torch
from tests.test_training import Bigrams, fit, some_ids

seen = []
model, rank = Bigrams(), int(os.environ["RANK"])
model.head.weight.data += rank  # all begin with the first one's weights nevertheless
fit(model, some_ids(6), watch=lambda _, x: seen.append(x), checkpoint=sys.argv[1] + "/kept", every=3)
torch.save([seen, *model.head.parameters()], f"{sys.argv[1]}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def launch(folder, processes=2):
    script = folder / "script.py"
    script.write_text(SCRIPT)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    return subprocess.run(
        [*command, f"--nproc-per-node={processes}", str(script), str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_learn_as_one_does_from_both_batches(tmp_path):
    ran = launch(tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    losses, one = [], Bigrams()
    pairs = [torch.stack(pair) for pair in zip(some_ids(6)[::2], some_ids(6)[1::2], strict=True)]

    def both(model, pair):
        return (bigram_loss(model, pair[0]) + bigram_loss(model, pair[1])) / 2

    fit(one, pairs, loss=both, watch=lambda _, x: losses.append(x))
    first, second = (torch.load(tmp_path / f"{i}.pt", weights_only=False) for i in range(2))
    for seen, *weights in (first, second):
        assert seen == pytest.approx(losses, abs=1e-6) and len(seen) == 7
        for p, q in zip(weights, one.head.parameters(), strict=True):
            assert_close(p, q, atol=1e-6, rtol=0)
    assert all(torch.equal(p, q) for p, q in zip(first[1:], second[1:], strict=True))
    content = torch.load(tmp_path / "kept" / "training.pt", weights_only=True)
    assert content["finished"] and content["settings"]["processes"] == 2 and len(content["random"]) == 2
    with pytest.raises(ValueError, match="with processes 2, now 1"):
        fit(Bigrams(), some_ids(6), checkpoint=tmp_path / "kept")


def test_processes_that_were_not_joined_are_refused(monkeypatch):
    fit(Bigrams(), some_ids(1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2 processes were started and accelerate joins 1"):
        fit(Bigrams(), some_ids(1))


def test_the_loss_is_the_mean_over_predicted_tokens(llama):
    ids = torch.randint(0, VOCABULARY, (2, 6))
    with torch.no_grad():
        logs = llama(ids).logits.log_softmax(-1)
    by_hand = [-logs[b, t, ids[b, t + 1]].item() for b in range(2) for t in range(5)]
    assert next_token_loss(llama, ids).item() == pytest.approx(sum(by_hand) / 10, rel=1e-5)
