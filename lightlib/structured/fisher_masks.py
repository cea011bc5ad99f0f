"""Fisher masks: search, rearrange and tune masks on heads and neurons, then cut; no training.

Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", arXiv:2204.09656. What a unit is
worth is read from the gradient of the loss with respect to a mask on it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from lightlib.change import changing
from lightlib.decoder import check_linears, find_blocks
from lightlib.quality import device_of
from lightlib.report import Compressed, LayerReport, Report
from lightlib.structured.budget import LatencyTable, cut_copy, fit
from lightlib.structured.mask_search import noise_share, rearranged, search, time_prices
from lightlib.structured.mask_tuning import Tuned, tune_masks, tuned
from lightlib.units import KINDS, Kept, Member, keep_units, members, unit_counts, unit_weights

__all__ = ["fisher_masks", "mask_gradients", "noise_share", "rearranged", "search", "tune_masks", "tuned"]

Gradients = dict[str, dict[str, Tensor]]  # {block: {kind: (samples, units)}}


def fisher_masks(
    model: nn.Module,
    batches: list[Tensor],
    *,
    fraction: float = 0.25,
    budget_bytes: int | None = None,
    budget_ms: float | None = None,
    budget_tokens: int = 256,
    kinds: tuple[str, ...] = KINDS,
    rearrange: bool = True,
    tune: bool = True,
    shrinkage: float | None = None,
    damp: float = 1.0,
    round_to: int = 1,
    gradients: Gradients | None = None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """Take out the heads and neurons that the loss on `batches` feels least, wherever they are.

    fraction: the share of the products of these units that goes, heads and neurons in one account.
    budget_bytes, budget_ms: as far as the stored bytes, or a prompt of `budget_tokens` tokens, ask for;
    with milliseconds, units are priced by the time they take on the model's device. kinds: which units may
    go; every block keeps one of each. rearrange: then swap units within each block, since units that go
    together matter otherwise than each alone; shrinkage: how little such products are trusted, from 0 to 1,
    by default by how noisy they are. tune: then give the masks of what stays the values that bring the
    stream after each attention and MLP nearest to the dense model's, folded into the weights; damp: how
    firmly they are held to 1. round_to: neurons stay in multiples of it. gradients: what `mask_gradients`
    gave for these batches, if it was called before. In the report, the error of a layer that was tuned is
    what its output on `batches` lacks to that. Raises ValueError for settings that do not fit.
    """
    check(batches, fraction, budget_bytes, budget_ms, kinds, round_to, shrinkage, damp)
    with changing(model, inplace) as light:
        check_linears(light, whole=True)
        if budget_bytes is None and budget_ms is None:
            check_reach(light, fraction, kinds, round_to)
        gradients = gradients or mask_gradients(light, batches, progress=progress)
        scores = {
            block: {kind: found[kind].square().mean(0) for kind in KINDS if kind in kinds}
            for block, found in gradients.items()
        }
        prices, floor = weight_prices(light, kinds), {}
        if budget_ms is not None:
            prices, floor = time_prices(LatencyTable.measure(light, budget_tokens), kinds)
        whole = cost(search(scores, prices, math.inf, floor, round_to), prices)
        fixed = cost(search(scores, prices, 0.0, floor, round_to), prices) if floor else 0.0
        kept = fit(
            light,
            lambda share: search(scores, prices, whole - share * (whole - fixed), floor, round_to),
            fraction=fraction, budget_bytes=budget_bytes, budget_ms=budget_ms, tokens=budget_tokens,
        )  # fmt: skip
        if rearrange:
            kept = {
                block: {
                    kind: rearranged(gradients[block][kind], index, shrinkage) for kind, index in k.items()
                }
                for block, k in kept.items()
            }
        fitted = {}
        if tune and cost(kept, prices) < whole:
            fitted = tune_masks(light, batches, kept, damp=damp, progress=progress)
        rows = keep_units(light, kept, "fisher_masks")
    return Compressed(light, Report(tuple(with_fit(row, fitted.get(row.name)) for row in rows)))


def check(batches, fraction, budget_bytes, budget_ms, kinds, round_to, shrinkage, damp) -> None:
    """Raise ValueError for settings that no model can follow, before any work is done."""
    if not batches:
        raise ValueError("fisher_masks needs batches: it takes the gradients of the loss on them")
    if not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"kinds={kinds!r}: choose from {', '.join(KINDS)}")
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction}: give a number from 0 to below 1")
    if budget_bytes is not None and budget_ms is not None:
        raise ValueError(f"budget_bytes={budget_bytes} and budget_ms={budget_ms}: give one of them")
    if round_to < 1 or damp < 0:
        raise ValueError(f"round_to={round_to}, damp={damp}: give at least 1 and at least 0")
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage={shrinkage}: give a number from 0 to 1, or None to have it estimated")


def check_reach(model: nn.Module, fraction: float, kinds: tuple[str, ...], round_to: int) -> None:
    """Raise ValueError where the units that every block keeps are more than the fraction leaves."""
    prices = weight_prices(model, kinds)
    scores = {
        block: {kind: torch.zeros(counts[kind]) for kind in prices}
        for block, counts in unit_counts(model).items()
    }
    least, whole = (cost(search(scores, prices, to, None, round_to), prices) for to in (0.0, math.inf))
    if (1 - fraction) * whole < least:
        sizes = {"heads": 1, "neurons": round_to}
        stay = " and ".join(f"{sizes[kind]} {kind}" for kind in prices)
        raise ValueError(f"fraction={fraction}: at most {1 - least / whole:.3g}, as every block keeps {stay}")


def weight_prices(model: nn.Module, kinds: tuple[str, ...]) -> dict[str, float]:
    """{kind: weights that go with one unit}; the products that a token takes are as many."""
    weights = unit_weights(model, next(iter(find_blocks(model))))
    return {kind: float(weights[kind]) for kind in KINDS if kind in kinds}


def cost(kept: Kept, prices: dict[str, float]) -> float:
    return sum(prices[kind] * len(index) for kinds in kept.values() for kind, index in kinds.items())


def with_fit(row: LayerReport, fitted: Tuned | None) -> LayerReport:
    """The row with the error of the layer's output where its masks were tuned."""
    if fitted is None:
        return row
    units = row.notes.partition(";")[0]
    how = "not tuned, a mask was beyond 10" if fitted.given_up else f"{fitted.before:.3f} before tuning"
    return replace(row, error=fitted.after, notes=f"{units}; {how}")


@torch.enable_grad()
def mask_gradients(model: nn.Module, batches: list[Tensor], *, progress: bool = True) -> Gradients:
    """{block: {kind: (samples, units)}}: the gradient of the loss with respect to a mask on each unit.

    A sample is one window, its loss the mean over its predicted tokens; all masks are 1. The mean of their
    squares over samples is the diagonal of the empirical Fisher information. The model stays as it is.
    """
    light = cut_copy(model, {})
    weights = {name: weight.detach() for name, weight in light.named_parameters()}
    masks, readers = {}, {}
    for name, block in find_blocks(light).items():
        for kind, parts in members(light, block).items():
            weight = f"{name}.{parts[-1].linear}.weight"
            place = weights[weight].device
            masks[name, kind] = torch.ones(len(parts[-1].index), device=place, requires_grad=True)
            readers[weight] = masks[name, kind], unit_of_columns(parts[-1]).to(place)
    found = {key: [] for key in masks}
    windows = [ids for batch in batches for ids in batch.split(1)]
    for ids in tqdm(windows, desc="gradients", unit="window", disable=not progress):
        masked = {
            name: (weights[name] * mask[units]).to(weights[name].dtype)
            for name, (mask, units) in readers.items()
        }
        loss = window_loss(light, weights | masked, ids)
        for key, gradient in zip(masks, torch.autograd.grad(loss, list(masks.values())), strict=True):
            found[key].append(gradient.cpu())
    return {
        block: {kind: torch.stack(found[block, kind]) for kind in kinds}
        for block, kinds in unit_counts(light).items()
    }


def unit_of_columns(reader: Member) -> Tensor:
    """Which unit each column (in) of the reader belongs to."""
    return reader.index.flatten().argsort() // reader.index.shape[1]


def window_loss(model: nn.Module, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Mean negative log-likelihood of each token of ids (1, length) after the first, with these weights."""
    ids = ids.to(device_of(model))
    logits = functional_call(model, weights, (ids,), {"use_cache": False}).logits[0, :-1].float()
    return F.cross_entropy(logits, ids[0, 1:])
