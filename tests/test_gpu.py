"""The same facts on a CUDA device: `pytest tests -m gpu`."""

import pytest
import torch

from lightlib.calibration import Gram, stream_blocks
from lightlib.decoder import cast
from lightlib.measure import divergence, explain, latency, perplexity, roofline, size, throughput
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from lightlib.sparsity.layouts import encode
from lightlib.sparsity.linear import SparseLinear
from lightlib.sparsity.masks import mask_of
from lightlib.zoo import batches, load_model, load_text
from tests.conftest import random_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def real():
    return load_model(device="cuda", progress=False)


def test_the_real_model_has_the_perplexity_it_has_on_a_cpu(real):
    model, tokenizer = real
    windows = batches(tokenizer, load_text("prose", "test"), n=3, length=512)
    assert perplexity(model, windows) == pytest.approx(26.6292, rel=1e-3)
    light = rtn(model, grid=Int(4, group_size=64), progress=False).model
    assert perplexity(light, windows) == pytest.approx(32.6122, rel=5e-3)
    assert divergence(light, model, windows).mean_kl > 0
    assert next(light.buffers()).is_cuda


def test_the_roofline_of_a_data_centre_gpu_is_far_above_a_cpus():
    roof = roofline("cuda", torch.bfloat16)
    assert roof.copy_gb_per_s > 5 * roofline("cpu").copy_gb_per_s
    assert roof.matmul_gflop_per_s > 1e4 and 0 < roof.dispatch_us < 1000


def test_latency_and_throughput_are_measured_on_the_device(real):
    taken = latency(real[0], prompt=64, new=8)
    assert taken.device == torch.cuda.get_device_name() and taken.peak_bytes > size(real[0]).resident_bytes
    served = throughput(real[0], (1, 8), prompt=16, new=4).runs
    assert served[1].tokens_per_s > 2 * served[0].tokens_per_s


def test_explain_names_the_packed_matmul_that_runs_in_bfloat16_and_why_none_does_in_float32(real):
    light = rtn(real[0], grid=Int(4, group_size=64), progress=False).model
    assert "speed is simulated in 210 of 210 packed layers" in explain(light, 16, 3).sentence
    told = explain(cast(light, torch.bfloat16), 16, 3)
    assert "aten::_weight_int4pack_mm multiplies the packed weights of all 210 layers, at" in told.sentence


def test_one_block_at_a_time_is_moved_to_the_device(calib):
    model = random_model("gemma2")
    grams = [block.collect(Gram) for block in stream_blocks(model, calib, progress=False)]
    moved = [block.collect(Gram) for block in stream_blocks(model, calib, device="cuda", progress=False)]
    assert not any(weight.is_cuda for weight in model.parameters())
    for here, there in zip(grams, moved, strict=True):
        for name, gram in here.items():
            torch.testing.assert_close(there[name].value.cpu(), gram.value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_a_2_to_4_layer_is_multiplied_by_sparse_tensor_cores(dtype, tokens):
    torch.manual_seed(0)
    W, bias = torch.randn(96, 128, device="cuda").to(dtype), torch.randn(96, device="cuda").to(dtype)
    layer = SparseLinear(encode(W, mask_of(W.float().abs(), "2:4"), "2:4"), bias)
    x = torch.randn(2, tokens, 128, device="cuda").to(dtype)
    expected = x @ layer.dense(dtype).T + bias
    torch.testing.assert_close(layer(x), expected, rtol=2e-2, atol=0.1)
    assert layer.places is not None  # that path was taken
    assert layer.fast_path(dtype, x.device)[0]
