"""Sharing key and value heads: what it must not change, and what it must save."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PhiConfig

from lightlib import load, save
from lightlib.attention.gqa import HOWS, share_heads
from lightlib.attention.merging import align, align_keys, pool
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from lightlib.structured.fisher_masks import fisher_masks
from lightlib.units import unit_counts
from tests.conftest import CONFIGS, MHA, random_model

SHARING = [family for family in CONFIGS if family not in ("opt", "gpt2", "gpt_neox")]
NORMALISED = ("qwen3", "gemma3_text")


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mha_llama(heads: int = 4):
    torch.manual_seed(0)
    config = LlamaConfig(**(MHA | {"num_attention_heads": heads, "num_key_value_heads": heads}))
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def logits(model, calib):
    return model(calib[0]).logits


@torch.no_grad()
def change_heads(model, change):
    """Give each block of a model with separate k and v the heads that `change` makes of its first one:
    change(letter, head (D, C), index)."""
    for block in model.model.layers:
        attention, size = block.self_attn, block.self_attn.head_dim
        for letter, part in (("k", attention.k_proj), ("v", attention.v_proj)):
            heads = part.weight.unflatten(0, (-1, size))
            new = [change(letter, heads[0].clone(), i) for i in range(len(heads))]
            part.weight.copy_(torch.cat(new))
    return model


class TestPooling:
    def test_of_as_many_heads_as_there_are_gives_them_back(self):
        heads = drawn(6, 4, 5)
        assert torch.equal(pool(heads, 6, "mean"), heads) and torch.equal(pool(heads, 6, "first"), heads)

    def test_is_of_neighbours(self):
        heads = torch.arange(6.0)[:, None, None].expand(6, 2, 3)
        assert pool(heads, 2, "mean")[:, 0, 0].tolist() == [1, 4]
        assert pool(heads, 2, "first")[:, 0, 0].tolist() == [0, 3]
        assert pool(heads, 3, "mean")[:, 0, 0].tolist() == [0.5, 2.5, 4.5]

    def test_random_heads_are_spread_as_the_old_ones(self):
        heads = 0.3 * drawn(8, 16, 200)
        new = pool(heads, 2, "random", torch.Generator().manual_seed(1))
        assert new.shape == (2, 16, 200) and new.std() == pytest.approx(0.3, rel=0.03)
        assert not pool(torch.zeros(4, 2, 1), 2, "random").any()


class TestAligning:
    def test_one_head_for_heads_that_span_the_same_space_loses_nothing(self):
        base, turns = drawn(1, 4, 9), drawn(3, 4, 4, seed=1)
        heads, readers = turns @ base, drawn(3, 2, 4, 7, seed=2)
        found = align(heads, readers)
        assert found.heads.shape == (4, 9) and found.readers.shape == readers.shape
        assert_close(found.seen, heads)
        assert_close(found.readers.mT @ found.heads, readers.mT @ heads[:, None])

    def test_of_one_head_what_its_readers_take_is_as_it_was(self):
        heads, readers, gram = drawn(1, 4, 9), drawn(1, 3, 4, 7, seed=1), drawn(9, 9, seed=2)
        found = align(heads, readers, gram @ gram.T)
        assert_close(found.readers.mT @ found.heads, readers.mT @ heads[:, None])

    def test_no_other_shared_head_loses_less(self):
        heads, readers, half = drawn(3, 4, 9), drawn(3, 2, 4, 7, seed=1), drawn(9, 9, seed=2)
        found = align(heads, readers, half @ half.T)

        def lost(shared):
            """What the readers miss of their heads' outputs with the best mixes for `shared` (4, 9)."""
            taken = (readers.mT @ heads[:, None] @ half).flatten(0, 2)  # (3 x 2 x 7, 9)
            kept = taken @ torch.linalg.pinv(shared @ half) @ (shared @ half)
            return (taken - kept).norm().item()

        least = lost(found.heads)
        seen = readers.mT @ heads[:, None] - found.readers.mT @ found.heads
        assert (seen @ half).norm().item() == pytest.approx(least, rel=1e-6), "its own mixes are the best"
        singular = torch.linalg.svdvals((readers.mT @ heads[:, None] @ half).flatten(0, 2))
        assert least == pytest.approx(singular[4:].norm().item(), rel=1e-6), "the bound of Eckart and Young"
        for seed in range(20):
            assert lost(found.heads + 0.05 * drawn(4, 9, seed=seed)) > least
        assert lost(pool(heads, 1, "mean")[0]) > 1.2 * least

    def test_a_head_that_nobody_reads_does_not_count(self):
        heads, readers = drawn(2, 4, 9), drawn(2, 1, 4, 7, seed=1)
        readers[1] = 0
        found = align(heads, readers)
        assert_close(found.readers[0, 0].T @ found.heads, readers[0, 0].T @ heads[0])
        assert not found.readers[1].any() and all(t.isfinite().all() for t in (found.heads, found.seen))

    def test_heads_of_zeros_stay_zeros(self):
        found = align(torch.zeros(2, 4, 9).double(), drawn(2, 1, 4, 7))
        assert not found.heads.any() and found.readers.isfinite().all()

    @pytest.mark.parametrize("turning", [8, 4, 0])
    def test_scores_are_the_same_at_every_distance(self, turning):
        """Keys that differ by a complex number a pair, or by any matrix on channels that do not turn."""
        base, angle, size = (
            drawn(8, 9),
            drawn(3, turning // 2, seed=1),
            1 + drawn(3, turning // 2, seed=2) ** 2,
        )
        keys = base.repeat(3, 1, 1)
        for h in range(3):
            keys[h, :turning] = turned(base[:turning], angle[h], size[h])
        keys[:, turning:] = drawn(3, 8 - turning, 8 - turning, seed=3) @ base[turning:]
        queries = drawn(3, 2, 8, 9, seed=4)
        found = align_keys(keys, queries, turning)
        assert found.heads.shape == (8, 9)
        assert_close(found.seen, keys)
        x, y = drawn(9, seed=5), drawn(9, seed=6)  # the inputs at the query's place and at the key's
        for place in (0.0, 1.0, 7.0):
            rates = place * torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64)[: turning // 2]
            for h in range(3):
                for r in range(2):
                    before = rope(queries[h, r] @ x, turning, rates) @ (keys[h] @ y)
                    after = rope(found.readers[h, r] @ x, turning, rates) @ (found.heads @ y)
                    assert_close(after, before)


def turned(rows, angle, size):
    """Rows (2 n, C), row i with row i + n turned by angle (n) and made `size` (n) times as long."""
    first, second = rows.chunk(2)
    cos, sin = (size * angle.cos())[:, None], (size * angle.sin())[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin])


def rope(vector, turning, rates):
    rows = turned(vector[:turning, None], rates, torch.ones_like(rates))
    return torch.cat([rows[:, 0], vector[turning:]])


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("family", SHARING)
class TestEveryFamilyThatCanShare:
    def test_with_the_heads_it_has_nothing_changes(self, family, how, calib):
        model = random_model(family)
        light, report = share_heads(
            model, calib, kv_heads=model.config.num_key_value_heads, how=how, progress=False
        )
        assert torch.equal(logits(light, calib), logits(model, calib)) and len(report) == 0

    def test_plain_transformers_generates_what_it_generates(self, family, how, calib, tmp_path):
        light = share_heads(random_model(family), calib, kv_heads=1, how=how, progress=False).model
        folder = save(light, tmp_path / "light")
        plain = AutoModelForCausalLM.from_pretrained(folder)
        assert not (folder / "lightlib.safetensors").exists()
        assert plain.config.num_key_value_heads == 1 and type(plain) is type(light)
        prompt = calib[0][:1, :10]
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        expected = light.generate(prompt, **settings)
        for again in (plain.eval(), load(folder)):
            assert torch.equal(again.generate(prompt, **settings), expected)
            assert torch.equal(logits(again, calib), logits(light, calib))

    def test_parameters_and_cache_fall_by_the_heads_that_go(self, family, how, calib):
        model = random_model(family)
        light = share_heads(model, kv_heads=1, how=how, progress=False).model
        config, present = model.config, model.config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        biased = any(name.endswith(("k_proj.bias", "qkv_proj.bias")) for name, _ in model.named_parameters())
        gone = 2 * config.num_hidden_layers * (present - 1) * size * (config.hidden_size + biased)
        assert model.num_parameters() - light.num_parameters() == gone
        held = [cache_bytes(each, calib) for each in (model, light)]
        assert held[0] == present * held[1] > 0


@torch.no_grad()
def cache_bytes(model, calib):
    cache = DynamicCache()
    model(calib[0], past_key_values=cache, use_cache=True)
    return sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))


@pytest.mark.parametrize("how", ["mean", "first", "aligned"])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_heads_that_are_copies_of_each_other_merge_without_loss(kv_heads, how, calib):
    model = change_heads(mha_llama(), lambda letter, head, i: head)
    light = share_heads(model, kv_heads=kv_heads, how=how, progress=False).model
    assert_close(logits(light, calib), logits(model, calib), atol=1e-5, rtol=1e-4)
    if how != "aligned":
        k = light.model.layers[0].self_attn.k_proj.weight
        assert torch.equal(k, model.model.layers[0].self_attn.k_proj.weight[: len(k)])


@pytest.mark.parametrize("with_batches", [False, True])
def test_aligned_undoes_turns_that_mean_and_first_do_not(with_batches, calib):
    """Values times any matrix; pairs of a key's channels turned and stretched."""
    angle, size, mix = drawn(4, 4), 0.5 + drawn(4, 4, seed=1) ** 2, drawn(4, 8, 8, seed=2)

    def change(letter, head, i):
        new = mix[i] @ head.double() if letter == "v" else turned(head.double(), angle[i], size[i])
        return new.float()

    model = change_heads(mha_llama(), change)
    batches = calib if with_batches else None
    light = {
        how: share_heads(model, batches, kv_heads=1, how=how, progress=False).model
        for how in ("mean", "first", "aligned")
    }
    before = logits(model, calib)
    lost = {how: (logits(each, calib) - before).abs().max().item() for how, each in light.items()}
    assert lost["aligned"] < 1e-4 < 1e-2 < min(lost["mean"], lost["first"])


def test_channels_that_do_not_turn_may_be_mixed_at_will(calib):
    torch.manual_seed(0)
    config = PhiConfig(**MHA, partial_rotary_factor=0.5)
    model, mix = AutoModelForCausalLM.from_config(config).eval(), drawn(4, 4, 4, seed=3)

    def change(letter, head, i):
        if letter == "k":
            head[4:] = (mix[i] @ head[4:].double()).float()
        return head

    change_heads(model, change)
    light = share_heads(model, kv_heads=2, how="aligned", progress=False).model
    assert (logits(light, calib) - logits(model, calib)).abs().max() < 1e-4
    mean = share_heads(model, kv_heads=2, progress=False).model
    assert (logits(mean, calib) - logits(model, calib)).abs().max() > 1e-3


@pytest.mark.parametrize("family", SHARING)
def test_aligned_heads_lose_least_in_every_family(family, calib):
    model = random_model(family)
    with_data = share_heads(model, calib, kv_heads=1, how="aligned", progress=False)
    found = [with_data.model] + [
        share_heads(model, kv_heads=1, how=how, progress=False).model for how in ("aligned", "mean", "random")
    ]
    lost = [(logits(light, calib) - logits(model, calib)).norm().item() for light in found]
    assert lost[0] < lost[1] < lost[2] < lost[3]
    notes = {row.name.rpartition(".")[2]: row.notes for row in with_data.reports}
    assert any("a norm follows" in note for note in notes.values()) == (family in NORMALISED)
    assert ("q_proj" in notes) == (family not in (*NORMALISED, "phi3"))


def test_the_error_is_that_of_what_query_heads_read(calib):
    model = random_model("llama")
    light, report = share_heads(model, calib, kv_heads=1, progress=False)
    row = next(r for r in report if r.name == "model.layers.0.self_attn.v_proj")
    before = model.model.layers[0].self_attn.v_proj.weight.double()
    after = light.model.layers[0].self_attn.v_proj.weight.double().repeat(2, 1)
    seen = []
    hook = model.model.layers[0].self_attn.v_proj.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    for ids in calib:
        logits(model, [ids])
    hook.remove()
    x = torch.cat([each.flatten(0, 1) for each in seen]).double()
    assert row.error == pytest.approx(
        ((x @ (before - after).T).norm() / (x @ before.T).norm()).item(), rel=1e-4
    )
    assert row.shape == (8, 32) and row.bits_before == 2 * row.bits_after == 16 * 32 * 32


def test_mean_of_means_is_the_mean_so_groups_may_be_merged_in_steps(calib):
    model = mha_llama(8)
    steps = share_heads(
        share_heads(model, kv_heads=4, progress=False).model, kv_heads=1, progress=False
    ).model
    assert_close(logits(steps, calib), logits(share_heads(model, kv_heads=1, progress=False).model, calib))


def test_a_seed_draws_the_random_heads():
    model = mha_llama()

    def first(seed):
        light = share_heads(model, kv_heads=1, how="random", seed=seed, progress=False).model
        return light.model.layers[1].self_attn.k_proj.weight

    assert torch.equal(first(0), first(0)) and not torch.equal(first(0), first(1))
    assert first(0).std().item() == pytest.approx(
        model.model.layers[1].self_attn.k_proj.weight.std().item(), rel=0.2
    )


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_what_is_shared_can_be_rounded_and_pruned_next(family, calib, tmp_path):
    light = share_heads(random_model(family), kv_heads=1, progress=False).model
    packed = rtn(light, grid=Int(8), progress=False).model
    again = load(save(packed, tmp_path / "packed"))
    assert torch.equal(logits(again, calib), logits(packed, calib))
    pruned = fisher_masks(light, calib, fraction=0.3, kinds=("neurons",), round_to=16, progress=False).model
    again = load(save(pruned, tmp_path / "pruned"))
    assert torch.equal(logits(again, calib), logits(pruned, calib))
    assert all(counts["heads"] == 1 for counts in unit_counts(again).values())


@pytest.mark.parametrize(
    ("kv_heads", "how", "words"),
    [
        (3, "mean", "kv_heads=3 does not divide the model's 4 key-value heads.*one of 1, 2, 4$"),
        (8, "mean", "kv_heads=8 does not divide"),
        (0, "mean", "kv_heads=0 does not divide"),
        (2, "median", "how='median': choose one of 'mean', 'first', 'random', 'aligned'"),
    ],
)
def test_what_does_not_fit_is_refused(kv_heads, how, words):
    with pytest.raises(ValueError, match=words):
        share_heads(mha_llama(), kv_heads=kv_heads, how=how, progress=False)


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox"])
def test_a_family_that_cannot_share_is_refused_even_where_nothing_would_change(family):
    with pytest.raises(ValueError, match=f"'{family}': its attention in transformers has one key"):
        share_heads(random_model(family), kv_heads=4, progress=False)


def test_a_model_that_is_no_plain_one_any_more_is_refused(calib):
    model = random_model("llama")
    model.structure = [["lightlib.units:restructure", {}]]
    with pytest.raises(ValueError, match=r"no plain one any more.*share heads first"):
        share_heads(model, progress=False)
    with pytest.raises(ValueError, match="q_proj is packed"):
        share_heads(rtn(random_model("llama"), grid=Int(8), progress=False).model, progress=False)


def test_training_flags_and_the_callers_config_stay(calib):
    model = mha_llama()
    before = copy.deepcopy(model.config.to_dict())
    for p in model.model.layers[0].parameters():
        p.requires_grad_(False)
    light = share_heads(model, kv_heads=2, how="aligned", progress=False).model
    assert model.config.to_dict() == before and light.config.num_key_value_heads == 2
    flags = {name: p.requires_grad for name, p in light.named_parameters()}
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert math.isfinite(logits(light, calib).norm().item())
