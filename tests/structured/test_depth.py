"""Depth pruning: what is left is the model that was built without the blocks."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightlib import load, save
from lightlib.cost import size
from lightlib.decoder import find_blocks, linear_shapes, roles
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from lightlib.structured import depth
from lightlib.structured.angular import block_importance, stream_angles
from lightlib.structured.depth import drop_blocks, keep_blocks, least_turning
from lightlib.units import keep_units
from tests.conftest import CONFIGS, random_model


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def built(family, blocks, kinds=None, **changes):
    """A random model of a family with so many blocks; kinds of attention by turns where there are some."""
    config = CONFIGS[family]()
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        config.layer_types = kinds or [config.layer_types[i % 2] for i in range(blocks)]
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data += 0.1 * torch.randn_like(weight)
    return model


@pytest.fixture
def deep(family):
    """A model of each family with four blocks."""
    return built(family, 4)


@torch.no_grad()
def make_identity(model, *indices):
    """These blocks add nothing to the stream."""
    names = roles(model)
    for i in indices:
        block = list(find_blocks(model).values())[i]
        parts = [block.get_submodule(name) for name in (names.attention_out, names.mlp_out)]
        # where the branches end in a norm with a bias, the norm would add it
        for part in parts:
            part.weight.zero_()
            if part.bias is not None:
                part.bias.zero_()
    return model


def layer_numbers(model):
    return [
        {part.layer_idx for part in block.modules() if hasattr(part, "layer_idx")}
        for block in find_blocks(model).values()
    ]


def test_the_angles_of_successive_places_are_the_blocks_importance(model, calib):
    angles = stream_angles(model, calib, progress=False)
    importance = block_importance(model, calib, progress=False)
    assert angles.shape == (3, 3) and torch.equal(angles, angles.mT)
    assert angles.diagonal(1).tolist() == pytest.approx(list(importance.values()), rel=1e-4)
    one = [ids[:, -1:] for ids in calib]  # a window of one token is its own last
    last = stream_angles(model, one, tokens="last", progress=False)
    assert torch.equal(last, stream_angles(model, one, progress=False))
    assert not torch.allclose(stream_angles(model, calib, tokens="last", progress=False), angles)


def test_a_run_starts_where_the_stream_turns_least_and_single_blocks_are_taken_each_by_itself():
    angles = torch.ones(6, 6)
    angles.diagonal(1)[:] = torch.tensor([0.1, 0.5, 0.4, 0.5, 0.2])
    angles.diagonal(2)[:] = torch.tensor([0.8, 0.6, 0.3, 0.7])
    assert least_turning(angles, 2, "single") == [0, 4]
    assert least_turning(angles, 2, "run") == [2, 3]
    assert least_turning(angles, 1, "run") == [0] == least_turning(angles, 1, "single")
    assert least_turning(angles, 0, "run") == [] == least_turning(angles, 0, "single")


@pytest.mark.parametrize("choose", ["run", "single"])
def test_blocks_that_are_identities_go_and_nothing_changes(deep, calib, choose):
    make_identity(deep, 1, 2)
    light, _ = drop_blocks(deep, calib, count=2, choose=choose, progress=False)
    assert len(find_blocks(light)) == 2
    torch.testing.assert_close(logits(light, calib[0]), logits(deep, calib[0]))


@pytest.mark.parametrize("kept", [(0, 3), (1, 2), (0, 2), (1, 3)])
def test_what_is_left_is_the_model_that_was_built_without_the_blocks(family, calib, kept):
    deep = built(family, 4)
    kinds = getattr(deep.config, "layer_types", None)
    plain = built(family, 2, kinds and [kinds[i] for i in kept])
    light = keep_blocks(deep, kept)
    plain.load_state_dict(light.state_dict())
    assert torch.equal(logits(light, calib[0]), logits(plain, calib[0]))
    assert light.config.to_dict() == plain.config.to_dict()
    assert {n for n, _ in light.named_buffers()} == {n for n, _ in plain.named_buffers()}
    assert layer_numbers(light) == layer_numbers(plain) == [{0}, {1}]


@pytest.mark.parametrize("kept", [(0, 3), (1, 3)])
def test_it_generates_with_its_cache_what_it_generates_without(deep, calib, kept):
    light = keep_blocks(deep, kept)
    ids, knobs = calib[0][:1, :12], dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(light.generate(ids, **knobs), light.generate(ids, use_cache=False, **knobs))


def test_plain_transformers_loads_what_is_saved(deep, calib, tmp_path):
    light, _ = drop_blocks(deep, calib, count=2, progress=False)
    folder = save(light, tmp_path / "light")
    for again in (AutoModelForCausalLM.from_pretrained(folder), load(folder)):
        assert len(find_blocks(again)) == 2 == again.config.num_hidden_layers
        assert torch.equal(logits(again, calib[0]), logits(light, calib[0]))


def test_what_is_left_can_be_rounded_and_what_was_rounded_can_lose_blocks(deep, calib, tmp_path):
    first = rtn(keep_blocks(copy.deepcopy(deep), (1, 3)), None, grid=Int(8), progress=False).model
    second = keep_blocks(rtn(deep, None, grid=Int(8), progress=False).model, (1, 3))
    for light, name in ((first, "first"), (second, "second")):
        again = load(save(light, tmp_path / name))
        assert torch.equal(logits(again, calib[0]), logits(first, calib[0]))
    packed = rtn(deep, None, grid=Int(8), progress=False).model
    _, report = drop_blocks(packed, calib, count=1, progress=False)
    assert all(0 < row.bits_before < 32 * row.shape[0] * row.shape[1] for row in report)


def test_the_report_names_each_layer_that_went_and_the_callers_model_keeps_them(deep, calib):
    before, expected = copy.deepcopy(deep.state_dict()), logits(deep, calib[0])
    parts, config = {n: id(part) for n, part in deep.named_modules()}, deep.config.to_dict()
    light, report = drop_blocks(deep, calib, count=1, progress=False)
    name = min(block_importance(deep, calib, progress=False).items(), key=lambda each: each[1])[0]
    shapes = linear_shapes(deep.get_submodule(name))
    assert {row.name: row.shape for row in report} == {f"{name}.{n}": shape for n, shape in shapes.items()}
    assert all((row.bits_after, row.error) == (0, 1.0) for row in report)
    assert [row.bits_before for row in report] == [32 * a * b for a, b in shapes.values()]
    assert all(torch.equal(t, before[n]) for n, t in deep.state_dict().items())
    assert torch.equal(logits(deep, calib[0]), expected) and deep.config.to_dict() == config
    assert {n: id(part) for n, part in deep.named_modules()} == parts
    block = sum(p.numel() for p in find_blocks(deep)[name].parameters())
    assert size(light).parameters == size(deep).parameters - block


@pytest.mark.parametrize("broken", ["left_over", "put"])
def test_broken_off_in_the_middle_it_leaves_the_callers_model_as_it_was(deep, calib, monkeypatch, broken):
    expected, config = logits(deep, calib[0]), deep.config.to_dict()
    parts, numbers = {n: id(part) for n, part in deep.named_modules()}, layer_numbers(deep)
    original, calls = getattr(depth, broken), []

    def interrupted(*args):
        found = original(*args)
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(depth, broken, interrupted)
    with pytest.raises(KeyboardInterrupt):
        drop_blocks(deep, calib, count=3, progress=False, inplace=True)
    assert deep.config.to_dict() == config and layer_numbers(deep) == numbers
    assert {n: id(part) for n, part in deep.named_modules()} == parts
    assert torch.equal(logits(deep, calib[0]), expected)


def test_inplace_changes_the_callers_model_and_none_changes_nothing(deep, calib):
    expected = logits(deep, calib[0])
    for settings in (dict(count=0), dict(fraction=0.0), dict(fraction=0.1)):
        light, report = drop_blocks(deep, calib, progress=False, inplace=True, **settings)
        assert light is deep and len(report) == 0 and len(find_blocks(deep)) == 4
        assert torch.equal(logits(deep, calib[0]), expected)
    drop_blocks(deep, calib, fraction=0.9, progress=False, inplace=True)
    assert len(find_blocks(deep)) == 1, "one block stays"


def test_a_budget_is_met_by_the_fewest_blocks(calib, monkeypatch):
    deep = built("llama", 4)
    block = sum(p.numel() for p in deep.model.layers[0].parameters()) * 4
    whole = size(deep).stored_bytes
    for bytes_left, blocks in ((whole, 4), (whole - 1, 3), (whole - block, 3), (whole - 2 * block - 1, 1)):
        light, _ = drop_blocks(deep, calib, budget_bytes=bytes_left, progress=False)
        assert len(find_blocks(light)) == blocks
    monkeypatch.setattr(depth, "prompt_ms", lambda models, _: [1.0 + len(find_blocks(*models))])
    light, _ = drop_blocks(deep, calib, budget_ms=3.5, budget_tokens=8, progress=False)
    assert len(find_blocks(light)) == 2
    with pytest.raises(ValueError, match=r"a budget of 1\.5 ms on this device: one block alone takes 2"):
        drop_blocks(deep, calib, budget_ms=1.5, budget_tokens=8, progress=False)
    assert len(find_blocks(deep)) == 4


def test_a_budget_in_milliseconds_is_measured_on_this_device(calib):
    light, _ = drop_blocks(built("llama", 4), calib, budget_ms=1e6, budget_tokens=8, progress=False)
    assert len(find_blocks(light)) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(count=2), "count=2: the model has 2 blocks and keeps one; give 0 to 1"),
        (dict(count=-1), "count=-1"),
        (dict(fraction=1.0), "fraction=1.0"),
        (dict(choose="best"), "'best': choose one of run, single"),
        (dict(tokens="first"), "'first': choose one of all, last"),
        (dict(count=1, budget_ms=1.0), "count and budget_ms are given"),
        (dict(budget_bytes=1, budget_ms=1.0), "budget_bytes and budget_ms are given"),
        (dict(budget_bytes=10), "a budget of 10 bytes: one block alone takes"),
    ],
)
def test_settings_that_do_not_fit_are_refused(llama, calib, settings, message):
    with pytest.raises(ValueError, match=message):
        drop_blocks(llama, calib, progress=False, **settings)


def test_models_that_no_plain_one_could_be_and_no_batches_are_refused(llama, calib):
    with pytest.raises(ValueError, match="batches"):
        drop_blocks(llama, [])
    with pytest.raises(ValueError, match="a block's number scales its attention"):
        drop_blocks(built("gpt2", 3, scale_attn_by_inverse_layer_idx=True), calib, progress=False)
    keep_units(llama, {next(iter(find_blocks(llama))): {"neurons": torch.arange(8)}}, "some")
    with pytest.raises(ValueError, match="drop blocks first"):
        drop_blocks(llama, calib, progress=False)


def test_a_plain_model_that_was_cut_evenly_may_lose_blocks(llama, calib, tmp_path):
    keep_units(llama, {name: {"neurons": torch.arange(8)} for name in find_blocks(llama)}, "some")
    light, _ = drop_blocks(llama, calib, count=1, progress=False)
    plain = AutoModelForCausalLM.from_pretrained(save(light, tmp_path / "light"))
    assert torch.equal(logits(plain, calib[0]), logits(light, calib[0]))


def test_it_works_in_bfloat16(calib):
    light, _ = drop_blocks(random_model("llama", torch.bfloat16), calib, count=1, progress=False)
    assert light.dtype == torch.bfloat16 and logits(light, calib[0]).isfinite().all()
