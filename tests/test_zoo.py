import json
import time

import pytest
import torch

from lightlib import save, zoo
from lightlib.fetch import FetchError, data_file, sources
from lightlib.quality import perplexity
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from lightlib.zoo import batches, fast_dtype, load_model, load_text
from tests.conftest import random_model


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


def test_batches_are_contiguous_windows_from_the_start(tiny):
    tokenizer, text = tiny[1], "To be, or not to be: that is the question. " * 50
    ids = tokenizer(text, add_special_tokens=False).input_ids
    found = batches(tokenizer, text, n=5, length=16, batch_size=2)
    assert [tuple(b.shape) for b in found] == [(2, 16), (2, 16), (1, 16)]
    assert torch.cat(found).flatten().tolist() == ids[: 5 * 16]
    assert len(torch.cat(batches(tokenizer, text, n=None, length=16))) == len(ids) // 16


@pytest.mark.parametrize(
    ("text", "knobs", "words"),
    [
        ("", {}, "the text is empty"),
        (" \n", {}, "the text is empty"),
        ("short", {}, "less than one window of 512"),
        ("word " * 40, {"length": 16, "n": 99}, r"holds \d windows of 16 tokens, not 99; take n=\d"),
        ("word " * 40, {"length": 0}, "length=0"),
        ("word " * 40, {"n": 0}, "n=0"),
        ("word " * 40, {"length": 8, "n": 1, "batch_size": 0}, "batch_size=0"),
    ],
)
def test_batches_that_cannot_be_cut_are_refused(tiny, text, knobs, words):
    with pytest.raises(ValueError, match=words):
        batches(tiny[1], text, **knobs)


@pytest.mark.parametrize("name", ["gpt-nonsense", "./nowhere", "~/nowhere"])
def test_an_unknown_model_is_answered_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"choose 'smollm2-135m', 'tiny', 'mha', a hub id"):
        load_model(name)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no model"):
        load_model(str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="sees no CUDA device here; use device='cpu'"):
        load_model("tiny", device="cuda")


def test_an_encoder_is_refused(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    BertForMaskedLM(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=30)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'bert' is not a decoder-only model"):
        load_model(str(tmp_path))


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    random_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks \['model.norm.weight'\]"):
        load_model(str(tmp_path))


def test_a_saved_light_model_loads_by_its_folder(tiny, tmp_path):
    light = rtn(tiny[0], grid=Int(4, group_size=64), progress=False).model
    again, tokenizer = load_model(str(save(light, tmp_path / "light", tiny[1])))
    ids = tokenizer("MACBETH.\nSo foul and fair a day", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(again(ids).logits, light(ids).logits)


@pytest.mark.alone
def test_tiny_loads_in_two_seconds_and_beats_the_3_gram_model_of_its_card():
    load_model("tiny")
    begin = time.perf_counter()
    model, tokenizer = load_model("tiny")
    seconds = time.perf_counter() - begin
    print(f"load_model('tiny'): {seconds:.2f} s")
    assert seconds < 2 and model.dtype == torch.float32 and not model.training
    assert sum(f.stat().st_size for f in data_file("tiny").iterdir()) <= 8_000_000
    card = json.loads(data_file("tiny/card.json").read_text())
    windows = batches(tokenizer, load_text("plays", "test"), n=None, length=256, batch_size=32)
    found = perplexity(model, windows)
    assert found == pytest.approx(card["perplexity"], rel=1e-3)
    assert found < 0.75 * card["trigram_perplexity"]


def test_mha_has_a_key_head_for_each_query_head_and_the_perplexity_of_its_card():
    model, tokenizer = load_model("mha")
    config, card = model.config, json.loads(data_file("mha/card.json").read_text())
    assert config.num_attention_heads == config.num_key_value_heads == 8
    assert model.dtype == torch.float32 and not model.training
    assert model.num_parameters() == card["parameters"]
    assert sum(f.stat().st_size for f in data_file("mha").iterdir()) <= 4_500_000
    windows = batches(tokenizer, load_text("plays", "test"), n=None, length=256, batch_size=32)
    found = perplexity(model, windows)
    assert found == pytest.approx(card["perplexity"], rel=1e-3)
    assert found < card["trigram_perplexity"]


def test_the_texts_are_what_they_were():
    for name, n_calibration, n_test in (("prose", 141_900, 51_200), ("plays", 4_211_000, 263_000)):
        calibration, test = (load_text(name, split) for split in ("calibration", "test"))
        assert len(calibration) == pytest.approx(n_calibration, rel=0.02)
        assert len(test) == pytest.approx(n_test, rel=0.02)
        assert test[2000:2200] not in calibration
    assert "###" not in load_text("prose", "test")


def test_a_path_is_a_text_too(tmp_path):
    (tmp_path / "one.txt").write_text("a" * 80 + "b" * 20)
    assert load_text(str(tmp_path / "one.txt")) == "a" * 80
    assert load_text(str(tmp_path / "one.txt"), "test") == "b" * 20
    (tmp_path / "test.txt").write_text("c")
    assert load_text(str(tmp_path), "test") == "c"


def test_texts_that_are_not_there_are_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"no text 'proze': choose one of \['plays', 'prose', 'wikitext2'\]"):
        load_text("proze")
    with pytest.raises(ValueError, match="split 'train' is not one of"):
        load_text("prose", "train")
    monkeypatch.setenv("LIGHTLIB_DATA", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(FetchError, match="wikitext2 could not be fetched from the hub"):
        load_text("wikitext2", "test")
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "test.txt").write_text("own words")
    assert load_text("wikitext2", "test") == "own words"


def test_fast_dtype_is_bfloat16_only_with_matrix_units():
    assert fast_dtype("cuda") == torch.bfloat16
    assert fast_dtype("cpu") == (torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32)


class TestTheDequantisedCache:
    @pytest.fixture
    def made(self, monkeypatch, tmp_path):
        """How often the cache was made, with a stand-in for the slow work."""
        times = []

        def dequantise(gguf, folder):
            times.append(gguf)
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(b"weights")
            digest = zoo.sha256(folder / "model.safetensors")
            (folder / "sha256.json").write_text(json.dumps({"model.safetensors": digest}))

        monkeypatch.setenv("LIGHTLIB_HOME", str(tmp_path))
        monkeypatch.setattr(zoo, "_gguf", lambda *_: tmp_path / "x.gguf")
        monkeypatch.setattr(zoo, "_dequantise", dequantise)
        return times

    def cache(self):
        return zoo._dequantised(sources()["smollm2-135m"], False)

    def test_is_made_once(self, made):
        assert self.cache() == self.cache() and len(made) == 1

    @pytest.mark.parametrize("damage", ["changed", "short", "gone", "no hashes"])
    def test_is_made_again_when_damaged(self, made, damage):
        folder = self.cache()
        if damage == "no hashes":
            (folder / "sha256.json").write_text("{")
        elif damage == "gone":
            (folder / "model.safetensors").unlink()
        else:
            (folder / "model.safetensors").write_bytes(b"wEights" if damage == "changed" else b"wei")
        assert (self.cache() / "model.safetensors").read_bytes() == b"weights" and len(made) == 2

    def test_broken_off_leaves_nothing(self, made, monkeypatch, tmp_path):
        def broken(gguf, folder):
            folder.mkdir()
            (folder / "half").write_bytes(b"half")
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(zoo, "_dequantise", broken)
            with pytest.raises(KeyboardInterrupt):
                self.cache()
        assert [p.name for p in (tmp_path / "models").iterdir() if p.is_dir()] == []
        assert self.cache().is_dir()

    def test_a_disk_that_fills_up_is_told(self, made, monkeypatch, tmp_path):
        def full(gguf, folder):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(zoo, "_dequantise", full)
        with pytest.raises(FetchError, match=r"No space left on device.*LIGHTLIB_HOME"):
            self.cache()
        assert [p.name for p in (tmp_path / "models").iterdir() if p.is_dir()] == []


@pytest.mark.model
class TestTheRealModel:
    @pytest.fixture
    def windows(self, smollm):
        return batches(smollm[1], load_text("prose", "test"), n=3, length=512)

    def test_is_the_one_we_know(self, smollm, windows):
        model, tokenizer = smollm
        assert model.num_parameters() == 134_515_008 and model.dtype == torch.float32
        first = tokenizer(load_text("prose", "test"), add_special_tokens=False, verbose=False).input_ids[:4]
        assert tokenizer.decode(first).startswith("Shakespeare, William")
        assert perplexity(model, windows) == pytest.approx(REAL["dense"], rel=1e-3)

    def test_groups_of_32_with_a_real_minimum_are_its_own_grid(self, smollm):
        model = smollm[0]
        weight = model.model.layers[3].mlp.up_proj.weight.detach()
        grid = Int(4, group_size=32, float_zero=True)
        assert (grid.encode(weight).dense() - weight).abs().max() < 1e-6
        assert (Int(4, group_size=64).encode(weight).dense() - weight).abs().max() > 1e-3

    def test_four_bits_in_groups_of_64_cost_what_they_cost(self, smollm, windows, tmp_path):
        light, report = rtn(smollm[0], grid=Int(4, group_size=64), progress=False)
        assert len(report) == 210
        assert perplexity(light, windows) == pytest.approx(REAL["int4"], rel=5e-3)


REAL = {"dense": 26.6292, "int4": 32.6122}  # three windows of 512 tokens of prose, float32, two CPU cores
