"""Bits where they matter: a grid for each layer, such that the whole model fits a budget of bytes.

Layers that read one input share a grid. How much each of them hurts is measured, one at a time, as in Wang et
al. 2019 (HAQ, arXiv:1811.08886); the bits are then spent where they save most.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from lightlib.calibration import starting_at, stream_blocks
from lightlib.change import changing
from lightlib.cost import size
from lightlib.decoder import find_blocks, linears
from lightlib.quality import device_of
from lightlib.quantization.grid import Int
from lightlib.report import table


@dataclass(frozen=True)
class Choice:
    """Layers on one grid: the bits they take in a file, and how far they alone move the model (KL, nats)."""

    names: tuple[str, ...]
    grid: Int
    stored_bits: int
    loss: float


@dataclass(frozen=True)
class Plan:
    """`grids` goes to `grid=` of rtn, gptq or awq. stored_bytes: the whole model's, as `size` counts them."""

    grids: dict[str, Int]
    stored_bytes: int
    loss: float
    scan: tuple[Choice, ...]

    @property
    def layers_by_bits(self) -> dict[int, int]:
        """{bits: number of layers}"""
        bits = [grid.bits for grid in self.grids.values()]
        return {b: bits.count(b) for b in sorted(set(bits))}

    def __repr__(self) -> str:
        counts = ", ".join(f"{n} layers in {b} bits" for b, n in self.layers_by_bits.items())
        return f"{self.stored_bytes / 1e6:.2f} MB: {counts}; sum of divergences {self.loss:.4f} nats"

    def _repr_html_(self) -> str:
        lines = [(name, grid.bits) for name, grid in self.grids.items()]
        return f"<p>{self!r}</p>{table(('layer', 'bits'), lines)}"


def plan(
    model: nn.Module,
    batches: list[Tensor],
    *,
    budget_bytes: float,
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8),
    group_size: int | None = 64,
    symmetric: bool = False,
    progress: bool = True,
) -> Plan:
    """The grid of each layer that should move the model least, with the model within `budget_bytes`.

    The budget is for the whole model in a file, dense parts included; it is met from below. A few hundred
    tokens are enough: for each of a block's four inputs, the scan runs the rest of the model once.
    Raises ValueError for a budget that even the fewest bits exceed.
    """
    grids = [Int(b, group_size, symmetric) for b in sorted(bits)]
    with changing(model, inplace=False) as copy:
        parts = dense_linears(copy)
        outside = (size(copy).stored_bytes - sum(part.weight.nbytes for part in parts)) * 8
        room = int(budget_bytes * 8) - outside
        needed = [sum(grid.stored_bits(*part.weight.shape) for part in parts) for grid in grids]
        finest = max((i for i, stored in enumerate(needed) if stored <= room), default=0)
        scan = sensitivity(copy, batches, grids, grids[finest], progress)
    chosen = spend(scan, room)
    total = sum(c.stored_bits for c in chosen.values()) + outside
    return Plan(
        {name: c.grid for c in chosen.values() for name in c.names},
        total // 8,
        sum(c.loss for c in chosen.values()),
        tuple(c for choices in scan.values() for c in choices),
    )


def sensitivity(
    model: nn.Module, batches: list[Tensor], grids: list[Int], probe: Int, progress: bool = True
) -> dict[str, list[Choice]]:
    """{stage: a Choice for each grid}. The model's own weights are swapped and put back.

    Each stage of each block is rounded alone to `probe`, one of the grids, and the divergence from the dense
    model is measured. That is quadratic in small changes of weights, so for other grids it is taken to grow
    with the squared distance they move them: measuring each grid would mostly measure the luck of rounding.
    """
    reference, found = [log_probabilities(model, ids) for ids in batches], {}
    for block in stream_blocks(model, batches, progress=progress, title="plan"):
        with starting_at(model, block):
            for stage in block.stages:
                parts = {f"{block.name}.{name}": block.linears[name] for name in stage}
                moved = {grid: moved_by(parts, grid) for grid in grids}
                with rounded(parts, probe):
                    loss = divergence_from(reference, model, batches) / max(moved[probe], 1e-12)
                found[f"{block.name}.{stage[0]}"] = [
                    Choice(
                        tuple(parts),
                        grid,
                        sum(grid.stored_bits(*part.weight.shape) for part in parts.values()),
                        loss * moved[grid],
                    )
                    for grid in grids
                ]
    return found


@contextmanager
def rounded(parts: dict[str, nn.Linear], grid: Int) -> Iterator[None]:
    """While it lasts, these layers' weights lie on the grid."""
    before = {name: part.weight.data for name, part in parts.items()}
    try:
        for name, part in parts.items():
            part.weight.data = grid.encode(part.weight, name).dense(part.weight.dtype)
        yield
    finally:
        for name, part in parts.items():
            part.weight.data = before[name]


def moved_by(parts: dict[str, nn.Linear], grid: Int) -> float:
    """||W - W'||^2 over all of these layers."""
    weights = (part.weight.detach().float() for part in parts.values())
    return sum((W - grid.rounded(W)).square().sum().item() for W in weights)


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


def spend(scan: dict[str, list[Choice]], budget_bits: int) -> dict[str, Choice]:
    """One Choice a layer within the budget: again and again the step up that lowers the loss most a bit."""
    chosen = dict.fromkeys(scan, 0)
    left = budget_bits - sum(choices[0].stored_bits for choices in scan.values())
    if left < 0:
        raise ValueError(
            f"the fewest bits in every layer exceed the budget by {-left / 8e6:.2f} MB; raise budget_bytes "
            "by as much, allow fewer bits, or take larger groups"
        )
    steps = [step for key, choices in scan.items() for step in _best_step(key, choices, 0, left)]
    heapq.heapify(steps)
    while steps:
        _, key, to = heapq.heappop(steps)
        cost = scan[key][to].stored_bits - scan[key][chosen[key]].stored_bits
        if cost <= left:
            left -= cost
            chosen[key] = to
        for step in _best_step(key, scan[key], chosen[key], left):
            heapq.heappush(steps, step)
    return {key: scan[key][i] for key, i in chosen.items()}


def _best_step(key: str, choices: list[Choice], at: int, left: int) -> list[tuple[float, str, int]]:
    """[(-loss saved a bit, key, where to)] of the steepest way up from choice `at`, or [] if none fits."""
    here, steps = choices[at], []
    for i, up in enumerate(choices[at + 1 :], at + 1):
        cost = up.stored_bits - here.stored_bits
        if cost <= left:
            steps.append(((up.loss - here.loss) / cost, key, i))
    return [min(steps)] if steps else []


def dense_linears(model: nn.Module) -> list[nn.Linear]:
    """The blocks' linear layers. Raises ValueError where one is compressed already."""
    found = []
    for block, module in find_blocks(model).items():
        for name, part in linears(module).items():
            if not isinstance(part, nn.Linear):
                raise ValueError(
                    f"{block}.{name} is a {type(part).__name__} already; plan on the dense model"
                )
            found.append(part)
    return found
