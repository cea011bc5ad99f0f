"""Fits of a table (vocabulary, width): what an embedding of fewer numbers stores to come near to its rows.

The best low-rank product, a near-best tensor train and the best word2ketXS of order 2 are found by SVDs; the
others by Adam on the squared error.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightlib.lowrank.embeddings import LowRankEmbedding, TTEmbedding
from lightlib.lowrank.kets import Word2KetXS
from lightlib.lowrank.tensor_train import tt_svd

ROWS_AT_ONCE = 4096  # of a table in a step of Adam


def low_rank_factors(table: Tensor, rank: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """codes (vocabulary, rank) and basis (rank, width) of the least weighted error.

    The error: sum_i weights_i |row_i - codes_i basis|^2. Equal weights give the truncated SVD. Weights choose
    the basis only: in it, each row's best codes are its own coordinates.
    """
    T = table.double()
    directions = torch.linalg.eigh((T * weights.double()[:, None]).T @ T).eigenvectors  # rising
    basis = directions.flip(1)[:, :rank].T  # (rank, width)
    return T @ basis.T, basis


def pair_factors(table: Tensor, rank: int, base: int, q: int) -> Tensor:
    """The vectors (2, base, rank, q) of the best word2ketXS of order 2: a truncated SVD in disguise.

    Where row (i, j) is sum_k a_ik (x) b_jk, the table's numbers in the order (i, a), (j, b) are one matrix:
    the product of all a with all b (Van Loan & Pitsianis 1993).
    """
    square = torch.zeros(base * base, q * q, dtype=table.dtype, device=table.device)
    square[: table.shape[0], : table.shape[1]] = table
    square = square.view(base, base, q, q).transpose(1, 2).reshape(base * q, base * q)
    codes, basis = low_rank_factors(square, rank, torch.ones(len(square), device=table.device))
    return torch.stack([part.view(base, q, -1).transpose(1, 2) for part in (codes, basis.T)])


def train_cores(table: Tensor, rows: tuple[int, ...], columns: tuple[int, ...], ranks: tuple[int, ...]):
    """The cores (v_k, r_(k-1), d_k, r_k) of a tensor train near to the table, by one SVD after the other."""
    n = len(rows)
    whole = torch.zeros(math.prod(rows), math.prod(columns), dtype=torch.float64, device=table.device)
    whole[: table.shape[0], : table.shape[1]] = table
    pairs = [axis for k in range(n) for axis in (k, n + k)]
    sizes = list(zip(rows, columns, strict=True))
    paired = whole.view(*rows, *columns).permute(pairs).reshape([v * d for v, d in sizes])
    cores = tt_svd(paired, ranks[1:-1]).cores  # each (r_(k-1), v_k d_k, r_k)
    return [core.view(len(core), v, d, -1).transpose(0, 1) for core, (v, d) in zip(cores, sizes, strict=True)]


def fit_directly(embedding: nn.Module, table: Tensor, weights: Tensor) -> bool:
    """Give `embedding` the factors that an SVD finds, if one does; whether they are best for `weights`."""
    even = bool((weights == weights[0]).all())
    if isinstance(embedding, LowRankEmbedding):
        embedding.codes.data, embedding.basis.data = (
            part.float().contiguous() for part in low_rank_factors(table, embedding.rank, weights)
        )
        return True
    if isinstance(embedding, TTEmbedding):
        cores = train_cores(table, embedding.rows, embedding.columns, embedding.ranks)
        for parameter, core in zip(embedding.cores, cores, strict=True):
            parameter.data = core.float().contiguous()
        return even
    if isinstance(embedding, Word2KetXS) and len(embedding.vectors) == 2:
        _, base, rank, q = embedding.vectors.shape
        embedding.vectors.data = pair_factors(table, rank, base, q).float().contiguous()
        return even
    return False


@torch.enable_grad()
def fit(
    embedding: nn.Module,
    table: Tensor,
    weights: Tensor,
    steps: int,
    lr: float,
    generator: torch.Generator,
    progress: bool = True,
) -> None:
    """Move what `embedding` stores to where its rows are near those of `table`, by Adam down a cosine.

    lr: how far a step moves a number, as a share of the numbers' own size.
    """
    weights_of = list(embedding.parameters())
    rates = [lr * p.detach().square().mean().sqrt().item() for p in weights_of]
    optimizer = torch.optim.Adam([{"params": [p], "lr": r} for p, r in zip(weights_of, rates, strict=True)])
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / steps)))
    whole = (weights[:, None] * table.square()).mean()
    for _ in tqdm(range(steps), desc="fit embedding", unit="step", disable=not progress):
        if len(table) <= ROWS_AT_ONCE:
            loss = (weights[:, None] * (embedding.table() - table).square()).mean() / whole
        else:
            ids = torch.randperm(len(table), generator=generator)[:ROWS_AT_ONCE].to(table.device)
            loss = (weights[ids, None] * (embedding(ids) - table[ids]).square()).mean() / whole
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cosine.step()
    optimizer.zero_grad()
