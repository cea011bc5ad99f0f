"""A compact embedding in a language model, and the head that reads it where the two shared their weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightlib.decoder import roles
from lightlib.lowrank.embeddings import LowRankEmbedding, Stored, TTEmbedding, stored_in
from lightlib.lowrank.kets import MorphTE, Word2Ket, Word2KetXS

KINDS = {
    "low_rank": LowRankEmbedding,
    "tt": TTEmbedding,
    "word2ket": Word2Ket,
    "word2ketxs": Word2KetXS,
    "morphte": MorphTE,
}
RESTRUCTURE = "lightlib.lowrank.lookup:restructure"


class Lookup(nn.Module):
    """A model's embedding: rows that `embedding` makes, but for `dense_rows` ids that keep rows of their own.

    scale: what the model multiplies by what it looks up, and its head does not (Gemma).
    """

    def __init__(self, embedding: nn.Module, dense_rows: int = 0, scale: float = 1.0):
        super().__init__()
        self.embedding, self.scale = embedding, scale
        self.register_buffer("ids", torch.arange(dense_rows, dtype=torch.int32) if dense_rows else None)
        self.rows = nn.Parameter(torch.zeros(dense_rows, embedding.width)) if dense_rows else None

    def forward(self, ids: Tensor) -> Tensor:
        found = self.embedding(ids)
        if self.ids is not None:
            place = torch.searchsorted(self.ids, ids.int()).clamp_max(len(self.ids) - 1)
            found = torch.where((self.ids[place] == ids)[..., None], self.rows[place], found)
        return found * self.scale

    def table(self) -> Tensor:
        """All rows (vocabulary, width), without the scale."""
        whole = self.embedding.table()
        return whole if self.ids is None else whole.index_copy(0, self.ids.long(), self.rows)

    def scores(self, x: Tensor) -> Tensor:
        """x (..., width) times each row: (..., vocabulary). For low rank, by two thin products."""
        if not isinstance(self.embedding, LowRankEmbedding):
            return F.linear(x, self.table())
        found = F.linear(F.linear(x, self.embedding.basis), self.embedding.codes)
        return found if self.ids is None else found.index_copy(-1, self.ids.long(), F.linear(x, self.rows))

    @property
    def weight(self) -> Tensor:
        """The table, computed: for code that knows nn.Embedding."""
        return self.table()

    @property
    def stored(self) -> Stored:
        return stored_in(self)


class LookupHead(nn.Module):
    """The head of a model whose embedding it shares.

    Its speed is real for low rank and otherwise simulated: each call computes the table anew.
    """

    def __init__(self, lookup: Lookup, bias: nn.Parameter | None = None):
        super().__init__()
        self.lookup, self.bias = lookup, bias
        self.in_features, self.out_features = lookup.embedding.width, lookup.embedding.vocabulary

    @property
    def weight(self) -> Tensor:
        """The table, computed: for code that knows nn.Linear."""
        return self.lookup.table()

    @property
    def products(self) -> tuple[int, int]:
        """(out, in) of a matrix that takes as many products a token as this does, tables not counted."""
        made, n_out, n_in = self.lookup.embedding, self.out_features, self.in_features
        if not isinstance(made, LowRankEmbedding):
            return n_out, n_in
        kept = 0 if self.lookup.ids is None else len(self.lookup.ids)
        return made.rank * (n_out + n_in) + kept * n_in, 1

    def forward(self, x: Tensor) -> Tensor:
        found = self.lookup.scores(x)
        return found if self.bias is None else found + self.bias


def install(model: nn.Module, lookup: Lookup, tied: bool) -> nn.Module:
    """Put `lookup` in the embedding's place; the head reads it too where they were tied. In place."""
    if tied:
        model.set_submodule("lm_head", LookupHead(lookup, model.get_output_embeddings().bias))
        model.config.tie_word_embeddings = False  # to be tied were two weights; now it is one module
    model.set_submodule(roles(model).embedding, lookup)
    return model


def restructure(
    model: nn.Module, kind: str, settings: dict, dense_rows: int, scale: float, tied: bool
) -> nn.Module:
    """The structure of a model with such an embedding, with weights still to be filled. In place."""
    return install(model, Lookup(KINDS[kind](**settings), dense_rows, scale), tied)
