"""One training loop: AdamW down a cosine, on one process or several; broken off, it goes on from there."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightlib.compact import CompactLinear
from lightlib.quality import device_of

PRECISIONS = {None: None, "bf16": torch.bfloat16}


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood (nats) of each token of ids (batch, length) after the first."""
    ids = ids.to(device_of(model))
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@torch.enable_grad()
def train(
    model: nn.Module,
    weights: list[nn.Parameter],
    batches: list[Tensor],
    *,
    steps: int,
    lr: float,
    loss: Callable[[nn.Module, Tensor], Tensor] = next_token_loss,
    watch: Callable[[int, float], None] = lambda step, loss: None,
    checkpoint: str | Path | None = None,
    every: int = 50,
    accumulate: int = 1,
    precision: str | None = None,
    warmup: int = 0,
    shared: dict[str, int | float | str] | None = None,
    progress: bool = True,
) -> None:
    """Let `weights`, and nothing else, learn in place: AdamW without decay, `lr` down a cosine to 0.

    Step s takes batch s, round and round; gradients are clipped to norm 1 and dropout is off, so that the
    same call gives the same weights. watch: called with each step and its loss. warmup: over so many first
    steps the rate rises to that of the cosine. Adam's first step moves each weight by the whole rate, however
    small its gradient is, which harms a model that is nearly right.

    accumulate: so many batches a step, one after the other, step s the batches from s * accumulate on; the
    gradient is the mean of theirs, so that two halves of a batch are that batch. precision: "bf16" runs the
    forward in bfloat16 (autocast), while weights, gradients and optimizer stay as they are.

    checkpoint: a folder that is told after `every` steps, at the end and on KeyboardInterrupt how far this
    has come. The same call then goes on from there, to weights bit-equal on a CPU to those of an unbroken
    run; after the end it puts them in place at once. Raises ValueError for a folder of other settings,
    batches or frozen weights. shared: what else such calls must have in common, as the loss's settings.

    Under `accelerate launch` or torchrun, step s takes a batch for each of the n processes, batch s n + i for
    process i, and the mean of their gradients; `watch` sees the mean loss. Each process comes with its own
    copy of the model and sees the folder; a run that is broken off goes on from the last `every` steps.
    """
    if not batches:
        raise ValueError("no batches to train on")
    if steps < 0 or every < 1 or warmup < 0:
        raise ValueError(
            f"steps={steps}, warmup={warmup}, every={every}: the first two cannot be negative, the last must "
            "be at least 1"
        )
    if accumulate < 1 or precision not in PRECISIONS:
        raise ValueError(
            f'accumulate={accumulate}, precision={precision!r}: give 1 or more, and None or "bf16"'
        )
    team = join(model, weights)
    n, i = team.num_processes, team.process_index
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    kept = None
    if checkpoint is not None:
        settings = {"steps": steps, "lr": float(lr), "processes": n, "accumulate": accumulate}
        settings |= {"precision": str(precision), "warmup": warmup} | (shared or {})
        kept = Checkpoint.of(checkpoint, settings, model, weights, batches)
    reached = kept.read(weights, optimizer, i) if kept else 0
    with (
        only(model, weights),
        tqdm(total=steps, initial=reached, desc="train", unit="step", disable=not progress or i > 0) as bar,
    ):
        states = random_states(weights)
        try:
            for step in range(reached, steps):
                for group in optimizer.param_groups:
                    group["lr"] = lr * share(step, steps, warmup)
                optimizer.zero_grad()
                turns = range(step * accumulate * n + i, (step + 1) * accumulate * n, n)
                value = slopes(model, weights, [batches[t % len(batches)] for t in turns], loss, precision)
                value = average(team, weights, value)
                nn.utils.clip_grad_norm_(weights, 1.0)
                reached = None  # a step that is broken off leaves some weights moved and others not
                optimizer.step()
                reached, states = step + 1, random_states(weights)
                bar.set_postfix_str(f"loss {value:.3f}", refresh=False)
                bar.update()
                watch(step, value)
                states = random_states(weights)
                if kept and (reached % every == 0 or reached == steps):
                    kept.write(team, reached, weights, optimizer, states)
        except KeyboardInterrupt:
            if kept and reached is not None and n == 1:
                kept.write(team, reached, weights, optimizer, states)
            raise


def share(step: int, steps: int, warmup: int) -> float:
    """Of the learning rate, at one of `steps`: a line up to a cosine, and that down to 0.

    >>> [share(step, 4, 0) for step in (0, 2)], share(0, 4, 1)
    ([1.0, 0.5], 0.5)
    """
    return min(1.0, (step + 1) / (warmup + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def slopes(model, weights, batches, loss, precision: str | None) -> Tensor:
    """Add to the weights' gradients the mean of those of the batches' losses; the mean loss."""
    total, device, dtype = 0.0, weights[0].device.type, PRECISIONS[precision]
    for ids in batches:
        with torch.autocast(device, dtype) if dtype else nullcontext():
            value = loss(model, ids) / len(batches)
        value.backward()
        total = total + value.detach()
    return total


def join(model: nn.Module, weights: list[nn.Parameter]):
    """The processes that train together, usually one: an Accelerator. All begin with the first's weights.

    Raises ValueError where processes were started that accelerate does not bring together.
    """
    from accelerate import Accelerator
    from accelerate.utils import broadcast

    team = Accelerator(cpu=not torch.accelerator.is_available())
    started = int(os.environ.get("WORLD_SIZE", 1))
    if team.num_processes != started:
        raise ValueError(
            f"WORLD_SIZE={started} processes were started and accelerate joins {team.num_processes}; "
            "start them with `accelerate launch`"
        )
    if started > 1:
        model.to(team.device)
        for p in weights:
            broadcast(p.data)
    return team


def average(team, weights: list[nn.Parameter], loss: Tensor) -> float:
    """The mean loss of all processes; the weights' gradients become their mean too."""
    if team.num_processes == 1:
        return loss.item()
    for p in weights:
        # a weight that this process's batch did not touch may have a gradient in another's
        p.grad = team.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "mean")
    return team.reduce(loss.detach(), "mean").item()


@contextmanager
def only(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """Within, nothing but `weights` learns and dropout is off; the model's flags come back at the end."""
    flags = [(p, p.requires_grad) for p in (*model.parameters(), *weights)]
    modes = [(part, part.training) for part in model.modules()]
    model.eval().requires_grad_(False)
    for p in weights:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, wanted in flags:
            p.requires_grad_(wanted)
        for part, mode in modes:
            part.training = mode
        for p in weights:
            p.grad = None


@contextmanager
def whole(weights: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The weights themselves, put back as they were on an error."""
    before = [p.detach().clone() for p in weights]
    try:
        yield weights
    except BaseException:
        for p, value in zip(weights, before, strict=True):
            p.detach().copy_(value)
        raise
    finally:
        for p in weights:
            p.grad = None


@dataclass(frozen=True)
class Checkpoint:
    """One file: how far a training has come, and the settings that a call must share to go on with it."""

    file: Path
    settings: dict[str, int | float | str]

    @classmethod
    def of(cls, folder: str | Path, settings: dict, model, weights, batches) -> Checkpoint:
        """`settings`, and what was trained on what: fingerprints, so that nothing else is gone on with."""
        count = f"{len(weights)} tensors, {sum(p.numel() for p in weights)} values"
        shapes = fingerprint(torch.tensor(p.shape) for p in weights)
        known = {
            "weights": f"{count} ({shapes})",
            "batches": f"{len(batches)} ({fingerprint(batches)})",
            "frozen weights": fingerprint(frozen(model, weights)),
        }
        return cls(Path(folder).expanduser() / "training.pt", settings | known)

    def write(self, team, step: int, weights: list[nn.Parameter], optimizer, states: list[Tensor]) -> None:
        """Put the file in its place when it is whole; one process writes for all."""
        from accelerate.utils import gather_object

        content = {
            "settings": self.settings,
            "step": step,
            "finished": step == self.settings["steps"],
            "weights": [p.detach() for p in weights],
            "optimizer": optimizer.state_dict(),
            "random": gather_object([states]),
        }
        if team.is_main_process:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            draft = self.file.with_suffix(".part")
            try:
                torch.save(content, draft)
                draft.replace(self.file)
            finally:
                draft.unlink(missing_ok=True)
        team.wait_for_everyone()

    @torch.no_grad()
    def read(self, weights: list[nn.Parameter], optimizer, process: int) -> int:
        """The step that was reached, weights, optimizer and random states put back; 0 without a file.

        Raises ValueError for a file that is damaged or of other settings.
        """
        if not self.file.is_file():
            return 0
        try:
            content = torch.load(self.file, map_location="cpu", weights_only=True)
            before = content["settings"]
        except Exception as error:
            raise ValueError(
                f"{self.file} is damaged ({error}); remove it to begin from the start"
            ) from error
        other = [
            f"{key} {before.get(key)}, now {now}"
            for key, now in self.settings.items()
            if before.get(key) != now
        ]
        if other:
            raise ValueError(
                f"{self.file} is of another training, with {'; '.join(other)}; take another folder"
            )
        for p, value in zip(weights, content["weights"], strict=True):
            p.copy_(value)
        optimizer.load_state_dict(content["optimizer"])
        torch.set_rng_state(content["random"][process][0])
        for state in content["random"][process][1:]:
            torch.cuda.set_rng_state(state, weights[0].device)
        return content["step"]


def random_states(weights: list[nn.Parameter]) -> list[Tensor]:
    """The state of the generators that a step may draw from: the CPU's, and that of the weights' GPU."""
    device = weights[0].device
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def frozen(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[Tensor]:
    """Every parameter and buffer of the model but `weights`; of packed layers, what a file holds."""
    learning = {id(p) for p in weights}
    for part in model.modules():
        own = (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
        tensors = part.stored() if isinstance(part, CompactLinear) else dict(own)
        yield from (t for t in tensors.values() if id(t) not in learning)


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """16 hex digits that change with any shape, type or value of the tensors."""
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(f"{t.dtype}{tuple(t.shape)}".encode())
        digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
