"""Key and value heads that query heads are to share: pooled as they are, or turned towards each other.

Mean pooling: Ainslie et al. 2023 (GQA), arXiv:2305.13245. Turning heads before they merge: Jin et al. 2024,
arXiv:2412.20677. Here the turns come from a decomposition of what readers take from all heads of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

POOLS = ("mean", "first", "random")


@dataclass(frozen=True)
class Heads:
    """An attention's weights by head: q (H, D, C + 1), k and v (K, D, C + 1), their biases the last column; o
    (H, D, d_model), the columns that read each head."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


def merge(
    old: Heads, kv_heads: int, how: str, generator: torch.Generator | None = None
) -> tuple[Heads, Heads]:
    """(heads with `kv_heads` of keys and values, what each of the old ones is in effect), see `pool`."""
    k, v = (pool_with_bias(heads, kv_heads, how, generator) for heads in (old.k, old.v))
    return replace(old, k=k, v=v), replace(old, k=spread(k, old.k), v=spread(v, old.v))


def merge_aligned(
    old: Heads, kv_heads: int, turning: int | None, gram: Tensor | None = None
) -> tuple[Heads, Heads]:
    """As `merge`, with queries and the output layer taking in what turns the heads of a group best together.

    turning: how many channels of a key RoPE turns; None where keys cannot be turned before they merge, and
    only values are. gram: of the inputs with a 1 behind each (C + 1, C + 1).
    """
    q, k, v, o = (by_group(part, len(old.k), kv_heads) for part in (old.q, old.k, old.v, old.o))
    new, seen = merge(old, kv_heads, "mean")
    values = align(v.squeeze(2), o, gram)
    new, seen = (
        replace(new, v=values.heads, o=values.readers.flatten(0, 2)),
        replace(seen, v=values.seen.flatten(0, 1)),
    )
    if turning is None:
        return new, seen
    keys = align_keys(k.squeeze(2), q, turning, gram)
    return replace(new, k=keys.heads, q=keys.readers.flatten(0, 2)), replace(seen, k=keys.seen.flatten(0, 1))


def by_group(heads: Tensor, present: int, kv_heads: int) -> Tensor:
    """Heads (n, D, C) as (groups, key-value heads in a group, heads for each of these, D, C)."""
    return heads.unflatten(0, (kv_heads, present // kv_heads, -1))


def spread(shared: Tensor, old: Tensor) -> Tensor:
    """Shared heads (kv_heads, D, C), each as often as it stands for one of the `old` (K, D, C)."""
    return shared.repeat_interleave(len(old) // len(shared), 0)


def pool_with_bias(heads: Tensor, kv_heads: int, how: str, generator: torch.Generator | None) -> Tensor:
    """`pool` of weights and of biases (the last column); what is drawn has the deviation of either."""
    parts = heads.split([heads.shape[-1] - 1, 1], -1)
    return torch.cat([pool(part, kv_heads, how, generator) for part in parts], -1)


def pool(heads: Tensor, kv_heads: int, how: str, generator: torch.Generator | None = None) -> Tensor:
    """One head for each of `kv_heads` groups of neighbours: heads (K, D, C) become (kv_heads, D, C).

    how: the group's "mean", its "first" head, or a "random" one, drawn with the standard deviation of all.
    With kv_heads = K, mean and first are the heads themselves.
    """
    groups = heads.unflatten(0, (kv_heads, -1))  # (kv_heads, heads in a group, D, C)
    if how == "mean":
        return groups.mean(1)
    if how == "first":
        return groups[:, 0]
    drawn = torch.randn(groups[:, 0].shape, generator=generator, dtype=heads.dtype)
    return drawn.to(heads.device) * heads.std()


@dataclass(frozen=True)
class Aligned:
    """`heads` (..., n, C), one for each group; `readers` (..., g, r, n, M) that read it in place of theirs;
    seen (..., g, n, C): what each of the g heads that were is in effect."""

    heads: Tensor
    readers: Tensor
    seen: Tensor


def align(
    heads: Tensor, readers: Tensor, gram: Tensor | None = None, reader_gram: Tensor | None = None
) -> Aligned:
    """The one head for g heads (..., g, n, C) with which their readers (..., g, r, n, M) lose least.

    A reader R takes R^H W from its head W: so a head W may become A W if its readers become A^-H R, for any
    invertible A (n, n). All root @ W, where root^H root is the sum of R R^H, are laid below one another and
    projected on the n main directions of what they give for inputs with this gram X^T X (C, C). Lossless
    where each head is another's up to some A. Complex numbers, n = 1: pairs of channels that RoPE turns.
    reader_gram (M, M): of what the readers read, all alike without it.
    """
    group, n = heads.shape[-3:-1]
    weight = (times(readers, reader_gram) @ readers.mH).sum(-3)  # (..., g, n, n)
    root, back = roots(weight)
    stacked = (root @ heads).flatten(-3, -2)  # (..., g n, C)
    directions = torch.linalg.eigh(times(stacked, gram) @ stacked.mH).eigenvectors[..., -n:]  # (..., g n, n)
    shared = directions.mH @ stacked  # (..., n, C)
    mixes = back @ directions.unflatten(-2, (group, n))  # (..., g, n, n)
    seen = mixes @ shared[..., None, :, :]
    # as large as the heads were, for training that goes on from here
    large, found = (part.abs().square().mean((-2, -1)) for part in (heads.flatten(-3, -2), shared))
    scale = torch.where((large > 0) & (found > 0), large / found, 1).sqrt()[..., None, None]
    return Aligned(shared * scale, (mixes / scale[..., None]).mH[..., None, :, :] @ readers, seen)


def times(matrix: Tensor, gram: Tensor | None) -> Tensor:
    return matrix if gram is None else matrix @ gram.to(matrix.dtype)


def roots(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(R, R^+) with R^H R = weight (..., n, n), positive semidefinite; what nobody reads is zero in both."""
    values, vectors = torch.linalg.eigh(weight)
    read = values > 1e-12 * values[..., -1:].clamp_min(1e-30)
    size = torch.where(read, values, 0).sqrt().to(weight.dtype)
    inverse = torch.where(read, values, 1).rsqrt() * read
    return size[..., None] * vectors.mH, vectors * inverse.to(weight.dtype)[..., None, :]


def align_keys(keys: Tensor, queries: Tensor, turning: int, gram: Tensor | None = None) -> Aligned:
    """`align` for keys (..., g, D, C) and their queries (..., g, r, D, C), of which RoPE turns the first
    `turning` channels, channel i together with i + turning / 2.

    To turn by an angle t multiplies the complex k_i + j k_(i + turning/2) by e^(jt), and what commutes with
    that is a complex number: one for each head and pair. The other channels are free, as values are.
    """
    pairs = align(paired(keys, turning), paired(queries, turning), gram, gram)
    free = align(keys[..., turning:, :], queries[..., turning:, :], gram, gram)
    both = ((pairs.heads, free.heads), (pairs.readers, free.readers), (pairs.seen, free.seen))
    return Aligned(*(torch.cat([unpaired(turned), still], -2) for turned, still in both))


def paired(heads: Tensor, turning: int) -> Tensor:
    """Channels (..., D, C) that turn as complex rows with the pair in front: (pairs, ..., 1, C)."""
    real, imaginary = heads[..., :turning, :].unflatten(-2, (2, -1)).unbind(-3)  # (..., pairs, C) each
    return torch.complex(real, imaginary).movedim(-2, 0).unsqueeze(-2)


def unpaired(rows: Tensor) -> Tensor:
    """Complex rows (pairs, ..., 1, C) as the channels (..., 2 pairs, C) that they stand for."""
    found = rows.squeeze(-2).movedim(0, -2)
    return torch.cat([found.real, found.imag], -2)
