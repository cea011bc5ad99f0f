"""The kernels on a CUDA device: `pytest tests -m gpu`."""

from functools import partial

import pytest
import torch

from lightlib.decoder import cast
from lightlib.kernels import bench, harness, nvrtc
from lightlib.kernels.attach import attach
from lightlib.kernels.sparse_matmul import op
from lightlib.kernels.sparse_matmul.bench import ODD, pruned
from lightlib.kernels.sparse_matmul.launch import bitmap_matmul, compact_matmul, csl_matmul
from lightlib.kernels.sparse_matmul.layouts import LAYOUTS, encode
from lightlib.kernels.sparse_matmul.reference import matmul
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from lightlib.sparsity.magnitude import magnitude
from tests.conftest import random_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
RUNGS = {f"csl_v{i}": ("csl", partial(csl_matmul, rung=f"csl_v{i}")) for i in (1, 2, 3, 4)}
RUNGS |= {"csl_v5": ("compact", compact_matmul), "bitmap": ("bitmap", bitmap_matmul)}


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n_out", "n_in", "tokens"), ODD)
def test_a_rung_multiplies_right_on_the_device(rung, dtype, n_out, n_in, tokens):
    layout, product = RUNGS[rung]
    for sparsity in (0.0, 0.7):
        W = pruned(n_out, n_in, sparsity, dtype, 0, "cuda")
        x = torch.randn(tokens, n_in, device="cuda").to(dtype)
        y, exact = product(encode(layout, W), x, nvrtc.launch), matmul(W, x)
        assert (y.double() - exact).norm() <= harness.TOLERANCE[dtype] * exact.norm()


def test_every_kernel_is_right_at_odd_sizes():
    assert max(bench.checks().values()) < 2e-2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [2, 4, 130])
def test_the_operation_is_right_compiled_in_a_graph_and_by_triton(layout, tokens, monkeypatch):
    W = pruned(512, 1024, 0.7, torch.bfloat16, 0, "cuda", uneven=True)
    x = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
    multiply = partial(op.multiply, encode(layout, W))
    expected = multiply(x)
    assert torch.equal(torch.compile(multiply, fullgraph=True)(x), expected)
    taken = harness.timed([lambda: multiply(x)] * 20)
    assert 0 < taken.p10_us <= taken.us <= taken.p90_us
    assert torch.equal(multiply(x), expected)  # the counters are as they were
    monkeypatch.setattr(op, "missing", lambda: "another way is tried")
    exact = matmul(W, x)
    assert (multiply(x).double() - exact).norm() <= harness.TOLERANCE[torch.bfloat16] * exact.norm()


@pytest.mark.parametrize("rounded", [False, True])
def test_a_light_model_runs_on_the_kernels(rounded):
    model = cast(random_model("llama"), torch.bfloat16)
    if rounded:
        light = rtn(model, grid=Int(4, 32), progress=False).model.cuda()
    else:
        light = magnitude(model, sparsity=0.7, progress=False).model.cuda()
    ids = torch.randint(0, 96, (2, 8), device="cuda")
    fast = attach(light).model
    layer = fast.model.layers[0].mlp.up_proj
    assert layer.fast_path(torch.bfloat16, torch.device("cuda"))[0].startswith("lightlib::")
    with torch.no_grad():
        torch.testing.assert_close(fast(ids).logits, light(ids).logits, rtol=3e-2, atol=3e-2)
