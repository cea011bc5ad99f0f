"""A trained model's embedding in fewer numbers, and its head where the two share a weight.

The table is fitted after training: by truncated SVD where the best is known, otherwise by Adam on the squared
error. Words that occur often can weigh more, or keep rows of their own.
"""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor, nn

from lightlib.change import changing, remember
from lightlib.decoder import check_linears, roles
from lightlib.lowrank.embeddings import LowRankEmbedding
from lightlib.lowrank.fit_table import fit, fit_directly
from lightlib.lowrank.lookup import KINDS, RESTRUCTURE, Lookup, install
from lightlib.lowrank.morphemes import Morphemes
from lightlib.report import Compressed, LayerReport, Report, relative_error


def compress_embedding(
    model: nn.Module,
    batches: list[Tensor] | None = None,
    *,
    kind: str = "low_rank",
    ratio: float = 4.0,
    rank: int | None = None,
    order: int | None = None,
    morphemes: Morphemes | None = None,
    weighting: str | None = None,
    dense_rows: int = 0,
    steps: int = 300,
    lr: float = 0.02,
    seed: int = 0,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """Put an embedding of `kind` in place of the model's table (vocabulary, width).

    kind: "low_rank", "tt", "word2ket", "word2ketxs" or "morphte", which needs `morphemes`. ratio: bytes
    before over after, a table of indices and dense rows counted; `rank` sets it directly. order: how many
    cores or factors (2; a train has 3; morphte that of its morphemes). weighting: "frequency" weighs the
    error of a row by how often its token occurs in `batches`, plus one. dense_rows: so many of the most
    frequent tokens keep their row. steps, lr, seed: of Adam, which fits what has no closed form. A head that
    shared the table reads the new one: for low rank by two thin products, which is less work; for the others
    it computes the table at each call, so that its speed is simulated. The report's error is that of the
    weights alone. Raises ValueError for settings that do not fit.
    """
    check_settings(kind, weighting, dense_rows, batches, morphemes)
    if ratio <= 0 or (rank is not None and rank < 1):
        raise ValueError(f"ratio={ratio}, rank={rank}: a ratio is above 0, a rank at least 1")
    with changing(model, inplace) as light:
        check_linears(light)
        old, head = light.get_input_embeddings(), light.get_output_embeddings()
        if not isinstance(old, nn.Embedding):
            raise ValueError(f"{roles(light).embedding} is a {type(old).__name__} already")
        table, tied = old.weight.detach().float(), head.weight is old.weight
        counts = token_counts(batches, len(table)).to(table.device) if batches else None
        settings = sizes(kind, table, order, morphemes)
        budget = old.weight.nbytes / ratio - dense_rows * (old.weight[0].nbytes + 4)  # 4: of its id
        settings["rank"] = rank or largest_rank(kind, settings, budget, old.weight.itemsize)

        weights = torch.ones(len(table), device=table.device) if weighting is None else counts + 1.0
        kept = counts.topk(dense_rows).indices.sort().values if dense_rows else None
        if kept is not None:
            weights[kept] = 0.0
        generator = torch.Generator().manual_seed(seed)
        # smaller than the table's: rows as large as its own, and unlike them, are further off than zeros
        embedding = KINDS[kind](**settings, std=table.std().item() / 4, generator=generator)
        if kind == "morphte":
            embedding.index[: len(morphemes.index)] = morphemes.index  # rows that no token has get pads
        embedding.to(table.device)
        if not fit_directly(embedding, table, weights):
            fit(embedding, table, weights, steps, lr, generator, progress)

        scale = old.embed_scale.to(old.weight.dtype).item() if hasattr(old, "embed_scale") else 1.0
        lookup = Lookup(embedding, dense_rows, scale).to(table.device)
        if kept is not None:
            lookup.ids, lookup.rows.data = kept.int(), table[kept]
        lookup.to(old.weight.dtype).requires_grad_(old.weight.requires_grad)
        install(light, lookup, tied)
        built = {"kind": kind, "settings": settings, "dense_rows": dense_rows, "scale": scale, "tied": tied}
        remember(light, RESTRUCTURE, built)
        row = report(roles(light).embedding, kind, old.weight, lookup, settings["rank"], tied)
    return Compressed(light, Report((row,)))


def check_settings(kind: str, weighting: str | None, dense_rows: int, batches, morphemes) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(KINDS)}")
    if weighting not in (None, "frequency"):
        raise ValueError(f"weighting={weighting!r}: choose 'frequency' or None")
    if (weighting or dense_rows) and not batches:
        raise ValueError("how often a token occurs is counted in batches; give some")
    if (kind == "morphte") != (morphemes is not None):
        raise ValueError("morphte, and no other kind, takes morphemes: morphemes.of_vocabulary(tokenizer)")


def token_counts(batches: list[Tensor], vocabulary: int) -> Tensor:
    """How often each token occurs in the batches: (vocabulary,), float32."""
    return torch.cat([ids.flatten().cpu() for ids in batches]).bincount(minlength=vocabulary).float()


def sizes(kind: str, table: Tensor, order: int | None, morphemes: Morphemes | None) -> dict:
    """What the embedding's class is built from, its rank left out."""
    settings = {"vocabulary": table.shape[0], "width": table.shape[1]}
    if kind == "morphte":
        words, own = morphemes.index.shape
        if words > len(table) or order not in (None, own):
            raise ValueError(
                f"the morphemes are {own} each of {words} words, for order={order} and {len(table)} tokens; "
                "take of_vocabulary(tokenizer, order) of the model's own tokenizer"
            )
        return settings | {"order": own, "morphemes": len(morphemes.names)}
    if kind == "low_rank":
        return settings
    return settings | {"order": order or (3 if kind == "tt" else 2)}


def largest_rank(kind: str, settings: dict, budget: float, itemsize: int) -> int:
    """The largest rank at which the embedding takes at most `budget` bytes; ValueError if none does."""

    def taken(rank: int) -> int:
        with torch.device("meta"):
            found = KINDS[kind](**settings, rank=rank).stored
        return found.numbers * itemsize + found.index_bytes

    rank = bisect_right(range(1, settings["vocabulary"] * settings["width"]), budget, key=taken)
    if not rank:
        raise ValueError(
            f"{kind} of rank 1 takes {taken(1)} bytes and the ratio allows {max(budget, 0):.0f}; take a "
            "smaller ratio, a higher order or fewer dense rows"
        )
    return rank


def report(name: str, kind: str, before: Tensor, lookup: Lookup, rank: int, tied: bool) -> LayerReport:
    """A row: the embedding, and how a head that shares it reads it."""
    after, before = lookup.stored, before.detach()
    by = (
        "two thin products"
        if isinstance(lookup.embedding, LowRankEmbedding)
        else "the whole table (simulated)"
    )
    head = f"; the head reads it by {by}" if tied else ""
    notes = f"{kind}, rank {rank}: {after.numbers} numbers, {after.index_bytes} bytes of indices{head}"
    error = relative_error(before.float(), lookup.table().float())
    bits = before.nbytes * 8, after.total_bytes * 8
    return LayerReport("compress_embedding", name, tuple(before.shape), *bits, error, notes)
