"""CFSP: blocks that turn the stream less give more neurons, and of those the ones that are least active.

Wang et al. 2025 (COLING), arXiv:2409.13199.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightlib.calibration import Block, SquaredNorm, stream_blocks
from lightlib.change import changing
from lightlib.decoder import check_linears
from lightlib.report import Compressed, Report
from lightlib.structured.angular import needed, noting_angles
from lightlib.structured.budget import best, fit, kept_count
from lightlib.units import Kept, dense_part, keep_units, members

SCORES = ("activation", "weights")


def block_shares(
    importance: Tensor, fraction: float, sharpness: float, sizes: list[int] | None = None
) -> Tensor:
    """The share of its neurons that each block keeps (blocks), rising with its importance (blocks).

    a = sigmoid(sharpness * (importance - mean)), scaled so that `fraction` of all neurons go; `sizes` says
    how many a block has, where they differ. Where a share would exceed 1, all are drawn towards their mean.
    Equal importance, or sharpness 0, gives equal shares.
    """
    importance, keep = importance.double(), 1 - fraction
    weight = torch.tensor(sizes or [1] * len(importance), dtype=torch.float64)
    a = torch.sigmoid(sharpness * (importance - importance.mean()))
    a = a * weight.sum() / (a @ weight)  # of mean 1
    if a.max() * keep > 1:
        a = 1 + (a - 1) * (1 / keep - 1) / (a.max() - 1)
    return (a * keep).round(decimals=12).clamp(max=1)  # a whole block's share is 1, not nearly


def neuron_scores(weights: list[Tensor], squared_norm: Tensor, score: str, power: float = 1.0) -> Tensor:
    """The score of each neuron (neurons), from its activations' sum of squares over the tokens (neurons).

    weights: of each matrix the neurons' lines (neurons, d_model), those of gate and up, and last of down.
    "weights", the paper's reading: a neuron's share in the |W| of all neurons, for each channel of the
    stream; its mean over the channels, summed over the matrices, times ||X||^power. In down, |W| counts times
    ||X||. "activation": ||X||^power alone. That is what the authors' code computes, up to a factor: it
    divides each |W| by its sum over the axis that it then averages, so that the weights cancel and
    (matrices / d_model) ||X||^power is left, which ranks alike for every power. Dead neurons come last.
    Raises ValueError for another score.
    """
    if score not in SCORES:
        raise ValueError(f"score={score!r}: choose one of {', '.join(SCORES)}")
    norm = squared_norm.sqrt()
    if score == "activation":
        return norm**power
    *made, read = [W.detach().float().abs() for W in weights]
    shares = [W / W.sum(0).clamp_min(1e-30) for W in (*made, read * norm[:, None])]
    return sum(share.mean(1) for share in shares) * norm**power


def cfsp(
    model: nn.Module,
    batches: list[Tensor],
    *,
    fraction: float = 0.2,
    sharpness: float = 13.1,
    score: str = "weights",
    power: float = 1.0,
    round_to: int = 128,
    budget_bytes: int | None = None,
    budget_ms: float | None = None,
    budget_tokens: int = 256,
    device=None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """Take a share of all neurons out of the MLPs, after one pass over `batches`; 0 changes nothing.

    fraction: the share of all neurons that go. sharpness: how much the blocks' shares differ, see
    `block_shares`. The authors' code sums the angles over its T tokens and divides by 10^4, so that its `a`
    stands for sharpness = a T / 10^4; the default is a = 1 at their 128 windows of 1024 tokens. score, power:
    see `neuron_scores`. round_to: what stays in a block is a multiple of it, and the sum as asked within one.
    budget_bytes, budget_ms: instead of `fraction`, the least share with which the model takes so many bytes,
    or a prompt of `budget_tokens` tokens so many milliseconds on this device.
    Raises ValueError for settings that do not fit.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction}: give the share of the neurons that go, from 0 to below 1")
    if round_to < 1:
        raise ValueError(f"round_to={round_to}: what stays is a multiple of it; take 1 or more")
    with changing(model, inplace) as light:
        check_linears(light, whole=True)
        importance, scores = importances(light, batches, score, power, device=device, progress=progress)

        def choose(fraction: float) -> Kept:
            sizes = [len(each) for each in scores.values()]
            shares = block_shares(torch.tensor(list(importance.values())), fraction, sharpness, sizes)
            counts = neuron_counts(sizes, shares.tolist(), round_to)
            found = zip(scores.items(), counts, strict=True)
            return {name: {"neurons": best(each, count)} for (name, each), count in found}

        kept = fit(
            light, choose,
            fraction=fraction, budget_bytes=budget_bytes, budget_ms=budget_ms, tokens=budget_tokens,
        )  # fmt: skip
        report = Report(tuple(keep_units(light, kept, "cfsp")))
    return Compressed(light, report)


def importances(
    model: nn.Module, batches: list[Tensor], score: str, power: float = 1.0, *, device=None, progress=True
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """{block: importance} and {block: scores (neurons)} from one pass; nothing is cut."""
    angles, scores = {}, {}
    walk = stream_blocks(model, needed(batches), device=device, progress=progress, title="cfsp")
    for block in noting_angles(model, walk, angles):
        # the walk runs the block once more: it takes from memory what this run made
        block.settle((*block.roles.attention, *block.roles.mlp_in))
        norm = block.collect(SquaredNorm, of=(block.roles.mlp_out,))[block.roles.mlp_out].value
        scores[block.name] = neuron_scores(neuron_weights(model, block), norm, score, power).cpu()
    return angles, scores


def neuron_weights(model: nn.Module, block: Block) -> list[Tensor]:
    """The neurons' lines in each matrix of the MLP, (neurons, d_model), last those of down."""
    found = []
    for member in members(model, block.module)["neurons"]:
        W = dense_part(model, f"{block.name}.{member.linear}").weight
        W = W if member.dim == 0 else W.T
        found += [W[index.to(W.device)] for index in member.index.T]
    return found


def neuron_counts(sizes: list[int], shares: list[float], round_to: int) -> list[int]:
    """How many neurons each block keeps: multiples of `round_to`, or a block that is whole.

    Their sum is as near to that of sizes * shares as such steps come, which the blocks take that are
    furthest from their own share.
    """
    wanted = [n * share for n, share in zip(sizes, shares, strict=True)]
    counts = [kept_count(n, share, round_to) for n, share in zip(sizes, shares, strict=True)]
    while abs(off := round(sum(wanted)) - sum(counts)) > round_to / 2:
        sign = math.copysign(1, off)
        steps = [stepped(count, n, round_to, off > 0) for count, n in zip(counts, sizes, strict=True)]
        free = [i for i, count in enumerate(counts) if steps[i] != count]
        if not free:
            break
        i = max(free, key=lambda i: sign * (wanted[i] - counts[i]))
        counts[i] = steps[i]
    return counts


def stepped(count: int, size: int, round_to: int, up: bool) -> int:
    """The next multiple above or below `count`, from min(round_to, size) to size."""
    if up:
        return min((count // round_to + 1) * round_to, size)
    return max((count - 1) // round_to * round_to, min(round_to, size))
