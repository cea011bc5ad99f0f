"""Rows that are sums of tensor products of short vectors: word2ket, word2ketXS, MorphTE.

q^order numbers come from `order` vectors of q: 512 from three of 8.
word2ket and word2ketXS: Panahi et al. 2020, arXiv:1911.04975. MorphTE: Gan et al. 2022, arXiv:2210.15379.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightlib.lowrank.embeddings import Stored, digits, gather, root_up, stored_in
from lightlib.lowrank.morphemes import Morphemes

ROWS_AT_ONCE = 4096  # of a table: bounds the memory that the vectors of all rows take


class Word2Ket(nn.Module):
    """Row i is a sum of `rank` tensor products of `order` vectors, all its own.

    Order 1, rank 1: a plain table. rank x order x q numbers a word, with q the order-th root of the width.
    norm: a LayerNorm after the sum. std: of a row's entries at the start.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        rank: int,
        order: int = 2,
        *,
        norm: bool = False,
        std: float = 1.0,
        generator=None,
    ):
        super().__init__()
        self.vocabulary, self.width = vocabulary, width
        self.vectors = nn.Parameter(torch.empty(vocabulary, order, rank, root_up(width, order)))
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        nn.init.normal_(self.vectors, std=factor_std(std, rank, order), generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(sum_of_products(gather(self.vectors, ids))[..., : self.width])

    def table(self) -> Tensor:
        return row_by_row(self)

    @property
    def stored(self) -> Stored:
        return stored_in(self)


class Word2KetXS(nn.Module):
    """Vector j of row i is that of i's j-th digit: words share them. Order 1, rank 1: a plain table.

    With digits in base t, the order-th root of the vocabulary: rank x order x t x q numbers in all.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        rank: int,
        order: int = 2,
        *,
        norm: bool = False,
        std: float = 1.0,
        generator=None,
    ):
        super().__init__()
        self.vocabulary, self.width = vocabulary, width
        base, q = root_up(vocabulary, order), root_up(width, order)
        self.vectors = nn.Parameter(torch.empty(order, base, rank, q))
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        nn.init.normal_(self.vectors, std=factor_std(std, rank, order), generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        order, base = self.vectors.shape[:2]
        places = torch.stack(digits(ids, [base] * order, self.vocabulary), dim=-1)  # (..., order)
        places = places + base * torch.arange(order, device=ids.device)  # in the vectors of all digits
        chosen = gather(self.vectors.flatten(0, 1), places)  # (..., order, rank, q)
        return self.norm(sum_of_products(chosen)[..., : self.width])

    def table(self) -> Tensor:
        # a sum of Kronecker products: one matrix product, without a gathered vector for each row
        whole = self.vectors[0].transpose(0, 1)  # (rank, t, q)
        for vectors in self.vectors[1:-1]:
            whole = torch.einsum("kia,jkb->kijab", whole, vectors).flatten(3, 4).flatten(1, 2)
        if len(self.vectors) == 1:
            whole = whole.sum(0)
        else:
            whole = torch.einsum("kia,jkb->ijab", whole, self.vectors[-1]).flatten(2, 3).flatten(0, 1)
        return self.norm(whole[: self.vocabulary, : self.width])

    @property
    def stored(self) -> Stored:
        return stored_in(self)


class MorphTE(nn.Module):
    """Vector j of row i is that of word i's j-th morpheme, whatever its place: words share what they share.

    morphemes x rank x q numbers. `index` (vocabulary, order) says which; it does not learn and is stored too.
    Order 1, rank 1 and a morpheme a word: a plain table. The pad is a morpheme like any other: the authors'
    pad of zeros would make every product zero that it enters.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        rank: int,
        order: int,
        morphemes: int,
        *,
        norm: bool = False,
        std: float = 1.0,
        generator=None,
    ):
        super().__init__()
        self.vocabulary, self.width = vocabulary, width
        self.vectors = nn.Parameter(torch.empty(morphemes, rank, root_up(width, order)))
        narrow = torch.int16 if morphemes <= 2**15 else torch.int32
        self.register_buffer("index", torch.zeros(vocabulary, order, dtype=narrow))
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        nn.init.normal_(self.vectors, std=factor_std(std, rank, order), generator=generator)

    @classmethod
    def of(cls, morphemes: Morphemes, width: int, rank: int, **settings) -> MorphTE:
        """An embedding of words cut into `morphemes`."""
        words, order = morphemes.index.shape
        embedding = cls(words, width, rank, order, len(morphemes.names), **settings)
        embedding.index.copy_(morphemes.index)
        return embedding

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(sum_of_products(gather(self.vectors, self.index[ids].int()))[..., : self.width])

    def table(self) -> Tensor:
        return row_by_row(self)

    @property
    def stored(self) -> Stored:
        return stored_in(self)


def sum_of_products(vectors: Tensor) -> Tensor:
    """sum_k v_1k (x) v_2k (x) ... of vectors (..., order, rank, q): (..., q^order). Order 1: sum_k v_1k."""
    *first, last = vectors.unbind(-3)  # each (..., rank, q)
    if not first:
        return last.sum(-2)
    product = first[0]
    for each in first[1:]:
        product = (product[..., :, None] * each[..., None, :]).flatten(-2)  # (..., rank, q^j)
    return (product.mT @ last).flatten(-2)  # the last product and the sum over k are one


def factor_std(std: float, rank: int, order: int) -> float:
    """The deviation of vectors at which a sum of `rank` products of `order` of them has `std`.

    Products of small numbers vanish: at 0.02, the usual start, three of them would give 0.000008.
    """
    return (std**2 / rank) ** (0.5 / order)


def row_by_row(embedding: nn.Module) -> Tensor:
    """The table (vocabulary, width) of an embedding, some thousand rows at a time."""
    ids = torch.arange(embedding.vocabulary, device=embedding.vectors.device)
    return torch.cat([embedding(part) for part in ids.split(ROWS_AT_ONCE)])
