"""Depth pruning: take whole blocks out. What is left is a plain model with fewer layers.

A run of blocks at once: Gromov et al. 2024, arXiv:2403.17887. Single blocks: ShortGPT, Men et al. 2024,
arXiv:2403.03853.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightlib.cost import size
from lightlib.decoder import check_linears, find_blocks, linear_shapes, roles
from lightlib.low_rank import weight_bits
from lightlib.report import Compressed, LayerReport, Report
from lightlib.structured.angular import stream_angles
from lightlib.structured.budget import prompt_ms

CHOICES = ("run", "single")


@torch.no_grad()
def drop_blocks(
    model: nn.Module,
    batches: list[Tensor],
    *,
    count: int | None = None,
    fraction: float = 0.2,
    choose: str = "run",
    tokens: str = "all",
    budget_bytes: int | None = None,
    budget_ms: float | None = None,
    budget_tokens: int = 256,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """Take out the blocks that turn the stream least on `batches`; none changes nothing.

    count: how many blocks go; otherwise the nearest to `fraction` of all, but not all. choose, tokens: see
    `least_turning` and `stream_angles`. budget_bytes, budget_ms: instead of both, the fewest blocks without
    which the model takes so many bytes, or a prompt of `budget_tokens` tokens so many milliseconds on
    this device. Packed layers may be in the blocks; the rest of the model stays as it is.
    Raises ValueError for settings that do not fit, and for a model that no plain one could be without blocks.
    """
    check(model, choose, count, fraction, budget_bytes, budget_ms)
    angles = stream_angles(model, batches, tokens=tokens, progress=progress)
    n = len(angles) - 1
    if budget_bytes is not None or budget_ms is not None:
        count = fewest(model, angles, choose, budget_bytes, budget_ms, budget_tokens)
    elif count is None:
        count = min(round(fraction * n), n - 1)
    light = model if inplace else copy.deepcopy(model)
    gone = least_turning(angles, count, choose)
    rows = rows_of(light, gone, angles.diagonal(1))
    if gone:
        keep_blocks(light, [i for i in range(n) if i not in gone])
    return Compressed(light, Report(tuple(rows)))


def least_turning(angles: Tensor, count: int, choose: str) -> list[int]:
    """Which `count` blocks to drop, rising, by the angles between all places of the stream (n + 1, n + 1).

    "run": successive blocks, from the place whose stream is turned least `count` blocks later. "single": the
    blocks that turn it least, each by itself; of equal ones the first.
    """
    if choose == "single":
        return angles.diagonal(1).argsort(stable=True)[:count].sort().values.tolist()
    start = int(angles.diagonal(count).argmin())
    return list(range(start, start + count))


def keep_blocks(model: nn.Module, kept: Sequence[int]) -> nn.Module:
    """Leave the model only its blocks with these indices, renumbered; its config says so. In place."""
    stack = model.get_submodule(roles(model).blocks)
    kinds = getattr(model.config, "layer_types", None)
    try:
        put(model, nn.ModuleList(stack[i] for i in kept), kinds and [kinds[i] for i in kept])
        unused = left_over(model)
    except BaseException:
        put(model, stack, kinds)
        raise
    for name in unused:
        owner, _, key = name.rpartition(".")
        delattr(model.get_submodule(owner), key)
    return model


def put(model: nn.Module, stack: nn.ModuleList, kinds: list[str] | None) -> None:
    """Give the model these blocks, each numbered for the cache. kinds: of attention, a block each."""
    for i, block in enumerate(stack):
        for part in block.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = i
    model.config.num_hidden_layers = len(stack)
    if kinds is not None:
        model.config.layer_types = kinds
    model.set_submodule(roles(model).blocks, stack)


def left_over(model: nn.Module) -> list[str]:
    """Buffers outside of the blocks that a model of this config lacks, by name.

    Gemma-3 has rotary frequencies for each kind of attention; the blocks of one kind may all be gone.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        plain = dict(AutoModelForCausalLM.from_config(model.config).named_buffers())
    path = roles(model).blocks + "."
    return [name for name, _ in model.named_buffers() if name not in plain and not name.startswith(path)]


def check(model, choose, count, fraction, budget_bytes, budget_ms) -> None:
    n = len(find_blocks(model))
    if choose not in CHOICES:
        raise ValueError(f"choose={choose!r}: choose one of {', '.join(CHOICES)}")
    if count is not None and not 0 <= count < n:
        raise ValueError(f"count={count}: the model has {n} blocks and keeps one; give 0 to {n - 1}")
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction}: give the share of the blocks that go, from 0 to below 1")
    amounts = {"count": count, "budget_bytes": budget_bytes, "budget_ms": budget_ms}
    given = [name for name, value in amounts.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given; give one of them")
    check_linears(model)
    if hasattr(model, "structure"):
        raise ValueError("this model is no plain one any more (sliced or pruned unevenly); drop blocks first")
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        raise ValueError(
            "scale_attn_by_inverse_layer_idx: a block's number scales its attention, so none can take "
            "another's place; take neurons out instead (cfsp)"
        )


def fewest(model, angles, choose, budget_bytes, budget_ms, budget_tokens) -> int:
    """The fewest blocks without which the model meets its budget; ValueError where one alone does not."""
    n = len(angles) - 1

    def cost(count: int) -> float:
        gone = least_turning(angles, count, choose)
        # a copy of the modules that shares all tensors
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        light = keep_blocks(copy.deepcopy(model, shared).eval(), [i for i in range(n) if i not in gone])
        if budget_bytes is not None:
            return size(light).stored_bytes
        return prompt_ms([light], budget_tokens)[0]

    budget = budget_ms if budget_bytes is None else budget_bytes
    count = bisect_left(range(n), True, key=lambda count: cost(count) <= budget)
    if count == n:
        unit = "ms on this device" if budget_bytes is None else "bytes"
        raise ValueError(f"a budget of {budget} {unit}: one block alone takes {cost(n - 1):.6g}")
    return count


def rows_of(model: nn.Module, gone: list[int], turned: Tensor) -> list[LayerReport]:
    """A row for each layer of the blocks that go; turned (n): the angle of each block."""
    rows, blocks = [], list(find_blocks(model).items())
    for i in gone:
        name, block = blocks[i]
        notes = f"gone with a block that turns the stream by {turned[i]:.3f} of a half turn"
        for part, shape in linear_shapes(block).items():
            layer = block.get_submodule(part)
            bits = weight_bits(layer)
            rows.append(LayerReport("drop_blocks", f"{name}.{part}", shape, bits, 0, 1.0, notes))
    return rows
