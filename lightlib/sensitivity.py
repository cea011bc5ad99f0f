"""How much each part of a model matters: change it alone, see how far the model moves, spend where it pays.

Wang et al. 2019 (HAQ, arXiv:1811.08886) measure layers one at a time; layers that read one input go together.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from lightlib.calibration import Block, SquaredNorm, starting_at, stream_blocks
from lightlib.decoder import find_blocks, linears
from lightlib.quality import device_of


@dataclass(frozen=True)
class Choice:
    """Layers in one setting, what it costs (bits, say), and how far they alone move the model (KL, nats)."""

    names: tuple[str, ...]
    setting: Hashable
    cost: int
    loss: float


def sensitivity(
    model: nn.Module,
    batches: list[Tensor],
    settings: list,
    probe,
    change: Callable[[Block, dict[str, Tensor]], Callable[[str, nn.Linear, Hashable], Tensor]],
    cost: Callable[[tuple[int, int], Hashable], int],
    *,
    statistic: Callable = SquaredNorm,
    progress: bool = True,
    title: str = "sensitivity",
) -> dict[str, list[Choice]]:
    """{stage: a Choice for each of `settings`}. The model's own weights are swapped and put back.

    Each stage of each block is changed alone to `probe`, one of the settings, and the divergence from the
    dense model is measured. That is quadratic in small changes of weights, so for other settings it is taken
    to grow with the squared distance they move them, each weight times the norm of its input: measuring each
    would mostly measure luck. With `statistic=Gram`, it is the distance that they move the layers' outputs.
    change(block, inputs): gives (name, layer, setting) -> its changed weight; inputs: {layer: each input's
    sum of squares (in,), or their gram (in, in)}. cost(shape, setting): what a setting takes.
    """
    reference, choices = [log_probabilities(model, ids) for ids in batches], {}
    for block in stream_blocks(model, batches, progress=progress, title=title):
        inputs = {name: found.value for name, found in block.collect(statistic).items()}
        changed = change(block, inputs)
        with starting_at(model, block):
            for stage in block.stages:
                parts = {name: block.linears[name] for name in stage}
                moved = {}
                for setting in settings:
                    weights = {name: changed(name, part, setting) for name, part in parts.items()}
                    moved[setting] = moved_by(parts, weights, inputs)
                    if setting == probe:
                        with swapped(parts, weights):
                            loss = divergence_from(reference, model, batches) / max(moved[probe], 1e-12)
                names = tuple(f"{block.name}.{name}" for name in stage)
                shapes = [tuple(part.weight.shape) for part in parts.values()]
                choices[names[0]] = [
                    Choice(names, s, sum(cost(shape, s) for shape in shapes), loss * moved[s])
                    for s in settings
                ]
    return choices


@contextmanager
def swapped(parts: dict[str, nn.Linear], weights: dict[str, Tensor]) -> Iterator[None]:
    """While it lasts, the layers have these weights."""
    before = {name: part.weight.data for name, part in parts.items()}
    try:
        for name, part in parts.items():
            part.weight.data = weights[name].to(part.weight.dtype)
        yield
    finally:
        for name, part in parts.items():
            part.weight.data = before[name]


def moved_by(parts: dict[str, nn.Linear], weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> float:
    """Sum of (w - w')^2 ||x||^2 over all weights of these layers, by each input's sum of squares (in,); by
    the inputs' gram (in, in), what ||(W - W')X||^2 is."""
    total = 0.0
    for name, part in parts.items():
        gone, seen = part.weight.detach().float() - weights[name].float(), inputs[name]
        total += ((gone @ seen if seen.dim() == 2 else gone * seen) * gone).sum().item()
    return total


def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """Of each predicted token: (batch, length - 1, vocabulary) in float32."""
    return model(ids.to(device_of(model)), use_cache=False).logits[:, :-1].float().log_softmax(-1)


def divergence_from(reference: list[Tensor], model: nn.Module, batches: list[Tensor]) -> float:
    """Mean over all predicted tokens of KL(reference || model), in nats."""
    total = sum(
        F.kl_div(log_probabilities(model, ids), dense, log_target=True, reduction="sum").item()
        for dense, ids in zip(reference, batches, strict=True)
    )
    return max(total, 0.0) / sum(dense[..., 0].numel() for dense in reference)


def spend(scan: dict[str, list[Choice]], budget: int) -> dict[str, Choice]:
    """One Choice a stage within the budget: again and again the step that lowers the loss most by its cost.

    Choices come with rising cost. Raises ValueError where even the first ones exceed the budget.
    """
    chosen = dict.fromkeys(scan, 0)
    left = budget - sum(choices[0].cost for choices in scan.values())
    if left < 0:
        raise ValueError(f"the cheapest setting of every layer exceeds the budget of {budget} by {-left}")
    steps = [step for key, choices in scan.items() for step in _best_step(key, choices, 0, left)]
    heapq.heapify(steps)
    while steps:
        _, key, to = heapq.heappop(steps)
        price = scan[key][to].cost - scan[key][chosen[key]].cost
        if price <= left:
            left -= price
            chosen[key] = to
        for step in _best_step(key, scan[key], chosen[key], left):
            heapq.heappush(steps, step)
    return {key: scan[key][i] for key, i in chosen.items()}


def _best_step(key: str, choices: list[Choice], at: int, left: int) -> list[tuple[float, str, int]]:
    """[(-loss saved by its cost, key, where to)] of the steepest step up from `at`, or [] if none fits."""
    here, steps = choices[at], []
    for i, up in enumerate(choices[at + 1 :], at + 1):
        price = up.cost - here.cost
        if 0 < price <= left:
            steps.append(((up.loss - here.loss) / price, key, i))
    return [min(steps)] if steps else []


def dense_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """{name: linear layer} of the blocks. Raises ValueError where one is compressed already."""
    found = {}
    for block, module in find_blocks(model).items():
        for name, part in linears(module).items():
            if not isinstance(part, nn.Linear):
                raise ValueError(
                    f"{block}.{name} is a {type(part).__name__} already; plan on the dense model"
                )
            found[f"{block}.{name}"] = part
    return found
