"""The explorers of lesson 10: numbers and FLOPs equal to what real tensors hold and real products take."""

import itertools
import math

import pytest
import torch

from lightlib.lowrank.cp import als
from lightlib.lowrank.kets import MorphTE
from lightlib.lowrank.morphemes import indexed
from lightlib.lowrank.tensor_train import tt_svd
from lightlib.lowrank.tt_matrix import bonds, tt_matrix
from lightlib.lowrank.tucker import hosvd
from lightlib.lowrank.work import FACTORS, contraction_flops, tucker_flops
from lightlib.widgets.contraction_cost import (
    DENSE,
    LEFT,
    LOW_RANK,
    RIGHT,
    STORAGES,
    TOKENS,
    WHOLE,
    X,
    contract,
    contraction_cost,
    costs,
    factors,
    orders,
    turning_points,
)  # fmt: skip
from lightlib.widgets.morpheme_strip import (
    morpheme_strip,
    shared_by,
    strip,
    table_numbers,
    table_of,
    words_in,
    words_with,
)
from lightlib.widgets.tensor_diagram import (
    CP,
    KINDS,
    MATRICES,
    MATRIX,
    RANKS,
    SHAPES,
    TRAIN,
    TUCKER,
    largest_rank,
    network,
    tensor_diagram,
)
from tests.explorers import is_the_same_twice, redraws_within_200_ms

CUBE = ((12, 12, 12), ())
WORDS = {
    "teach": ["teach"], "teacher": ["teach", "er"], "teachers": ["teach", "er", "s"],
    "reader": ["read", "er"], "readers": ["read", "er", "s"], "reading": ["read", "ing"],
    "the": ["the"], "governments": ["govern", "ment", "s"], "government": ["govern", "ment"],
    "international": ["inter", "national"], "national": ["national"],
}  # fmt: skip


def cut_up(word):
    return WORDS.get(word, [word])


def on_some_words(**options):
    return morpheme_strip(cut_up, WORDS, **options)


every_explorer = pytest.mark.parametrize("make", [tensor_diagram, contraction_cost, on_some_words])


@every_explorer
def test_two_of_a_kind_are_equal_and_every_description_is_wide_enough(make):
    is_the_same_twice(make)


@pytest.mark.alone
@every_explorer
def test_every_control_redraws_within_200_ms(make):
    redraws_within_200_ms(make)


# diagrams
def dense(net) -> torch.Tensor:
    """What a network stands for: all its tensors, drawn at random, multiplied."""
    generator = torch.Generator().manual_seed(0)
    lines = {line: i for i, line in enumerate(net.sizes)}
    pieces = []
    for name, own in net.tensors.items():
        if name not in net.dots:
            pieces += [
                torch.randn([net.sizes[line] for line in own], generator=generator),
                [lines[l] for l in own],
            ]
    return torch.einsum(*pieces, [i for line, i in lines.items() if line[0] in "oi"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_makes_a_tensor_of_the_shape_and_holds_the_numbers_of_its_pieces(kind):
    for shape in (((4, 3), (2, 5)), ((4, 3, 2), (2, 2, 3))):
        net = network(kind, shape, 3)
        assert dense(net).shape == shape[0] + shape[1]
        held = sum(
            math.prod(net.sizes[line] for line in own)
            for name, own in net.tensors.items()
            if name not in net.dots
        )
        assert net.stored == held


def test_stored_numbers_are_those_of_the_formulas_and_of_real_decompositions():
    n, r, T = 12, 5, torch.randn(12, 12, 12, generator=torch.Generator().manual_seed(0))
    tucker, cp, train = (network(kind, CUBE, r).stored for kind in (TUCKER, CP, TRAIN))
    assert tucker == hosvd(T, (r, r, r)).stored == r**3 + 3 * n * r
    assert cp == als(T, r, sweeps=1).stored - r == 3 * n * r  # without its weights
    assert train == tt_svd(T, r).stored == n * r + r * n * r + r * n
    matrix = ((8, 9, 8), (8, 9, 8))
    stored = network(MATRIX, matrix, r).stored
    assert stored == tt_matrix(torch.randn(576, 576), *matrix, r).stored == 64 * r + r * 81 * r + r * 64


def test_no_rank_is_larger_than_it_can_be():
    train = network(TRAIN, ((8, 9, 8, 24), ()), 1000)
    assert [train.sizes[f"r{k}"] for k in range(1, 4)] == [8, 72, 24]
    tucker = network(TUCKER, ((8, 9, 8, 24), ()), 1000)
    assert [tucker.sizes[f"r{k}"] for k in range(1, 5)] == [8, 9, 8, 24]
    assert network(CP, CUBE, 128).sizes["r"] == 128  # a CP rank may be larger than any mode


@pytest.mark.parametrize("kind", KINDS)
def test_up_to_the_rank_named_less_is_stored_and_not_beyond(kind):
    for name, shape in (MATRICES if kind == MATRIX else SHAPES).items():
        least, full = largest_rank(kind, shape), math.prod(shape[0] + shape[1])
        for rank in RANKS:
            assert (network(kind, shape, rank).stored < full) == (rank <= least), (name, rank)


def test_only_matrices_are_offered_to_the_matrix_train():
    ex = tensor_diagram()
    assert list(ex.controls["shape"].options) == list(SHAPES)
    ex.set(kind=MATRIX)
    assert list(ex.controls["shape"].options) == list(MATRICES) and ex.values["shape"] in MATRICES
    with pytest.raises(ValueError, match="does not fit"):
        ex.set(shape="12 x 12 x 12")


def test_it_says_what_each_tensor_holds_and_what_that_saves():
    says = tensor_diagram().set(kind=TRAIN, shape="12 x 12 x 12", rank=4).result["says"]
    assert says.startswith("tensor train stores 48 + 192 + 48 = 288 numbers instead of 1,728, 6 times fewer")
    assert "which saves nothing" in tensor_diagram().set(shape="12 x 12 x 12", rank=12).result["says"]


@pytest.mark.parametrize(("kind", "shape"), list(itertools.product(KINDS, SHAPES)))
def test_every_diagram_can_be_drawn(kind, shape):
    if kind == MATRIX and shape not in MATRICES:
        return
    ex = tensor_diagram().set(kind=kind, shape=shape, rank=128)
    assert len(ex._png) > 5000 and ex.result["numbers_stored"] > 0


# orders of contraction
def test_a_product_of_two_matrices_takes_what_is_known():
    lines, sizes = {"A": ("a", "b"), "B": ("b", "c"), "C": ("c", "d")}, {"a": 2, "b": 3, "c": 5, "d": 7}
    assert contract(["A", "B"], lines, sizes) == (2 * 2 * 3 * 5, 0)
    assert contract(["A", "B", "C"], lines, sizes) == (2 * 2 * 3 * 5 + 2 * 2 * 5 * 7, 2 * 5)


@pytest.mark.parametrize("tokens", [1, 64])
def test_low_rank_takes_the_textbook_formulas(tokens):
    found = costs(LOW_RANK, ((24, 24), (24, 24)), 16, tokens)
    assert found[RIGHT] == (2 * tokens * 16 * (576 + 576), tokens * 16)
    assert found[LEFT] == found[DENSE] == (2 * 16 * 576**2 + 2 * tokens * 576**2, 576**2)
    assert found[WHOLE] == (2 * tokens * 576**2, 0)


@pytest.mark.parametrize("shape", list(MATRICES.values()))
def test_flops_are_those_that_layers_choose_their_order_by(shape):
    for rank, tokens in itertools.product((1, 4, 7), (1, 64)):  # below every mode: factors of all
        found = costs(MATRIX, shape, rank, tokens)
        layer = contraction_flops(*shape, bonds(*shape, rank))
        for ours, theirs in ((LEFT, LEFT), (RIGHT, RIGHT), (DENSE, "dense")):
            assert found[ours].flop == layer[theirs].of(tokens)
        found, layer = costs(TUCKER, shape, rank, tokens), tucker_flops(*shape, [rank] * 2 * len(shape[0]))
        assert (found[LEFT].flop, found[DENSE].flop) == (layer[FACTORS].of(tokens), layer["dense"].of(tokens))


@pytest.mark.parametrize("kind", STORAGES)
def test_real_products_in_every_order_give_one_result_and_results_of_the_sizes_counted(kind):
    shape, tokens = ((3, 2, 2), (2, 3, 2)), 5
    net = factors(kind, shape, 2)
    generator = torch.Generator().manual_seed(0)
    inputs = [line for line in net.sizes if line[0] == "i"]
    lines, sizes = {**net.tensors, X: ("t", *inputs)}, {**net.sizes, "t": tokens}
    number = {line: i for i, line in enumerate(sizes)}
    made = {name: torch.randn([sizes[l] for l in own], generator=generator) for name, own in lines.items()}
    results, counted = [], costs(kind, shape, 2, tokens)
    for name, order in orders(kind, list(net.tensors), len(shape[0])).items():
        here, own, flop, sizes_seen = made[order[0]], list(lines[order[0]]), 0, []
        for other in order[1:]:
            flop += 2 * math.prod(sizes[line] for line in {*own, *lines[other]})
            left = [line for line in (*own, *lines[other]) if (line in own) != (line in lines[other])]
            here = torch.einsum(
                here,
                [number[l] for l in own],
                made[other],
                [number[l] for l in lines[other]],
                [number[l] for l in left],
            )
            own = left
            sizes_seen.append(here.numel())
        assert counted[name] == (flop, max(sizes_seen[:-1]))
        outputs = sorted(line for line in own if line != "t")
        results.append(here.permute(own.index("t"), *(own.index(o) for o in outputs)).flatten(1))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[2], results[0], rtol=1e-4, atol=1e-4)
    assert results[0].shape == (tokens, 12)


@pytest.mark.parametrize("kind", STORAGES)
@pytest.mark.parametrize("tokens", [1, 32, 512])
def test_from_the_ranks_named_dense_is_cheapest_and_before_it_is_not(kind, tokens):
    shape = MATRICES["576 x 576 = (24 · 24) x (24 · 24)"]
    apart = (RIGHT,) if kind == LOW_RANK else (LEFT, RIGHT)
    for turn, whole in zip(turning_points(kind, shape, tokens), (DENSE, WHOLE), strict=True):
        for rank in {1, (turn or 577) - 1, *([turn] if turn else ())} - {0}:
            now = costs(kind, shape, rank, tokens)
            assert (now[whole].flop <= min(now[o].flop for o in apart)) == (turn is not None and rank >= turn)


def test_more_tokens_make_multiplying_out_worth_it_sooner():
    shape = MATRICES["576 x 576 = (8 · 9 · 8) x (8 · 9 · 8)"]
    turns = [turning_points(MATRIX, shape, tokens)[0] or 999 for tokens in TOKENS]
    assert turns == sorted(turns, reverse=True) and turns[-1] < turns[0]


def test_the_cheapest_order_named_is_the_cheapest():
    ex = contraction_cost()
    for kind, tokens, rank in itertools.product(STORAGES, (1, 512), (1, 16, 128)):
        result = ex.set(kind=kind, tokens=tokens, rank=rank).result
        flops = {order: result["now"][order].flop for order in (LEFT, RIGHT, DENSE)}
        assert flops[result["cheapest"]] == min(flops.values()) and result["cheapest"] in result["says"]


# morphemes
def test_the_strip_shows_every_morpheme_with_its_row_of_the_table():
    table = table_of(WORDS)
    boxes = strip(words_in("The teachers read"), cut_up, table, 3)
    assert [(box.morpheme, box.first) for box in boxes] == [
        ("the", True), ("teach", True), ("er", False), ("s", False), ("read", True),
    ]  # fmt: skip
    known = indexed([*WORDS.values()], 3)
    assert all(known.names[box.index] == box.morpheme for box in boxes)


def test_a_morpheme_that_no_word_has_is_new():
    ex = on_some_words().set(text="teacher zebra")
    assert [box.index is None for box in ex.result["boxes"]] == [False, False, True]
    assert "not in the table: zebra" in ex.result["says"]


def test_long_words_end_in_one_joined_morpheme():
    boxes = strip(["abcd"], list, table_of({"abcd": list("abcd")}), 3)
    assert [box.morpheme for box in boxes] == ["a", "b", "cd"] and all(box.index for box in boxes)


def test_words_that_share_a_morpheme_are_named_without_the_word_itself():
    holders, table = words_with(WORDS), table_of(WORDS)
    (teach, er) = shared_by(strip(["teacher"], cut_up, table, 3), holders, {"teacher"})
    assert teach[0].morpheme == "teach" and teach[1:] == (["teach", "teachers"], 0)
    assert er[0].morpheme == "er" and er[1:] == (["reader", "readers", "teachers"], 0)


def test_the_table_takes_what_morphte_learns():
    made = indexed([*WORDS.values()], 3)
    for rank, width in ((1, 512), (7, 512), (3, 576)):
        assert table_numbers(len(made.names), width, 3, rank) == MorphTE.of(made, width, rank).stored.numbers
    result = on_some_words(width=576).set(rank=2).result
    assert result["rows_numbers"] == len(WORDS) * 576
    assert result["table_numbers"] == len(made.names) * 2 * 9
    assert f"{len(WORDS) * 3} indices more" in result["says"]


def test_any_text_can_be_typed():
    ex = on_some_words()
    for text in ("", "   ", "$x_1$ \\frac", "teachers " * 60, "<b>teach</b>", "ünïcödé", "a" * 200):
        assert len(ex.set(text=text).result["says"]) > 20 and "alert" not in ex._numbers.value
    assert ex.set(text="").result["says"].startswith("Type a word")


def test_an_empty_vocabulary_is_refused():
    with pytest.raises(ValueError, match="not empty"):
        morpheme_strip(cut_up, {})
