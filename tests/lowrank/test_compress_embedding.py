"""A model's embedding in fewer numbers: exact at full rank, as small as counted, and back from a file."""

import copy

import pytest
import torch
from torch.testing import assert_close

from lightlib import load, save
from lightlib.cost import size
from lightlib.decoder import cast
from lightlib.lowrank.compress_embedding import compress_embedding, token_counts
from lightlib.lowrank.embeddings import TTEmbedding
from lightlib.lowrank.fit_table import fit, low_rank_factors, pair_factors, train_cores
from lightlib.lowrank.kets import MorphTE, Word2KetXS
from lightlib.lowrank.lookup import KINDS, LookupHead
from lightlib.lowrank.morphemes import random_codes
from tests.conftest import CONFIGS, VOCABULARY, random_model

D = 32
CODES = random_codes(VOCABULARY, 3, 12)
FAMILIES = [(family, "low_rank") for family in CONFIGS]
EVERY = FAMILIES + [("llama", kind) for kind in KINDS if kind != "low_rank"]
FITS = {"morphte": {"morphemes": CODES}, "word2ket": {"order": 3}}


def compress(model, batches=None, **settings):
    fits = FITS.get(settings.get("kind"), {})
    settings = {"progress": False, "steps": 20, "ratio": 2.0} | fits | settings
    light, (row,) = compress_embedding(model, batches, **settings)
    return light, row


@torch.no_grad()
def logits(model, batches):
    return model(batches[0]).logits


@pytest.mark.parametrize("tied", [True, False])
def test_at_full_rank_every_family_gives_the_logits_it_gave(family, tied, calib):
    model = random_model(family, tied=tied)
    light, row = compress(model, rank=D)
    assert isinstance(light.lm_head, LookupHead) == tied
    assert row.error < 1e-5
    assert_close(logits(light, calib), logits(model, calib), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_every_family_becomes_as_small_as_counted_and_comes_back(kind, tied, family, calib, tmp_path):
    model = random_model(family, tied=tied)
    before = copy.deepcopy(model.state_dict())
    light, row = compress(model, calib, kind=kind, dense_rows=3)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert 0 < row.error < 1 and row.shape == (VOCABULARY, D) and row.bits_before >= 2 * row.bits_after
    own = [buffer.nbytes for buffer in model.get_input_embeddings().buffers()]  # a scale, with Gemma
    gone = size(model).stored_bytes - size(light).stored_bytes - sum(own)
    assert gone * 8 == row.bits_before - row.bits_after
    assert size(light).resident_bytes < size(model).resident_bytes
    assert not any(p.grad is not None or p.grad_fn for p in light.parameters())
    again = load(save(light, tmp_path / "light"))
    assert torch.equal(logits(again, calib), logits(light, calib))
    twin = copy.deepcopy(light)
    assert not tied or twin.lm_head.lookup is twin.get_input_embeddings()


@pytest.mark.parametrize("kind", KINDS)
def test_works_and_comes_back_in_bfloat16(kind, calib, tmp_path):
    model = cast(random_model("gemma", tied=True), torch.bfloat16)
    light, _ = compress(model, kind=kind)
    assert light.dtype == torch.bfloat16 == logits(light, calib).dtype
    assert torch.equal(logits(load(save(light, tmp_path / "light")), calib), logits(light, calib))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_head_multiplies_by_the_table(kind, calib):
    light, _ = compress(random_model("llama", tied=True), calib, kind=kind, dense_rows=4)
    x, head = torch.randn(2, 7, D), light.lm_head
    with torch.no_grad():
        assert_close(head(x), x @ head.lookup.table().T)
        assert_close(head.lookup(calib[0]), head.lookup.table()[calib[0]])


def test_a_head_of_low_rank_takes_fewer_products():
    light, _ = compress(random_model("llama", tied=True), rank=4)
    n_out, n_in = light.lm_head.products
    assert n_out * n_in == 4 * (VOCABULARY + D) < VOCABULARY * D


def test_the_most_frequent_tokens_keep_their_rows(calib):
    model = random_model("gemma", tied=True)
    light, _ = compress(model, calib, rank=1, dense_rows=8)
    frequent = token_counts(calib, VOCABULARY).topk(8).indices
    weight, found = model.get_input_embeddings().weight, light.get_input_embeddings()
    every = torch.arange(1, VOCABULARY)  # the pad's row is zero, whatever is done
    with torch.no_grad():
        assert torch.equal(found.table()[frequent], weight[frequent])
        same = (found(every) == model.get_input_embeddings()(every)).all(1)
    assert set((1 + same.nonzero()).flatten().tolist()) == set(frequent.tolist()) - {0}


def test_low_rank_is_the_truncated_svd():
    table = torch.randn(40, 16)
    codes, basis = low_rank_factors(table, 5, torch.ones(40))
    gone = (table - codes @ basis).norm() ** 2
    assert_close(gone, torch.linalg.svdvals(table.double())[5:].square().sum())


def test_weights_trade_the_error_of_rare_rows_for_that_of_frequent_ones():
    table, weights = torch.randn(40, 16).double(), torch.rand(40).double() ** 4
    errors = {}
    for name, w in (("even", torch.ones(40)), ("weighted", weights)):
        codes, basis = low_rank_factors(table, 5, w)
        errors[name] = (table - codes @ basis).square().sum(1)
    assert (weights * errors["weighted"]).sum() < (weights * errors["even"]).sum()
    # the best of all, by an SVD of the weighted rows
    tail = torch.linalg.svdvals(weights.sqrt()[:, None] * table)[5:].square().sum()
    assert_close((weights * errors["weighted"]).sum(), tail)


def test_word2ketxs_of_order_2_is_fitted_best_by_one_svd():
    source = Word2KetXS(23, 12, 3, generator=torch.Generator().manual_seed(0))
    table = torch.zeros(25, 16)
    table[:23, :12] = source.table().detach()
    found = Word2KetXS(25, 16, 3)
    found.vectors.data = pair_factors(table, 20, 5, 4).float()  # cut rows add to the rank
    assert_close(found.table(), table, rtol=1e-4, atol=1e-5)

    table = torch.randn(25, 16)
    found.vectors.data = pair_factors(table, 3, 5, 4).float()
    least = (table - found.table()).square().sum().item()
    for seed in range(3):
        other = Word2KetXS(25, 16, 3, generator=torch.Generator().manual_seed(seed))
        fit(other, table, torch.ones(25), 200, 0.05, torch.Generator(), progress=False)
        assert least < (table - other.table()).square().sum().item() * (1 + 1e-4)


def test_a_train_of_full_ranks_holds_any_table():
    table, found = torch.randn(23, 12), TTEmbedding(23, 12, 10_000)
    for parameter, core in zip(
        found.cores, train_cores(table, found.rows, found.columns, found.ranks), strict=True
    ):
        assert parameter.shape == core.shape
        parameter.data = core.float()
    assert_close(found.table(), table, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [4096, 16])
def test_adam_finds_a_table_that_an_embedding_of_its_kind_made(rows, monkeypatch):
    monkeypatch.setattr("lightlib.lowrank.fit_table.ROWS_AT_ONCE", rows)
    codes = random_codes(60, 2, 8)
    target = MorphTE.of(codes, 16, 1, generator=torch.Generator().manual_seed(1)).table().detach()
    found = MorphTE.of(codes, 16, 1, generator=torch.Generator().manual_seed(2))
    fit(found, target, torch.ones(60), 600, 0.05, torch.Generator().manual_seed(0), progress=False)
    assert (found.table() - target).norm() < 0.05 * target.norm()


def test_the_same_call_gives_the_same_weights_and_no_draw_is_taken_from_the_callers(llama):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second = (compress(llama, kind="morphte")[0].state_dict() for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(t, second[name]) for name, t in first.items())


def test_frequency_moves_the_fit_of_every_kind_towards_frequent_tokens(calib):
    model = random_model("llama", tied=True)
    weight = model.get_input_embeddings().weight
    batches = [torch.arange(4).repeat(200)[None], *calib]
    for kind in KINDS:
        errors = []
        for weighting in (None, "frequency"):
            light, _ = compress(model, batches, kind=kind, weighting=weighting, steps=40)
            with torch.no_grad():
                errors.append((light.get_input_embeddings().table() - weight)[:4].norm())
        assert errors[1] < errors[0], kind


def test_broken_off_in_the_middle_it_leaves_the_model_as_it_was(calib, monkeypatch):
    model = random_model("gpt2", tied=True)
    before, modules = logits(model, calib), {name: id(part) for name, part in model.named_modules()}

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightlib.lowrank.compress_embedding.report", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(model, inplace=True)
    assert {name: id(part) for name, part in model.named_modules()} == modules
    assert torch.equal(logits(model, calib), before) and model.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "hash"}, "choose one of low_rank"),
        ({"weighting": "tfidf"}, "choose 'frequency'"),
        ({"weighting": "frequency"}, "give some"),
        ({"dense_rows": 3}, "give some"),
        ({"morphemes": CODES}, "no other kind"),
        ({"kind": "morphte", "morphemes": None}, "of_vocabulary"),
        ({"kind": "morphte", "order": 2}, "3 each of 96 words, for order=2"),
        ({"kind": "tt", "ratio": 1e4}, "of rank 1 takes"),
        ({"ratio": 0.0}, "ratio=0"),
        ({"rank": 0}, "rank=0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message, llama):
    with pytest.raises(ValueError, match=message):
        compress(llama, **settings)


def test_an_embedding_is_compressed_once(llama):
    light, _ = compress(llama)
    with pytest.raises(ValueError, match="is a Lookup already"):
        compress(light)
