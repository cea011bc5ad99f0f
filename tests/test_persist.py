import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lightlib
from lightlib import load, save
from lightlib.cost import size
from lightlib.decoder import cast
from lightlib.persist import WEIGHTS
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from tests.conftest import random_model


@pytest.fixture
def saved(llama, tmp_path):
    light = rtn(llama, grid=Int(4, group_size=16), progress=False).model
    return light, save(light, tmp_path / "light")


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_every_tensor_comes_back_bit_equal(saved):
    light, folder = saved
    again = load(folder)
    before, after = light.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[name]) and t.dtype == after[name].dtype for name, t in before.items())
    assert again.config.to_dict() == light.config.to_dict()
    assert not again.training


def test_plain_transformers_refuses_by_name(saved):
    with pytest.raises(ValueError, match="model type `lightlib`"):
        AutoModelForCausalLM.from_pretrained(saved[1])


def test_a_dense_model_is_written_for_plain_transformers(model, calib, tmp_path):
    folder = save(model, tmp_path / "dense")
    for again in (AutoModelForCausalLM.from_pretrained(folder), load(folder)):
        with torch.no_grad():
            assert torch.equal(again(calib[0]).logits, model(calib[0]).logits)


def test_a_tied_head_is_written_once_and_stays_tied(tmp_path):
    light = rtn(random_model("gemma"), grid=Int(4), progress=False).model
    again = load(save(light, tmp_path / "light"))
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    assert size(again) == size(light)


def test_the_file_is_as_large_as_size_says(saved):
    light, folder = saved
    header = 8 + int.from_bytes((folder / WEIGHTS).read_bytes()[:8], "little")
    assert (folder / WEIGHTS).stat().st_size - header == size(light).stored_bytes


def test_missing_left_over_and_misshapen_tensors_are_refused(saved):
    _, folder = saved
    edit_weights(folder, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"1 tensors are missing \['model.norm.weight'\], 0 left over"):
        load(folder)
    edit_weights(folder, lambda t: t.update({"model.norm.weight": torch.ones(32), "stray": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"0 tensors are missing \[\], 1 left over \['stray'\]"):
        load(folder)
    edit_weights(folder, lambda t: (t.pop("stray"), t.update({"model.norm.weight": torch.ones(31)})))
    with pytest.raises(ValueError, match=r"model.norm.weight is \(31,\), the structure says \(32,\)"):
        load(folder)


def test_a_truncated_file_and_a_missing_folder_are_refused(saved, tmp_path):
    _, folder = saved
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load(folder)
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load(tmp_path / "nowhere")


def test_only_what_is_of_lightlib_is_imported(saved):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    next(iter(config["layers"].values()))["class"] = "os:system"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="os:system is not of lightlib"):
        load(folder)


def test_a_full_disk_leaves_nothing_behind(llama, tmp_path, monkeypatch):
    light = rtn(llama, grid=Int(4), progress=False).model

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightlib.persist.save_file", full)
    with pytest.raises(OSError, match=r"No space left.*nothing was left half-written"):
        save(light, tmp_path / "light")
    assert not list(tmp_path.iterdir())


def test_save_again_into_the_same_folder_replaces(saved, llama):
    _, folder = saved
    other = rtn(llama, grid=Int(8), progress=False).model
    save(other, folder)
    assert torch.equal(
        load(folder).model.layers[0].self_attn.q_proj.dense(), other.model.layers[0].self_attn.q_proj.dense()
    )


def test_after_the_matmul_rearranged_the_codes_the_file_is_the_same(calib, tmp_path):
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    light = rtn(AutoModelForCausalLM.from_config(config), grid=Int(4, group_size=32), progress=False).model
    cast(light, torch.bfloat16)
    before = (save(light, tmp_path / "before") / WEIGHTS).read_bytes()
    with torch.no_grad():
        light(calib[0])
    assert light.model.layers[0].mlp.down_proj.layout is not None
    assert (save(light, tmp_path / "after") / WEIGHTS).read_bytes() == before


def test_top_level_names_are_those_of_persist():
    assert (lightlib.save, lightlib.load) == (save, load)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        partial(getattr, lightlib, "nonsense")()
