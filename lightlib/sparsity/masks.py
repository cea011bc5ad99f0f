"""Masks: which weights stay, given a score for each. True stays."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Sparsity = float | str  # a share of zeros, or a pattern "n:m": n of every m weights in a row stay


def keep_largest(scores: Tensor, sparsity: float) -> Tensor:
    """All but the `sparsity` smallest of the last dimension (..., n): floor(n sparsity) of them go, exactly.

    Of equal scores the first go first.

    >>> keep_largest(torch.tensor([3.0, 1.0, 2.0, 1.0]), 0.5)
    tensor([ True, False,  True, False])
    """
    count = dropped(scores.shape[-1], sparsity)
    if not count:
        return torch.ones_like(scores, dtype=torch.bool)
    last = scores.kthvalue(count, dim=-1, keepdim=True).values  # the largest score that goes
    below, equal = scores < last, scores == last
    missing = count - below.sum(-1, keepdim=True)
    return ~(below | equal & (equal.cumsum(-1) <= missing))


def dropped(n: int, sparsity: float) -> int:
    """How many of n weights go: a share such as 9 / 10 of 40 is 36, whichever way it is rounded."""
    return int(n * sparsity + 1e-6)


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """The n largest of every m scores that lie side by side in a row (out, in); m divides in."""
    return keep_largest(scores.reshape(len(scores), -1, m), (m - n) / m).view(scores.shape)


def mask_of(scores: Tensor, sparsity: Sparsity, per: str = "row") -> Tensor:
    """The mask (out, in) of `sparsity`: per "row" or per "layer"; a pattern holds in every group of m."""
    if isinstance(sparsity, str):
        return keep_n_of_m(scores, *pattern(sparsity))
    if per == "row":
        return keep_largest(scores, sparsity)
    return keep_largest(scores.flatten(), sparsity).view(scores.shape)


def pattern(text: str) -> tuple[int, int]:
    """(n, m) of "n:m".

    >>> pattern("2:4")
    (2, 4)
    """
    n, _, m = text.partition(":")
    if not (n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m) <= 256):
        raise ValueError(f"sparsity={text!r}: give a share from 0 to 1, or 'n:m' with 0 < n < m, like '2:4'")
    return int(n), int(m)


def sparsities(
    sparsity: Sparsity | Mapping[str, Sparsity], block: str, dense: Mapping[str, nn.Linear]
) -> dict[str, Sparsity]:
    """`sparsity_for` each of the `dense` layers of a block."""
    return {n: sparsity_for(sparsity, f"{block}.{n}", part.in_features) for n, part in dense.items()}


def sparsity_for(sparsity: Sparsity | Mapping[str, Sparsity], name: str, n_in: int) -> Sparsity:
    """The sparsity of the layer `name` (one for all, or one a layer), which its n_in inputs must allow."""
    if isinstance(sparsity, Mapping):
        if name not in sparsity:
            raise ValueError(f"{name}: no sparsity for it; there are {', '.join(list(sparsity)[:2])}, ...")
        sparsity = sparsity[name]
    if isinstance(sparsity, str):
        n, m = pattern(sparsity)
        if n_in % m:
            raise ValueError(f"{name}: in_features {n_in} is not a multiple of {m}, so {n}:{m} does not fit")
    elif not 0 <= sparsity < 1:
        raise ValueError(f"{name}: sparsity={sparsity}: the share of zeros lies from 0 to below 1")
    return sparsity
