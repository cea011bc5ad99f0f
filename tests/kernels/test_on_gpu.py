"""The kernels on a CUDA device: `pytest tests -m gpu`."""

from functools import partial

import pytest
import torch

from lightlib.decoder import cast
from lightlib.kernels import harness, nvrtc
from lightlib.kernels.attach import attach
from lightlib.kernels.sparse_matmul import bitmap, csl, op
from lightlib.kernels.sparse_matmul.launch import bitmap_matmul, csl_matmul
from lightlib.kernels.sparse_matmul.reference import matmul
from lightlib.sparsity.magnitude import magnitude
from tests.conftest import random_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
RUNGS = [*(partial(csl_matmul, rung=f"csl_v{i}") for i in (1, 2, 3, 4)), bitmap_matmul]


@pytest.mark.parametrize("rung", RUNGS, ids=["csl_v1", "csl_v2", "csl_v3", "csl_v4", "bitmap"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n_out", "n_in", "tokens"), harness.ODD)
def test_a_rung_multiplies_right_on_the_device(rung, dtype, n_out, n_in, tokens):
    for sparsity in (0.0, 0.7):
        W = harness.pruned(n_out, n_in, sparsity, dtype, 0, "cuda")
        x = torch.randn(tokens, n_in, device="cuda").to(dtype)
        stored = (bitmap if rung is bitmap_matmul else csl).encode(W)
        y, exact = rung(stored, x, nvrtc.launch), matmul(W, x)
        assert (y.double() - exact).norm() <= harness.TOLERANCE[dtype] * exact.norm()


@pytest.mark.parametrize("layout", ["csl", "bitmap"])
def test_the_operation_is_right_compiled_and_in_a_graph(layout):
    harness.check(layout)
    W = harness.pruned(512, 1024, 0.7, torch.bfloat16, 0, "cuda")
    x = torch.randn(4, 1024, device="cuda", dtype=torch.bfloat16)
    multiply = harness.packed(layout, W)
    expected = multiply(x)
    assert torch.equal(torch.compile(multiply, fullgraph=True)(x), expected)
    taken = harness.timed([lambda: multiply(x)] * 20)
    assert 0 < taken.p10_us <= taken.us <= taken.p90_us
    assert torch.equal(multiply(x), expected)  # the counters are as they were


def test_a_pruned_model_runs_on_the_kernels():
    light = magnitude(cast(random_model("llama"), torch.bfloat16), sparsity=0.7, progress=False).model.cuda()
    ids = torch.randint(0, 96, (2, 8), device="cuda")
    fast = attach(light).model
    layer = fast.model.layers[0].mlp.up_proj
    assert not op.missing() and layer.fast_path(torch.bfloat16, torch.device("cuda"))[0]
    with torch.no_grad():
        torch.testing.assert_close(fast(ids).logits, light(ids).logits, rtol=3e-2, atol=3e-2)
