"""Bits where they matter: a grid for each layer, such that the whole model fits a budget of bytes.

Layers that read one input share a grid. How much each of them hurts is measured, one at a time, as in Wang et
al. 2019 (HAQ, arXiv:1811.08886); the bits are then spent where they save most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from lightlib.calibration import Block
from lightlib.change import changing
from lightlib.cost import size
from lightlib.quantization.grid import Int
from lightlib.report import table
from lightlib.sensitivity import Choice, dense_linears, sensitivity, spend


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
        weights = [part.weight for part in dense_linears(copy).values()]
        outside = (size(copy).stored_bytes - sum(W.nbytes for W in weights)) * 8
        room = int(budget_bytes * 8) - outside
        needed = [sum(grid.stored_bits(*W.shape) for W in weights) for grid in grids]
        if needed[0] > room:
            raise ValueError(
                f"the fewest bits in every layer exceed the budget by {(needed[0] - room) / 8e6:.2f} MB; "
                "raise budget_bytes by as much, allow fewer bits, or take larger groups"
            )
        # the finest grid that all layers can have is the one that is measured
        probe = [grid for grid, stored in zip(grids, needed, strict=True) if stored <= room][-1]
        scan = sensitivity(
            copy, batches, grids, probe, rounding, lambda shape, grid: grid.stored_bits(*shape),
            progress=progress, title="plan",
        )  # fmt: skip
    chosen = spend(scan, room)
    total = sum(c.cost for c in chosen.values()) + outside
    return Plan(
        {name: c.setting for c in chosen.values() for name in c.names},
        total // 8,
        sum(c.loss for c in chosen.values()),
        tuple(c for choices in scan.values() for c in choices),
    )


def rounding(block: Block, norms: dict[str, Tensor]) -> Callable[[str, nn.Linear, Int], Tensor]:
    """What rounding a layer of this block to a grid makes of its weight."""
    return lambda name, part, grid: grid.encode(part.weight, f"{block.name}.{name}").dense()
