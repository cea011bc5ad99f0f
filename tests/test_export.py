"""Exports are judged by what other readers make of them: weights bit by bit, logits, perplexity."""

import json
from dataclasses import dataclass, replace

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from lightlib.compact import CompactLinear, compact_layers
from lightlib.decoder import cast, find_blocks, linears
from lightlib.export.compressed_tensors import pack_rows, to_compressed_tensors
from lightlib.export.gguf import to_gguf
from lightlib.export.gguf_blocks import blocks, halves_to_pairs
from lightlib.export.huggingface import to_huggingface
from lightlib.machine import one_thread
from lightlib.quality import perplexity
from lightlib.quantization.grid import Int
from lightlib.quantization.linear import QuantLinear
from lightlib.quantization.rtn import rtn, rtn_weight
from lightlib.zoo import batches, load_model, load_text, quiet
from tests.conftest import random_model

W4 = Int(4, group_size=16)
W4_SYMMETRIC = Int(4, group_size=16, symmetric=True)
FIRST = "model.layers.0.self_attn.q_proj"


def rounded(model, grid):
    return rtn(model, grid=grid, progress=False).model


def quantize(model, grids):
    """The model with the named layers, and no others, on grids of their own."""
    for name, grid in grids.items():
        linear = model.get_submodule(name)
        model.set_submodule(name, QuantLinear(rtn_weight(linear.weight, grid), linear.bias))
    return model


def read(folder, **options):
    """The model that plain transformers reads; every tensor of the file and of the model must be used."""
    with quiet():
        model, left = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(left.values())
    return model.eval()


@torch.no_grad()
def logits(model, ids):
    with quiet():
        return model(ids).logits


@pytest.fixture(autouse=True)
def small_steps():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


@pytest.fixture
def original(tmp_path):
    """The GGUF that the default model was read from."""
    from lightlib.fetch import sources
    from lightlib.zoo import DEFAULT, _gguf

    return _gguf(sources()[DEFAULT], tmp_path, progress=False)


class Strange(CompactLinear):
    def dense(self, dtype=torch.float32):
        return torch.zeros(self.out_features, self.in_features, dtype=dtype)


@dataclass(frozen=True)
class Table(Int):
    """A grid whose points are not evenly spaced."""


class TestDense:
    def test_plain_transformers_computes_equal_logits(self, family, model, calib, tmp_path):
        light = rounded(model, W4)
        again = read(to_huggingface(light, tmp_path / "dense"))
        assert not compact_layers(again)
        assert torch.equal(logits(again, calib[0]), logits(light, calib[0]))

    def test_a_model_without_compact_layers_is_written_as_it_is(self, model, tmp_path):
        again = read(to_huggingface(model, tmp_path / "dense"))
        before, after = model.state_dict(), again.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(t, after[name]) for name, t in before.items())

    def test_the_dtype_stays(self, llama, tmp_path):
        light = cast(rounded(llama, W4), torch.bfloat16)
        weight = read(to_huggingface(light, tmp_path / "dense")).get_submodule(FIRST).weight
        assert torch.equal(weight, light.get_submodule(FIRST).dense(torch.bfloat16))

    def test_it_forgets_that_it_was_read_from_a_quantized_file(self, llama, tmp_path):
        llama.config.quantization_config = {"quant_method": "gguf"}
        folder = to_huggingface(llama, tmp_path / "dense")
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        assert llama.config.quantization_config  # the caller's model keeps it

    def test_layers_pruned_each_by_itself_are_refused(self, llama, tmp_path):
        block = llama.model.layers[1]
        block.mlp.down_proj = torch.nn.Linear(48, 32, bias=False)
        message = r"layers.1.mlp.down_proj is \(32, 48\) \(out, in\), and the config says \(32, 64\)"
        light = quantize(llama, {FIRST: W4})
        for export in (to_huggingface, to_compressed_tensors):
            with pytest.raises(ValueError, match=message):
                export(light, tmp_path / "folder")
        assert not list(tmp_path.iterdir())


class TestCompressedTensors:
    @pytest.mark.parametrize("bits", range(2, 9))
    @pytest.mark.parametrize("n", [32, 24, 7])
    def test_the_packing_is_that_of_the_format_itself(self, bits, n):
        codes = torch.randint(0, 2**bits, (5, n), generator=torch.Generator().manual_seed(bits))
        theirs = pack_to_int32((codes - 2 ** (bits - 1)).to(torch.int8), bits)
        assert torch.equal(pack_rows(codes, bits), theirs)

    @pytest.mark.parametrize(
        "grid", [W4_SYMMETRIC, W4, Int(8, symmetric=True)], ids=["W4", "W4 asymmetric", "W8"]
    )
    def test_plain_transformers_computes_equal_logits(self, family, model, grid, calib, tmp_path):
        light = rounded(model, grid)
        if family == "gpt2":
            with pytest.raises(ValueError, match=r"h.0.attn.c_attn: plain 'gpt2' keeps it in a Conv1D"):
                to_compressed_tensors(light, tmp_path / "packed")
            return
        again = read(to_compressed_tensors(light, tmp_path / "packed"))
        assert torch.equal(logits(again, calib[0]), logits(light, calib[0]))

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("bits", range(2, 9))
    @pytest.mark.parametrize(
        "scope", [dict(group_size=8), dict(group_size=32), {}, dict(per_tensor=True)], ids=str
    )
    def test_every_weight_comes_back_bit_equal(self, llama, bits, symmetric, scope, calib, tmp_path):
        light = rounded(llama, Int(bits, symmetric=symmetric, **scope))
        again = read(to_compressed_tensors(light, tmp_path / "packed"))
        logits(again, calib[1])  # transformers decodes at the first call
        for name, layer in compact_layers(light).items():
            assert torch.equal(again.get_submodule(name).weight, layer.dense())

    def test_the_file_holds_packed_codes(self, llama, tmp_path):
        folder = to_compressed_tensors(rounded(llama, W4_SYMMETRIC), tmp_path / "packed")
        tensors = load_file(folder / "model.safetensors")
        kinds = {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items() if key.startswith(FIRST)}
        assert kinds == {
            f"{FIRST}.weight_packed": (torch.int32, (32, 4)),
            f"{FIRST}.weight_scale": (torch.float16, (32, 2)),
            f"{FIRST}.weight_shape": (torch.int64, (2,)),
        }

    def test_layers_may_differ_in_bits_and_some_stay_dense(self, llama, calib, tmp_path):
        names = [f"{block}.{name}" for block, part in find_blocks(llama).items() for name in linears(part)]
        grids = [W4_SYMMETRIC, Int(8, symmetric=True), Int(3, group_size=8, symmetric=True)]
        light = quantize(llama, {name: grids[i % 3] for i, name in enumerate(names[:-3])})
        folder = to_compressed_tensors(light, tmp_path / "packed")
        written = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert [len(group["targets"]) for group in written["config_groups"].values()] == [4, 4, 3]
        assert written["ignore"] == [*names[-3:], "lm_head"]
        assert torch.equal(logits(read(folder), calib[0]), logits(light, calib[0]))

    @pytest.mark.parametrize(
        ("dtype", "grid", "bound"),
        [
            (torch.float16, W4, 0),
            (torch.float16, W4_SYMMETRIC, 0),
            (torch.bfloat16, W4, 0),
            (torch.bfloat16, W4_SYMMETRIC, 2**-7),  # the reader rounds the scale, and then the weight
        ],
    )
    def test_16_bit_weights_are_equal_or_a_rounding_apart(self, llama, dtype, grid, bound, calib, tmp_path):
        light = cast(rounded(llama, grid), dtype)
        again = read(to_compressed_tensors(light, tmp_path / "packed"))
        logits(again, calib[1])
        want = light.get_submodule(FIRST).dense(dtype)
        assert_close(again.get_submodule(FIRST).weight, want, rtol=bound, atol=0)

    def test_zero_points_beside_another_grid_are_refused(self, llama, tmp_path):
        light = quantize(llama, {FIRST: W4, "model.layers.1.mlp.up_proj": Int(8)})
        with pytest.raises(
            ValueError, match=f"{FIRST}: transformers reads zero points only.* these 2 have 2"
        ):
            to_compressed_tensors(light, tmp_path / "packed")

    def test_what_the_format_cannot_say_is_refused_by_name(self, llama, tmp_path):
        for change, message in {
            lambda w: QuantLinear(
                rtn_weight(w, Int(4, float_zero=True))
            ): r"no float_zero.*Int\(4, group_size=None\)",
            lambda w: QuantLinear(rtn_weight(w, Table(4))): r"Table\(.* are not integer steps",
            lambda w: Strange(32, 32, None): "Strange holds no integer codes",
            lambda w: QuantLinear(
                replace(rtn_weight(w, W4), order=torch.arange(32).flip(0))
            ): "static_groups=True",
        }.items():
            light = random_model("llama")
            light.set_submodule(FIRST, change(llama.get_submodule(FIRST).weight))
            with pytest.raises(ValueError, match=f"{FIRST}: .*{message}.*to_huggingface"):
                to_compressed_tensors(light, tmp_path / "packed")
        with pytest.raises(ValueError, match="no compact layer to pack"):
            to_compressed_tensors(llama, tmp_path / "packed")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("export", [to_huggingface, to_compressed_tensors])
def test_a_full_disk_leaves_nothing_behind(llama, export, tmp_path, monkeypatch):
    light = rounded(llama, W4)

    def full(self, folder, **_):
        (folder / "model.safetensors").write_text("the first bytes")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    (tmp_path / "there").mkdir()
    for name in ("new", "there"):
        with pytest.raises(OSError, match=r"No space left.*nothing was left half-written"):
            export(light, tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def from_gguf(path):
    return read(path.parent, gguf_file=path.name)


def tensors_of(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


class TestGGUF:
    EXACT = (
        Int(8, symmetric=True),
        Int(8, group_size=32, symmetric=True),
        Int(5, symmetric=True),
        Int(4, group_size=32, symmetric=True),
        Int(4, group_size=64, symmetric=True),
        Int(3, per_tensor=True, symmetric=True),
        Int(4, group_size=32, float_zero=True),
        Int(2, group_size=64, float_zero=True),
    )

    @pytest.mark.parametrize("grid", EXACT, ids=str)
    def test_transformers_reads_equal_weights_and_logits(self, tiny, grid, tmp_path):
        model, tokenizer = tiny
        light = rounded(model, grid)
        again = from_gguf(to_gguf(light, tokenizer, tmp_path / "light.gguf"))
        for name, layer in compact_layers(light).items():
            assert torch.equal(again.get_submodule(name).weight, layer.dense())
        ids = tokenizer("To be, or not to be", return_tensors="pt").input_ids
        assert torch.equal(logits(again, ids), logits(light, ids))

    def test_an_integer_zero_point_moves_by_less_than_a_hundredth_of_a_step(self):
        weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) + 0.5
        layer = QuantLinear(rtn_weight(weight, Int(4, group_size=64)))
        kind, data = blocks("layer", layer)
        steps = (torch.from_numpy(gguf.dequantize(data.numpy(), kind)) - layer.dense()).abs()
        steps /= layer.scale.float().repeat_interleave(64, 1)
        assert kind.name == "Q4_1" and 0 < steps.max() < 0.01

    def test_pairs_of_neighbours_are_what_transformers_turns_back(self):
        from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

        weight = torch.arange(24 * 3).view(24, 3)
        back = LlamaTensorProcessor()._reverse_permute_weights(halves_to_pairs(weight, 4).numpy(), 4, 4)
        assert np.array_equal(back, weight.numpy())

    @pytest.mark.parametrize(
        ("config", "more"),
        [
            (LlamaConfig, dict(head_dim=32)),
            (LlamaConfig, dict(tie_word_embeddings=True)),
            (MistralConfig, dict(sliding_window=None)),
            (Qwen2Config, {}),
            (Qwen3Config, dict(head_dim=128)),
        ],
    )
    def test_other_families(self, tiny, config, more, calib, tmp_path):
        shape = dict(vocab_size=2100, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
        heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(**shape, **heads, **more)).eval()
        for weight in model.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
        light = rounded(model, Int(4, group_size=32, symmetric=True))
        path = to_gguf(light, tiny[1], tmp_path / "light.gguf")
        assert ("output.weight" in tensors_of(path)) != light.config.tie_word_embeddings
        assert torch.equal(logits(from_gguf(path), calib[0]), logits(light, calib[0]))

    def test_dense_matrices_keep_their_dtype_and_vectors_are_float32(self, tiny, tmp_path):
        model, tokenizer = tiny
        light = cast(rounded(model, Int(8, symmetric=True)), torch.bfloat16)
        tensors = tensors_of(to_gguf(light, tokenizer, tmp_path / "light.gguf"))
        assert {name: tensor.tensor_type.name for name, tensor in tensors.items() if "blk.1" not in name} == {
            "token_embd.weight": "BF16",
            "output_norm.weight": "F32",
        } | {
            f"blk.{i}.{part}.weight": kind
            for i in (0, 2, 3)
            for part, kind in {
                "attn_norm": "F32", "ffn_norm": "F32", "attn_q": "Q8_0", "attn_k": "Q8_0", "attn_v": "Q8_0",
                "attn_output": "Q8_0", "ffn_gate": "Q8_0", "ffn_up": "Q8_0", "ffn_down": "Q8_0",
            }.items()
        }  # fmt: skip

    def test_the_tokenizer_comes_back(self, tiny, tmp_path):
        model, tokenizer = tiny
        path = to_gguf(model, tokenizer, tmp_path / "dense.gguf")
        with quiet():
            again = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
        text = "Enter HAMLET, aged 30.<|endoftext|>\n\n  «Words, words»"
        assert again(text).input_ids == tokenizer(text).input_ids
        assert again.decode(again(text).input_ids) == text
        assert (again.bos_token, again.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)

    def test_what_a_gguf_cannot_say_is_refused_by_name(self, tiny, tmp_path):
        tokenizer = tiny[1]
        grids = {
            Int(4, group_size=16): "blocks hold 32 inputs, its groups 16; quantize with group_size=32",
            Int(8, group_size=32): r"no zero point; quantize with Int\(8, group_size=32, symmetric=True\)",
        }
        for grid, message in grids.items():
            with pytest.raises(ValueError, match=f"{FIRST}: .*{message}"):
                to_gguf(quantize(random_model("llama"), {FIRST: grid}), tokenizer, tmp_path / "x.gguf")
        models = {
            "gemma": "not 'gemma'",
            "gpt2": "not 'gpt2'",
            "mistral": "sliding_window=8 of this 'mistral'",
        }
        for family, message in models.items():
            with pytest.raises(ValueError, match=f"{message}.*to_huggingface"):
                to_gguf(random_model(family), tokenizer, tmp_path / "x.gguf")
        with pytest.raises(ValueError, match="ids up to 2047, the model 96 embeddings"):
            to_gguf(random_model("llama"), tokenizer, tmp_path / "x.gguf")
        assert not list(tmp_path.iterdir())

    def test_a_tokenizer_of_another_kind_is_refused(self, tiny, tmp_path):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
        bpe = Tokenizer(models.BPE({"a": 0}, []))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        for tokenizer, message in (
            (words, "WordLevel of .* not byte-level BPE"),
            (bpe, r"no name is known .*split \['Punctuation'"),
        ):
            with pytest.raises(ValueError, match=message):
                to_gguf(tiny[0], PreTrainedTokenizerFast(tokenizer_object=tokenizer), tmp_path / "x.gguf")

    def test_a_full_disk_leaves_the_old_file(self, tiny, tmp_path, monkeypatch):
        def full(self):
            raise OSError(28, "No space left on device")

        path = to_gguf(*tiny, tmp_path / "dense.gguf")
        before = path.read_bytes()
        monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", full)
        with pytest.raises(OSError, match=r"No space left.*nothing was left half-written"):
            to_gguf(*tiny, path)
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.model
class TestTheRealModel:
    def test_rounding_to_the_grid_it_came_from_gives_the_file_it_came_from(self, smollm, original, tmp_path):
        model, tokenizer = smollm
        light = rounded(model, Int(4, group_size=32, float_zero=True))
        path = to_gguf(light, tokenizer, tmp_path / "light" / "light.gguf")
        ours, theirs = gguf.GGUFReader(path), gguf.GGUFReader(original)
        tensors = {tensor.name: tensor.data.tobytes() for tensor in ours.tensors}
        assert len(tensors) == len(theirs.tensors)
        differ = [t.name for t in theirs.tensors if t.data.tobytes() != tensors[t.name]]
        assert differ == ["token_embd.weight"]  # 8 bits there; we leave the embedding as it is
        keys = [key for key in theirs.fields if key.startswith(("llama.", "tokenizer."))]
        # without merges of digits, splitting numbers as SmolLM does or as GPT-2 does is the same
        keys.remove("tokenizer.ggml.pre")
        assert all(ours.fields[key].contents() == theirs.fields[key].contents() for key in keys)

    def test_packed_and_read_by_transformers_it_has_our_perplexity(self, smollm, tmp_path):
        model, tokenizer = smollm
        light = rounded(model, Int(4, group_size=64))
        again = read(to_compressed_tensors(light, tmp_path / "packed", tokenizer))
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(tmp_path / "packed")
        windows = batches(tokenizer, load_text("prose", split="test"), n=1, length=128)
        assert torch.equal(logits(again, windows[0]), logits(light, windows[0]))
        assert perplexity(again, windows) == perplexity(light, windows) != perplexity(model, windows)
