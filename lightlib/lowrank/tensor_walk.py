"""A model's linear layers seen as tensors, and the walk that puts layers of factors in their place."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lightlib.calibration import Block, Gram, stream_blocks
from lightlib.change import changing
from lightlib.decoder import head_dim, roles
from lightlib.lowrank.multilinear import joined
from lightlib.lowrank.tensor_layers import FactoredLinear
from lightlib.lowrank.work import DENSE
from lightlib.report import Compressed, Report

Shapes = tuple[tuple[int, ...], tuple[int, ...]]  # how outputs and inputs are split into modes


def head_width(model: nn.Module, heads: bool) -> int | None:
    """The width of a head where heads are to be modes. Raises ValueError for what is no known decoder."""
    roles(model)
    return head_dim(model) if heads else None


def head_modes(block: Block, name: str, linear: nn.Linear, size: int | None) -> Shapes | None:
    """How heads split the outputs or inputs of an attention's layer; None for others, or without a size."""
    if size and name in block.roles.attention_in:
        return (linear.out_features // size, size), (linear.in_features,)
    if size and name == block.roles.attention_out:
        return (linear.out_features,), (linear.in_features // size, size)
    return None


def sliced(linear: nn.Linear, slices: int) -> Shapes:
    """The layer's longer side in `slices` parts, or in the number nearest to it that divides it."""
    n_out, n_in = linear.out_features, linear.in_features
    longer = max(n_out, n_in)
    parts = min((d for d in range(1, longer + 1) if longer % d == 0), key=lambda d: abs(d - slices))
    return ((parts, n_out // parts), (n_in,)) if n_out >= n_in else ((n_out,), (parts, n_in // parts))


def replaced(
    method: str,
    model: nn.Module,
    batches: list[Tensor] | None,
    make: Callable[[Block, str, nn.Linear, int], FactoredLinear],
    fraction: float,
    device,
    progress: bool,
    inplace: bool,
) -> Compressed:
    """The model with make(block, name, linear, numbers that may be stored) in place of each dense layer."""
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction}: give a number from 0 to below 1")
    with changing(model, inplace) as light:
        rows = []
        for block in stream_blocks(light, batches, device=device, progress=progress, title=method):
            dense = block.dense
            grams = block.collect(Gram, of=tuple(dense))
            for name, linear in dense.items():
                new = make(block, name, linear, int((1 - fraction) * linear.weight.numel()))
                gram = grams[name].value if name in grams else None
                block.replace(method, name, new, gram, notes(new, gram is None))
            rows += block.rows
    return Compressed(light, Report(tuple(rows)))


def notes(layer: FactoredLinear, weights_alone: bool) -> str:
    """The layer's modes and ranks, and what it costs a token beside a dense one."""
    settings, flops = layer.settings(), layer.flops
    ranks = settings.get("ranks") or [settings["rank"]]
    times = min(work.token for order, work in flops.items() if order != DENSE) / flops[DENSE].token
    return (
        f"({joined(layer.out_shape)}) x ({joined(layer.in_shape)}), "
        f"rank {', '.join('whole' if r is None else str(r) for r in ranks)}; "
        f"{times:.2g} times the FLOPs of a dense layer for a token"
        + ("; error of the weights alone" if weights_alone else "")
    )
