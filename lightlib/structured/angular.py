"""How far a block turns the stream: the angle at each token between what enters it and what leaves it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightlib.calibration import Block, stream_blocks
from lightlib.decoder import find_blocks, linear_shapes
from lightlib.machine import matmul_rate
from lightlib.quality import device_of

TOKENS = ("all", "last")
CHUNK = 256  # tokens whose angles are taken at once


def angular_distance(x: Tensor, y: Tensor) -> Tensor:
    """The angle between x and y (..., d), as a share of a half turn: 0 where equal, 1 where opposite; (...).

    From the lengths of the unit vectors' difference and sum, since the arccos of a cosine near 1 keeps half
    of the digits, and is no number where rounding lifts the cosine above 1.
    """
    u, v = F.normalize(x.float(), dim=-1), F.normalize(y.float(), dim=-1)
    return 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)) / math.pi


def block_importance(model: nn.Module, batches: list[Tensor], *, progress: bool = True) -> dict[str, float]:
    """{block: mean angular distance over all tokens from its input to its output}, from one pass.

    Raises ValueError without batches.
    """
    found, walk = {}, stream_blocks(model, needed(batches), progress=progress, title="angles")
    for _ in noting_angles(model, walk, found):
        pass
    return found


@torch.no_grad()
def noting_angles(model: nn.Module, walk: Iterator[Block], found: dict[str, float]) -> Iterator[Block]:
    """The blocks of a walk as they come; `found` gets the importance of each as it was left."""
    last, before = list(find_blocks(model))[-1], None
    for block in walk:
        if before is not None:
            found[before[0]] = mean_angle(before[1], block.inputs)
        before = block.name, block.inputs
        yield block
        if block.name == last:
            found[last] = mean_angle(block.inputs, block.run())


def mean_angle(x: list[Tensor], y: list[Tensor]) -> float:
    """Mean angular distance of all tokens in x and y: a state (batch, length, d_model) for each batch."""
    pairs = ((a, b.to(a.device)) for a, b in zip(x, y, strict=True))
    return torch.cat([angular_distance(a, b).double().flatten() for a, b in pairs]).mean().item()


@torch.no_grad()
def stream_angles(
    model: nn.Module, batches: list[Tensor], *, tokens: str = "all", progress: bool = True
) -> Tensor:
    """Mean angular distance from the stream in front of block i to that in front of block j: (n + 1, n + 1).

    Place n lies behind the last of n blocks. tokens: the mean over "all" tokens, or the "last" of each window
    alone. The states of one batch are held at a time. Raises ValueError for settings that do not fit.
    """
    if tokens not in TOKENS:
        raise ValueError(f"tokens={tokens!r}: choose one of {', '.join(TOKENS)}")
    total, count, title = 0, 0, f"angles, {forecast(model, needed(batches))}" if progress else ""
    for ids in tqdm(batches, desc=title, unit="batch", disable=not progress):
        states = []
        for block in stream_blocks(model, [ids], progress=False):
            states.append(block.inputs[0])
        states.append(block.run()[0])
        # a device map may have put the blocks on several devices
        seen = [(x if tokens == "all" else x[:, -1:]).flatten(0, -2).to(states[0].device) for x in states]
        parts = torch.stack(seen, 1).split(CHUNK)  # (tokens, n + 1, d_model)
        total = total + sum(angles_of_pairs(part).sum(0) for part in parts)
        count += len(seen[0])
    return (total / count).cpu()


def forecast(model: nn.Module, batches: list[Tensor]) -> str:
    """What a forward that keeps all states will take: "about 0.31 GB beside the model and 12 s"."""
    blocks = [linear_shapes(block) for block in find_blocks(model).values()]
    weights = sum(n_out * n_in for shapes in blocks for n_out, n_in in shapes.values())
    sizes = [ids.numel() for ids in batches]
    held = 2 * 4 * (len(blocks) + 1) * max(sizes) * model.config.hidden_size  # listed, and in one tensor
    seconds = 2 * weights * sum(sizes) / matmul_rate(str(device_of(model))) / 1e9
    return f"about {held / 1e9:.2g} GB beside the model and {max(seconds, 1):.0f} s"


def angles_of_pairs(x: Tensor) -> Tensor:
    """Angular distance of all pairs among x (tokens, places, d): (tokens, places, places), float64."""
    u = F.normalize(x.double(), dim=-1)
    return (u @ u.mT).clamp(-1, 1).arccos() / math.pi


def needed(batches: list[Tensor] | None) -> list[Tensor]:
    if not batches:
        raise ValueError("angles need batches: they are those of the stream over a text")
    return batches
