"""Embeddings in fewer numbers: at their limits they are plain tables, and the papers' sizes come out."""

import math

import pytest
import torch
from torch.testing import assert_close

from lightlib.lowrank.embeddings import LowRankEmbedding, TTEmbedding, digits, near_equal, root_up
from lightlib.lowrank.kets import MorphTE, Word2Ket, Word2KetXS, sum_of_products
from lightlib.lowrank.morphemes import Morphemes, random_codes

V, D = 23, 12  # neither is a square or a cube, so tables are cut


def morphte(words=V, width=D, rank=2, order=3, count=9, **settings):
    return MorphTE.of(random_codes(words, order, count), width, rank, **settings)


EVERY = {
    "low_rank": lambda **named: LowRankEmbedding(V, D, 3, **named),
    "tt": lambda **named: TTEmbedding(V, D, 3, **named),
    "word2ket": lambda **named: Word2Ket(V, D, 2, 3, **named),
    "word2ketxs": lambda **named: Word2KetXS(V, D, 2, 3, **named),
    "word2ketxs of order 2": lambda **named: Word2KetXS(V, D, 2, **named),
    "morphte": morphte,
}
WITH_NORM = [name for name in EVERY if name not in ("low_rank", "tt")]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def on_meta(kind, *sizes, **settings):
    with torch.device("meta"):
        return kind(*sizes, **settings)


@pytest.mark.parametrize("name", EVERY)
def test_rows_asked_for_are_rows_of_the_table(name):
    embedding = EVERY[name](generator=seeded())
    ids = torch.tensor([[0, V - 1, 7], [7, 1, 11]])
    assert embedding(ids).shape == (2, 3, D)
    assert_close(embedding(ids), embedding.table()[ids])
    assert embedding(torch.tensor(5)).shape == (D,) and embedding(ids[:0]).shape == (0, 3, D)


@pytest.mark.parametrize("name", WITH_NORM)
def test_a_norm_acts_on_rows_and_is_counted(name):
    plain, normed = (EVERY[name](norm=norm, generator=seeded()) for norm in (False, True))
    assert_close(normed.table(), torch.nn.functional.layer_norm(plain.table(), (D,)))
    assert_close(normed(torch.arange(V)), normed.table())
    assert normed.stored.numbers == plain.stored.numbers + 2 * D


@pytest.mark.parametrize("name", EVERY)
def test_gradients_reach_all_that_a_row_is_made_of_and_nothing_else(name):
    embedding = EVERY[name](generator=seeded())
    embedding(torch.tensor([3])).sum().backward()
    moved = sum((p.grad != 0).sum().item() for p in embedding.parameters())
    assert all(p.grad is not None and (p.grad != 0).any() for p in embedding.parameters())
    assert moved < embedding.stored.numbers, "only what the row is made of"


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("std", [1.0, 0.02])
def test_rows_begin_as_large_as_asked_for(name, std):
    rows = torch.stack([EVERY[name](std=std, generator=seeded(s)).table() for s in range(200)])
    assert rows.std().item() == pytest.approx(std, rel=0.2)


@pytest.mark.parametrize("name", EVERY)
def test_an_id_outside_of_the_vocabulary_is_an_error(name):
    with pytest.raises(IndexError):
        EVERY[name](generator=seeded())(torch.tensor([1, 60]))


def test_low_rank_at_full_rank_holds_any_table():
    table = torch.randn(V, D)
    embedding = LowRankEmbedding(V, D, D)
    embedding.codes.data, embedding.basis.data = table, torch.eye(D)
    assert torch.equal(embedding.table(), table)
    assert embedding.stored.numbers == V * D + D * D


def test_of_order_1_and_rank_1_all_are_plain_tables():
    table = torch.randn(V, D)
    ket, xs, morph = Word2Ket(V, D, 1, 1), Word2KetXS(V, D, 1, 1), MorphTE(V, D, 1, 1, V)
    train = TTEmbedding(V, D, (), 1)
    ket.vectors.data, xs.vectors.data = table.view(V, 1, 1, D), table.view(1, V, 1, D)
    morph.vectors.data = table.view(V, 1, D)
    morph.index.copy_(torch.arange(V)[:, None])
    train.cores[0].data = table.view(V, 1, D, 1)
    for embedding in (ket, xs, morph, train):
        assert torch.equal(embedding.table(), table)
        assert torch.equal(embedding(torch.tensor([4, 4, 2])), table[[4, 4, 2]])
        assert embedding.stored.numbers == V * D


def test_tensor_products_are_summed():
    vectors = torch.randn(5, 3, 2, 4)  # (words, order, rank, q)
    for word in range(5):
        whole = sum(
            torch.kron(torch.kron(vectors[word, 0, k], vectors[word, 1, k]), vectors[word, 2, k])
            for k in range(2)
        )
        assert_close(sum_of_products(vectors)[word], whole)


def test_morphte_by_hand():
    names = ("", "un", "do", "ne")
    words = Morphemes(names, torch.tensor([[1, 2], [2, 3], [2, 0]]), 1.0)  # undo, done, do
    embedding = MorphTE.of(words, 4, 1)
    embedding.vectors.data = torch.tensor([[[1.0, 0.0]], [[1.0, 2.0]], [[3.0, 5.0]], [[0.0, 1.0]]])
    assert embedding.table().tolist() == [[3, 5, 6, 10], [0, 3, 0, 5], [3, 0, 5, 0]]


def test_the_vector_of_a_morpheme_is_the_same_in_any_place():
    both = Morphemes(("", "a", "b"), torch.tensor([[1, 2], [2, 1]]), 1.0)
    embedding = MorphTE.of(both, 9, 2, generator=seeded())
    ab, ba = embedding.table().view(2, 3, 3)
    assert_close(ab, ba.T)


def test_a_row_of_word2ketxs_is_the_kronecker_product_of_its_digits_vectors():
    embedding = Word2KetXS(27, 8, 1, 3, generator=seeded())
    a, b, c = embedding.vectors[:, :, 0]  # (t, q) each
    row = torch.kron(torch.kron(a[2], b[0]), c[1])
    assert_close(embedding(torch.tensor(2 * 9 + 0 * 3 + 1)), row)
    assert_close(embedding.table(), torch.kron(torch.kron(a, b), c))


def test_word2ketxs_is_morphte_whose_morphemes_are_the_digits_of_the_word():
    xs = Word2KetXS(V, D, 2, generator=seeded())
    base = xs.vectors.shape[1]
    places = torch.stack(digits(torch.arange(V), (base, base), V), 1) + torch.tensor([0, base])
    morph = MorphTE.of(Morphemes(tuple(map(str, range(2 * base))), places, 1.0), D, 2)
    morph.vectors.data = xs.vectors.data.flatten(0, 1)
    assert_close(morph.table(), xs.table())


def test_digits_count_up():
    ids = torch.arange(24)
    a, b, c = digits(ids, (2, 3, 4), 24)
    assert torch.equal((a * 3 + b) * 4 + c, ids)
    assert a.max() == 1 and b.max() == 2 and c.max() == 3


def test_roots_and_near_equal_sizes_hold_all():
    for total in range(1, 700):
        for order in range(1, 6):
            root, sizes = root_up(total, order), near_equal(total, order)
            assert root**order >= total and (root == 1 or (root - 1) ** order < total)
            assert math.prod(sizes) >= total and max(sizes) <= root
    assert near_equal(576, 3) == (9, 8, 8)


def test_the_sizes_of_the_papers():
    assert on_meta(Word2KetXS, 30000, 256, 1, 4).stored.numbers == 224
    assert on_meta(Word2KetXS, 30000, 256, 2, 4).stored.numbers == 448
    assert on_meta(Word2Ket, 1000, 512, 2, 3).stored.numbers == 48 * 1000
    # De-En of MorphTE's paper: 0.37 million are its vectors and the table of indices
    stored = on_meta(MorphTE, 15480, 512, 7, 3, 5757).stored
    assert stored.numbers == 5757 * 7 * 8 == 322_392
    assert round((stored.numbers + 15480 * 3) / 1e6, 2) == 0.37
    assert stored.index_bytes == 15480 * 3 * 2
    assert on_meta(Word2Ket, 15480, 512, 7, 3).stored.numbers == pytest.approx(
        stored.numbers * 3 * 15480 / 5757
    )


def test_many_morphemes_take_wider_indices():
    assert on_meta(MorphTE, 10, 8, 1, 3, 2**15).stored.index_bytes == 10 * 3 * 2
    assert on_meta(MorphTE, 10, 8, 1, 3, 2**15 + 1).stored.index_bytes == 10 * 3 * 4


def test_a_train_of_full_ranks_is_no_larger_than_it_need_be():
    embedding = TTEmbedding(V, D, 10_000)
    sizes = [v * d for v, d in zip(embedding.rows, embedding.columns, strict=True)]
    assert embedding.ranks == (1, sizes[0], sizes[2], 1)
    with pytest.raises(ValueError, match="has 2 bonds"):
        TTEmbedding(V, D, (2, 2, 2))
