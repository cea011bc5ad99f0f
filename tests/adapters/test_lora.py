import json
from functools import partial

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from lightlib import load, save
from lightlib.adapters.lora import LoRALinear, add_lora, lora, lora_layers, merge_lora, ranks_by_importance
from lightlib.adapters.peft_files import load_adapter, save_adapter
from lightlib.decoder import cast, find_blocks, linears
from lightlib.quality import perplexity
from lightlib.quantization.grid import Int
from lightlib.quantization.llm_int8 import llm_int8
from lightlib.quantization.rtn import rtn
from lightlib.recipe import compress
from lightlib.sparsity.magnitude import magnitude
from lightlib.training import next_token_loss
from tests.conftest import random_model

PACKED = {
    "codes": partial(rtn, grid=Int(4, group_size=16), progress=False),
    "8-bit inputs": partial(llm_int8, progress=False),
    "sparse": partial(magnitude, sparsity="2:4", progress=False),
}


@torch.no_grad()
def logits(model, calib):
    return model(calib[0]).logits


def move(model, seed=0):
    """Give every update values that change the output."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.B.data = 0.1 * torch.randn(layer.B.shape, generator=generator)
    return model


def adapted(model, **settings):
    add_lora(model, **settings)
    return move(model)


# the layer
def test_with_B_at_zero_no_bit_of_the_output_changes(model, calib):
    before = logits(model, calib)
    names = add_lora(model, rank=4)
    assert len(names) == sum(len(linears(block)) for block in find_blocks(model).values()) > 0
    assert list(lora_layers(model)) == names
    assert torch.equal(logits(model, calib), before)
    merge_lora(model)
    assert torch.equal(logits(model, calib), before) and not lora_layers(model)


@pytest.mark.parametrize("kind", PACKED)
def test_with_B_at_zero_a_packed_model_is_as_it_was(llama, calib, kind):
    light = PACKED[kind](llama, calib).model
    before = logits(light, calib)
    add_lora(light)
    assert torch.equal(logits(light, calib), before)
    assert not torch.equal(logits(move(light), calib), before)


def test_the_layer_multiplies_as_its_formula_says():
    torch.manual_seed(0)
    base, x = nn.Linear(6, 5), torch.randn(2, 3, 6)
    layer = LoRALinear(base, rank=2, alpha=3)
    layer.B.data.normal_()
    assert_close(layer(x), base(x) + 3 / 2 * x @ layer.A.T @ layer.B.T)
    assert_close(layer.update(), 3 / 2 * layer.B @ layer.A)


def test_at_full_rank_it_fits_any_change_of_a_layer():
    torch.manual_seed(0)
    base, x, change = nn.Linear(6, 4), torch.randn(20, 6), torch.randn(4, 6)
    layer = LoRALinear(base, rank=6, alpha=3)
    wanted = x @ change.T
    with torch.no_grad():  # whatever A is, as long as it is invertible
        layer.B.copy_(torch.linalg.lstsq(x @ layer.A.T * layer.alpha / layer.rank, wanted).solution.T)
    assert_close(layer(x), base(x) + wanted, atol=1e-4, rtol=1e-4)
    assert_close(layer.update(), change, atol=1e-4, rtol=1e-4)


def test_A_begins_as_pefts_does_and_always_alike(llama):
    models = [random_model("llama") for _ in range(2)]
    for model in models:
        add_lora(model)
    first, again = (list(lora_layers(model).values()) for model in models)
    assert all(torch.equal(a.A, b.A) for a, b in zip(first, again, strict=True))
    wide = max(first, key=lambda layer: layer.A.shape[1])
    theirs = peft.get_peft_model(llama, peft.LoraConfig(r=8, target_modules=["down_proj"]))
    their_A = next(p for name, p in theirs.named_parameters() if "lora_A" in name)
    assert their_A.shape == wide.A.shape
    bound = wide.A.shape[1] ** -0.5
    for A in (wide.A, their_A):
        assert 0.9 * bound < A.abs().max() <= bound and A.std().item() == pytest.approx(
            bound / 3**0.5, rel=0.1
        )


@pytest.mark.parametrize("kind", PACKED)
def test_gradients_pass_packed_layers_as_they_pass_their_dense_weights(llama, calib, kind):
    light = PACKED[kind](llama, calib).model
    base = find_blocks(light)["model.layers.0"].mlp.down_proj
    layer = LoRALinear(base, rank=2, alpha=4)
    x = torch.randn(3, base.in_features, requires_grad=True)
    layer(x).sum().backward()
    assert_close(x.grad, base.dense().sum(0).expand(3, -1))
    assert torch.equal(layer.A.grad, torch.zeros_like(layer.A)) and layer.B.grad.abs().sum() > 0


# merging
@pytest.mark.parametrize("targets", [None, ("down_proj", "q_proj")])
def test_merged_equals_unmerged(llama, calib, targets):
    names = add_lora(llama, rank=3, alpha=5, targets=targets)
    assert targets is None or {name.rpartition(".")[2] for name in names} == set(targets)
    beside = logits(move(llama), calib)
    assert merge_lora(llama) == names
    assert_close(logits(llama, calib), beside, atol=1e-5, rtol=1e-5)
    assert not hasattr(llama, "structure")


def test_a_packed_base_is_not_merged_and_nothing_else_either(llama, calib):
    light = rtn(llama, grid=Int(4, group_size=16), progress=False).model
    dense = nn.Linear(32, 32, bias=False)
    light.model.layers[0].self_attn.q_proj = dense
    before, beside = dense.weight.clone(), logits(adapted(light), calib)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.k_proj: QuantLinear is packed.*dense\(\)"):
        merge_lora(light)
    assert torch.equal(dense.weight, before) and torch.equal(logits(light, calib), beside)


def test_what_does_not_fit_is_refused_and_named(llama):
    with pytest.raises(ValueError, match=r"layers.0.self_attn.k_proj: rank=17 does not lie from 1 to 16"):
        add_lora(llama, rank=17)
    with pytest.raises(
        ValueError, match=r"no layer is named \['c_attn'\]; the blocks have down_proj, gate_proj"
    ):
        add_lora(llama, targets=("q_proj", "c_attn"))
    with pytest.raises(ValueError, match="no layer is named"):
        add_lora(llama, targets=())
    with pytest.raises(ValueError, match="no LoRA layers to merge"):
        merge_lora(llama)
    with pytest.raises(ValueError, match="no LoRA layers to write"):
        save_adapter(llama, "nowhere")
    assert not lora_layers(llama)
    assert add_lora(llama, targets="q_proj") == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    with pytest.raises(ValueError, match="has LoRA layers already"):
        add_lora(llama, targets="v_proj")


# the method
def test_it_learns_and_only_A_and_B_do(llama, calib):
    weights = {name: p.clone() for name, p in llama.named_parameters()}
    losses = []
    better, report = lora(
        llama, calib[:1], rank=4, steps=20, lr=1e-2, watch=lambda *x: losses.append(x), progress=False
    )
    assert len(report) == 0 and [step for step, _ in losses] == list(range(20))
    with torch.no_grad():
        assert losses[0][1] == pytest.approx(next_token_loss(llama, calib[0]).item())
    assert losses[-1][1] < losses[0][1] - 0.3
    assert perplexity(better, calib[:1]) < perplexity(llama, calib[:1])
    assert all(torch.equal(p, weights[name]) for name, p in llama.named_parameters())
    assert better.state_dict().keys() == llama.state_dict().keys()  # merged: as plain as before
    for name, p in better.named_parameters():
        moved = p - weights[name]
        if "proj" in name:
            assert torch.linalg.matrix_rank(moved, rtol=1e-3) == 4, name
        else:
            assert torch.equal(p, weights[name]), name
        assert p.requires_grad and p.grad is None


def test_while_it_learns_no_other_weight_has_a_gradient(llama, calib):
    seen = []

    def look(step, _):
        wanted = {name for name, p in llama.named_parameters() if p.grad is not None}
        seen.append({name.rpartition(".")[2] for name in wanted})

    lora(llama, calib, steps=2, watch=look, progress=False, inplace=True)
    assert seen == [{"A", "B"}] * 2


@pytest.mark.parametrize("kind", PACKED)
def test_beside_packed_layers_the_updates_stay_and_the_codes_too(llama, calib, kind, tmp_path):
    light = PACKED[kind](llama, calib).model
    before = {name: t.clone() for name, t in light.state_dict().items()}
    better, _ = lora(light, calib, rank=4, steps=10, lr=1e-2, targets=("down_proj",), progress=False)
    assert list(lora_layers(better)) == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert perplexity(better, calib) < perplexity(light, calib)
    after = better.state_dict()
    assert all(
        torch.equal(t, after[n if n in after else n.replace("down_proj.", "down_proj.base.")])
        for n, t in before.items()
    )
    again = load(save(better, tmp_path / "light"))
    assert torch.equal(logits(again, calib), logits(better, calib))
    assert again.state_dict().keys() == after.keys() and again.structure == better.structure


def test_packed_layers_in_bfloat16_are_trained_beside_too(llama, calib):
    light = cast(rtn(llama, grid=Int(8), progress=False).model, torch.bfloat16)
    light(calib[0])  # rearranges the codes for the packed product
    losses = []
    lora(light, calib[1:], steps=6, lr=1e-2, watch=lambda _, x: losses.append(x), progress=False)
    assert losses[-1] < losses[0] - 0.2


def test_it_is_a_step_of_a_recipe_and_goes_on_from_its_checkpoint(llama, calib, tmp_path):
    def interrupt(step, _):
        if step == 2:
            raise KeyboardInterrupt

    learn = partial(lora, steps=6, lr=1e-2, rank=2, progress=False)
    whole = learn(llama, calib).model
    before, keys = [p.clone() for p in llama.parameters()], list(llama.state_dict())
    with pytest.raises(KeyboardInterrupt):
        learn(llama, calib, checkpoint=tmp_path, watch=interrupt, inplace=True)
    assert list(llama.state_dict()) == keys and not hasattr(llama, "structure")
    assert all(torch.equal(p, old) for p, old in zip(llama.parameters(), before, strict=True))
    steps = []
    again, report = compress(
        llama, [partial(learn, checkpoint=tmp_path, watch=lambda step, _: steps.append(step))], calib
    )
    assert steps == [3, 4, 5] and len(report) == 0
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), whole.parameters(), strict=True))
    with pytest.raises(ValueError, match="lora needs batches"):
        lora(llama, [])


# files
@pytest.mark.parametrize("targets", [None, 1])
def test_peft_reads_what_we_write(model, family, calib, tmp_path, targets):
    names = add_lora(model, rank=3, alpha=5)
    if targets:  # one kind of layer
        merge_lora(model)
        names = add_lora(model, rank=3, alpha=5, targets=[names[-1].rpartition(".")[2]])
    move(model)
    folder = save_adapter(model, tmp_path / "adapter", "a/base")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 3 and config["lora_alpha"] == 5 and config["base_model_name_or_path"] == "a/base"
    assert config["fan_in_fan_out"] == (family == "gpt2")
    theirs = peft.PeftModel.from_pretrained(random_model(family), folder)
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == len(names)
    assert_close(logits(theirs, calib), logits(model, calib), atol=1e-5, rtol=1e-5)
    ours = random_model(family)
    assert load_adapter(ours, folder) == names
    assert torch.equal(logits(ours, calib), logits(model, calib))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_we_read_what_peft_writes(model, family, calib, tmp_path, rslora):
    kinds = {"gpt2": ["c_attn", "c_proj", "c_fc"], "llama": ["q_proj", "v_proj"]}
    config = peft.LoraConfig(
        r=20,
        lora_alpha=7,
        lora_dropout=0.1,
        use_rslora=rslora,
        target_modules=kinds.get(family, "all-linear"),
        fan_in_fan_out=family == "gpt2",
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(random_model(family), config).eval()
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            p.data = 0.1 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    assert_close(logits(model, calib), logits(theirs, calib), atol=1e-5, rtol=1e-5)
    plain = logits(random_model(family), calib)
    assert not torch.allclose(logits(model, calib), plain, atol=1e-3)
    merge_lora(model)
    assert_close(logits(model, calib), logits(theirs, calib), atol=1e-5, rtol=1e-5)


def test_each_block_may_have_a_rank_of_its_own(llama, calib, tmp_path):
    blocks = list(find_blocks(llama))
    names = add_lora(llama, rank={blocks[0]: 2, blocks[1]: 5}, alpha=6)
    assert {layer.rank for name, layer in lora_layers(llama).items() if name.startswith(blocks[1])} == {5}
    lora_layers(llama)[names[0]].alpha = 3
    folder = save_adapter(move(llama), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(random_model("llama"), folder)
    assert_close(logits(theirs, calib), logits(llama, calib), atol=1e-5, rtol=1e-5)
    ours = random_model("llama")
    assert load_adapter(ours, folder) == names
    assert torch.equal(logits(ours, calib), logits(llama, calib))
    merge_lora(ours)
    assert add_lora(ours, rank={blocks[1]: 2}) == [name for name in names if name.startswith(blocks[1])]
    with pytest.raises(ValueError, match=r"no block model\.layers\.7; the first is model\.layers\.0"):
        add_lora(random_model("llama"), rank={"model.layers.7": 2})


def test_ranks_by_importance_are_in_proportion_and_take_as_many_weights(llama):
    def weights(ranks):
        model = random_model("llama")
        add_lora(model, rank=ranks)
        return sum(p.numel() for layer in lora_layers(model).values() for p in (layer.A, layer.B))

    first, second = find_blocks(llama)
    assert ranks_by_importance(llama, {first: 0.3, second: 0.1}, 8) == {first: 12, second: 4}
    assert ranks_by_importance(llama, {first: 0.2, second: 0.2}, 5) == {first: 5, second: 5}
    assert ranks_by_importance(llama, {first: 1.0, second: 0.0}, 4) == {first: 7, second: 1}
    for importance in ({first: 0.3, second: 0.11}, {first: 0.123, second: 0.456}):
        ranks = ranks_by_importance(llama, importance, 8)
        most = weights(8)
        assert most - weights(1) / 2 < weights(ranks) <= most
    with pytest.raises(ValueError, match="none may be negative, nor all 0"):
        ranks_by_importance(llama, {first: 0.0, second: 0.0}, 4)


def test_names_are_written_whole_where_their_ends_would_mean_other_layers_too(llama, calib, tmp_path):
    add_lora(llama, rank=2, targets=("up_proj",))
    llama.model.layers[1].mlp.up_proj = llama.model.layers[1].mlp.up_proj.base
    folder = save_adapter(move(llama), tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.mlp.up_proj"]
    theirs = peft.PeftModel.from_pretrained(random_model("llama"), folder)
    assert_close(logits(theirs, calib), logits(llama, calib), atol=1e-5, rtol=1e-5)


def test_an_adapter_goes_beside_packed_layers(llama, calib, tmp_path):
    folder = save_adapter(adapted(random_model("llama")), tmp_path)
    light = rtn(llama, grid=Int(8), progress=False).model
    before = logits(light, calib)
    load_adapter(light, folder)
    ours, dense = logits(light, calib), logits(adapted(random_model("llama")), calib)
    assert (ours - dense).norm() < 0.2 * (before - dense).norm()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank_pattern": {"q_proj": 4}}, r"q_proj.lora_A.weight is \(2, 32\), the model wants \(4, 32\)"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"r": 4}, r"q_proj.lora_A.weight is \(2, 32\), the model wants \(4, 32\)"),
    ],
)
def test_other_kinds_of_adapters_are_refused_and_nothing_changes(llama, tmp_path, changes, said):
    folder = save_adapter(adapted(random_model("llama"), rank=2, targets=("q_proj",)), tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=said):
        load_adapter(llama, folder)
    assert not lora_layers(llama)


def test_files_that_do_not_fit_are_refused(llama, tmp_path):
    with pytest.raises(ValueError, match="holds no adapter that can be read"):
        load_adapter(llama, tmp_path)
    folder = save_adapter(adapted(random_model("llama"), rank=2, targets=("q_proj",)), tmp_path)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    first = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({k: t for k, t in tensors.items() if k != f"{first}.lora_B.weight"}, file)
    with pytest.raises(ValueError, match=r"q_proj.lora_B.weight is None, the model wants \(32, 2\)"):
        load_adapter(llama, folder)
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 32)}, file)
    with pytest.raises(ValueError, match=r"lm_head.lora_A.weight is \(2, 32\), the model wants None"):
        load_adapter(llama, folder)
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight is \(2, 32\), the model wants None"):
        load_adapter(
            random_model("gpt2"),
            save_adapter(adapted(random_model("llama"), rank=2, targets=("q_proj",)), tmp_path / "b"),
        )
    file.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="holds no adapter that can be read"):
        load_adapter(llama, folder)
    assert not lora_layers(llama)
