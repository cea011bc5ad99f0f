"""What every method of the catalogue promises, on a tiny random model of every family."""

import copy
import inspect

import pytest
import torch

from lightlib import load, save, units
from lightlib.adapters.lora import add_lora
from lightlib.attention import gqa
from lightlib.calibration import AbsMax, Gram, Samples, SquaredNorm, starting_at, stream_blocks
from lightlib.catalog import METHODS
from lightlib.compact import CompactLinear, compact_layers
from lightlib.cost import size
from lightlib.decoder import cast, find_blocks, linears, roles, use_linear_everywhere
from lightlib.low_rank import COMPOSITE
from lightlib.lowrank import compress_embedding
from lightlib.structured import depth
from tests.conftest import inputs_of

SETTINGS = [
    pytest.param(method, {knob: value}, id=f"{method.name}-{knob}={value}")
    for method in METHODS
    for knob, values in method.knobs.items()
    for value in values
]


def run(method, model, calib, **settings):
    fits = {"grid": method.knobs["grid"][0]} if "grid" in method.knobs else {}
    return method.function(model, calib, progress=False, **(fits | settings))


def refused(method, model, calib, **settings) -> bool:
    """Whether the method cannot be applied to this family, and says so by name."""
    family = model.config.model_type
    if family in method.refuses:
        with pytest.raises(ValueError, match=f"^{family!r}: .*; take"):
            run(method, model, calib, **settings)
    return family in method.refuses


def test_unchanged_stream_equals_the_dense_forward_exactly(model, calib):
    blocks, entered = list(stream_blocks(model, calib, progress=False)), []
    norm = model.get_submodule(roles(model).final_norm)
    hook = norm.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with torch.no_grad():
        for ids in calib:
            model(ids)
    hook.remove()
    assert len(blocks) == len(find_blocks(model)) == 2
    assert all(torch.equal(a, b.view_as(a)) for a, b in zip(blocks[-1].run(), entered, strict=True))


def test_what_changes_in_one_block_feeds_the_next(llama, calib):
    walk = stream_blocks(llama, calib, progress=False)
    first = next(walk)
    with torch.no_grad():
        first.module.mlp.down_proj.weight.zero_()
    second = next(walk)
    assert all(torch.equal(a, b) for a, b in zip(first.run(), second.inputs, strict=True))


def test_a_model_that_starts_at_a_block_gives_the_logits_it_gives_from_its_beginning(model, calib):
    with torch.no_grad():
        logits = [model(ids).logits for ids in calib]
        for block in stream_blocks(model, calib, progress=False):
            with starting_at(model, block):
                for _ in range(2):
                    assert all(torch.equal(model(i).logits, y) for i, y in zip(calib, logits, strict=True))
        assert torch.equal(model(calib[0]).logits, logits[0])


def test_what_is_settled_is_not_run_again(llama, calib):
    block = next(stream_blocks(llama, calib, progress=False))
    before = block.run()
    block.settle(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
    assert len(block.settled) == 3
    block.collect(Gram, of=("self_attn.o_proj",))
    block.settle(("self_attn.o_proj",))
    assert list(block.settled) == ["self_attn"], "with all its linears settled, the attention is one part"
    assert all(torch.equal(a, b) for a, b in zip(block.run(), before, strict=True))
    llama.model.layers[0].self_attn.o_proj.weight.data.zero_()  # nothing asks it again
    assert all(torch.equal(a, b) for a, b in zip(block.run(), before, strict=True))
    assert "forward" not in vars(block.module.self_attn)


def test_beyond_its_room_a_settled_part_is_run_again(llama, calib):
    block = next(stream_blocks(llama, calib, progress=False))
    before, block.room = block.run(), 2 * 24 * 32 * 4  # bytes: room for the first batch alone
    block.settle(("self_attn.q_proj",))
    assert all(torch.equal(a, b) for a, b in zip(block.run(), before, strict=True))
    assert len(block.settled["self_attn.q_proj"]) == 1
    assert all(torch.equal(a, b) for a, b in zip(block.run(), before, strict=True))


def test_a_collection_ends_at_the_last_input_asked_for(llama, calib):
    block = next(stream_blocks(llama, calib, progress=False))
    runs = []
    hook = block.module.self_attn.q_proj.register_forward_hook(lambda *_: runs.append(1))
    found = block.collect(Gram, of=("self_attn.q_proj", "self_attn.k_proj"))
    hook.remove()
    assert not runs and found["self_attn.q_proj"] is found["self_attn.k_proj"]
    assert found["self_attn.q_proj"].count == 2 * 24 + 17


def test_gram_is_the_sum_of_outer_products_of_a_layers_inputs(llama, calib):
    q = llama.model.layers[1].self_attn.q_proj
    X = inputs_of(q, llama, calib)
    block = list(stream_blocks(llama, calib, progress=False))[1]
    gram = block.collect(Gram)["self_attn.q_proj"]
    assert gram.count == 2 * 24 + 17
    torch.testing.assert_close(gram.value, X.T @ X)
    assert not q._forward_pre_hooks


def test_norms_maxima_and_samples_are_those_of_the_inputs(llama, calib):
    X = inputs_of(llama.model.layers[0].mlp.down_proj, llama, calib)
    block = next(stream_blocks(llama, calib, progress=False))

    def collect(statistic):
        return block.collect(statistic, of=("mlp.down_proj",))["mlp.down_proj"].value

    torch.testing.assert_close(collect(SquaredNorm), X.square().sum(0))
    assert torch.equal(collect(AbsMax), X.abs().amax(0))
    assert torch.equal(collect(Samples), X)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
class TestEveryMethod:
    def test_has_the_common_signature(self, method):
        names = inspect.signature(method.function).parameters
        assert list(names)[:2] == ["model", "batches"]
        assert names["inplace"].default is False
        assert all(p.kind is p.KEYWORD_ONLY for n, p in names.items() if n not in ("model", "batches"))
        assert set(method.knobs) <= set(names)

    def test_leaves_the_source_untouched_and_repeats_itself(self, method, model, calib):
        before = copy.deepcopy(model.state_dict())
        settings = {knob: values[0] for knob, values in method.knobs.items()}
        if refused(method, model, calib, **settings):
            return
        first, second = (run(method, model, calib, **settings).model for _ in range(2))
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        with torch.no_grad():
            assert torch.equal(first(calib[0]).logits, second(calib[0]).logits)

    def test_says_what_to_do_with_updates_that_are_not_merged(self, method, llama, calib):
        add_lora(llama, rank=2, targets=("up_proj",))
        settings = {knob: values[0] for knob, values in method.knobs.items()}
        with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj is a LoRALinear; merge it"):
            run(method, llama, calib, **settings)

    def test_inplace_changes_the_callers_model(self, method, llama, calib):
        settings = {knob: values[0] for knob, values in method.knobs.items()}
        light, _ = run(method, llama, calib, inplace=True, **settings)
        assert light is llama
        assert bool(compact_layers(llama)) != method.reshapes

    def test_broken_off_in_the_middle_it_leaves_the_model_as_it_was(self, method, model, calib, monkeypatch):
        before = {name: id(part) for name, part in model.named_modules()}
        with torch.no_grad():
            logits = model(calib[0]).logits
        settings = {knob: values[0] for knob, values in method.knobs.items()}
        if refused(method, model, calib, **settings):
            return
        interrupt_in_block(monkeypatch, 1)
        for inplace in (False, True):
            with pytest.raises(KeyboardInterrupt):
                run(method, model, calib, inplace=inplace, **settings)
            assert {name: id(part) for name, part in model.named_modules()} == before
            with torch.no_grad():
                assert torch.equal(model(calib[0]).logits, logits)

    def test_refuses_what_is_no_decoder(self, method):
        from transformers import BertConfig, BertModel

        bert = BertModel(
            BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=30)
        )
        with pytest.raises(ValueError, match="'bert' is not a decoder"):
            run(method, bert, [torch.zeros(1, 4, dtype=torch.long)])


@pytest.mark.parametrize(("method", "setting"), SETTINGS)
def test_report_rows_are_the_modules_changed_and_size_is_the_sum_of_stored_bits(
    method, setting, model, calib, tmp_path
):
    if refused(method, model, calib, **setting):
        return
    light, report = run(method, model, calib, **setting)
    if method.reshapes:
        return reshaped_rows_are_the_modules_changed(model, light, report, calib, tmp_path)
    changed = compact_layers(light)
    assert sorted(row.name for row in report) == sorted(changed)
    assert len(changed) == sum(len(linears(block)) for block in find_blocks(light).values())
    assert all(row.shape == (changed[row.name].out_features, changed[row.name].in_features) for row in report)
    assert all(0 <= row.error < 1.5 and row.bits_after < row.bits_before for row in report)

    assert not any(t.grad_fn for _, t in tensors(light)), "a graph would keep the dense weights alive"

    rest = {t.data_ptr(): t for n, t in tensors(light) if n.rpartition(".")[0] not in changed}
    bits = sum(part.stored_bits() for part in changed.values())
    assert size(light).stored_bytes * 8 == bits + sum(t.numel() * t.element_size() * 8 for t in rest.values())

    folder = save(light, tmp_path / "light")
    again = load(folder)
    with torch.no_grad():
        assert torch.equal(again(calib[0]).logits, light(calib[0]).logits)


def reshaped_rows_are_the_modules_changed(model, light, report, calib, folder):
    """Every weight that is now another one has a row, with its bits; it round-trips."""
    rows = {row.name: row for row in report}
    turned = use_linear_everywhere(copy.deepcopy(model))  # a method may turn GPT-2's layers, or not
    before = [{name: p.shape for name, p in each.named_parameters()} for each in (model, turned)]
    for name, weight in light.named_parameters():
        owner, _, key = name.rpartition(".")
        whole = owner.rpartition(".")[0]
        if isinstance(light.get_submodule(whole), COMPOSITE):
            part = light.get_submodule(whole)
            assert rows[whole].shape == (part.out_features, part.in_features)
            assert rows[whole].bits_after == part.stored_bits()
        elif key == "weight" and weight.shape not in [shapes.get(name) for shapes in before]:
            assert rows[owner].shape == tuple(weight.shape)
            own = light.get_submodule(owner).parameters(recurse=False)
            assert rows[owner].bits_after == sum(p.numel() * p.element_size() * 8 for p in own)
    assert all(0 <= row.error <= 1 for row in report)
    assert not any(t.grad_fn for _, t in tensors(light))
    again = load(save(light, folder / "light"))
    with torch.no_grad():
        assert torch.equal(again(calib[0]).logits, light(calib[0]).logits)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_works_and_round_trips_in_bfloat16(method, model, calib, tmp_path):
    settings = {knob: values[0] for knob, values in method.knobs.items()}
    if refused(method, model, calib, **settings):
        return
    light, _ = run(method, cast(model, torch.bfloat16), calib, **settings)
    again = load(save(light, tmp_path / "light"))
    assert again.dtype == torch.bfloat16
    with torch.no_grad():
        logits = light(calib[0]).logits
        assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()
        assert torch.equal(again(calib[0]).logits, logits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_on_a_gpu_it_gives_what_it_gives_on_a_cpu(method, model, calib):
    settings = {knob: values[0] for knob, values in method.knobs.items()}
    if refused(method, model, calib, **settings):
        return
    here, _ = run(method, model, calib, **settings)
    there, _ = run(method, model.cuda(), [ids.cuda() for ids in calib], **settings)
    assert all(part.weight.is_cuda for part in linears(there).values() if not isinstance(part, CompactLinear))
    with torch.no_grad():
        torch.testing.assert_close(
            there(calib[0].cuda()).logits.cpu(), here(calib[0]).logits, rtol=1e-2, atol=1e-2
        )


def interrupt_in_block(monkeypatch, index):
    """Ctrl-C while the block of this index is being changed."""
    from lightlib.calibration import Block
    from lightlib.slicing.slicegpt import Cut

    replace, count, cut, cut_units = Block.replace, [], Cut.__call__, units.cut_units
    put = gqa.put

    def interrupted(self, *args, **named):
        count.append(self.name)
        if self.name.endswith(f".{index}"):
            raise KeyboardInterrupt
        return replace(self, *args, **named)

    def interrupted_cut(self, *args):
        if any(f".{index}." in name for name in self.stream[len(self.widths)].readers):
            raise KeyboardInterrupt
        return cut(self, *args)

    def interrupted_put(block, *args):
        if block.name.endswith(f".{index}"):
            raise KeyboardInterrupt
        return put(block, *args)

    def interrupted_units(model, kept):
        for row in cut_units(model, kept):
            if f".{index}." in row[0]:
                raise KeyboardInterrupt
            yield row

    def interrupted_stack(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compress_embedding, "install", interrupted_stack)
    monkeypatch.setattr(gqa, "put", interrupted_put)
    monkeypatch.setattr(units, "cut_units", interrupted_units)
    monkeypatch.setattr(depth, "left_over", interrupted_stack)
    monkeypatch.setattr(Block, "replace", interrupted)
    monkeypatch.setattr(Cut, "__call__", interrupted_cut)


def tensors(model):
    return [*model.named_parameters(), *model.named_buffers()]
