"""Row-ELL bit by bit; its Triton kernel in Triton's own interpreter, and what it compiles to."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from lightlib.kernels.sparse_matmul import ell
from tests.kernels.test_sparse_matmul import same_bits, weight

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (65, 97), (130, 1000), (2, 66000 // 2)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95, 1.0])
def test_a_weight_comes_back_bit_by_bit(shape, sparsity):
    for dtype in (torch.float16, torch.bfloat16):
        W = weight(shape, sparsity, dtype)
        assert same_bits(ell.encode(W).dense(), W)


def test_odd_values_far_columns_and_an_explicit_mask_are_kept():
    W = torch.zeros(4, 60_000, dtype=torch.float16)
    W[0, [0, 255, 256, 40_000, 59_999]] = torch.tensor([1.0, float("nan"), float("inf"), -2.0, 6e-8]).half()
    W[2, 59_744:] = 1.0
    mask = W != 0
    mask[3, 5] = True
    assert same_bits(ell.encode(W, mask).dense(), W)


def test_a_group_reaches_256_columns_and_no_further():
    near, far = torch.zeros(1, 512, dtype=torch.bfloat16), torch.zeros(1, 512, dtype=torch.bfloat16)
    near[0, [10, 265]] = 1.0
    far[0, [10, 266]] = 1.0
    assert [int((ell.encode(W).first != 0).sum()) for W in (near, far)] == [1, 2]


def test_at_half_zeros_and_equal_rows_a_value_takes_3_and_a_sixteenth_bytes():
    W = torch.randn(64, 4096)
    W = (W * (W.abs() > W.abs().median(1, keepdim=True).values)).bfloat16()
    assert ell.encode(W).stored_bits() / 8 / (W != 0).sum() == pytest.approx(3.0625, rel=2e-3)


def test_values_side_by_side_in_a_lane_are_of_eight_groups():
    W = torch.arange(1, 257).bfloat16()[None]
    packed = ell.encode(W)
    assert packed.values[0, 0, :8].tolist() == W[0, ::32].tolist()  # lane 0: the first value of each group
    assert packed.first.tolist() == [[list(range(0, 256, 32))]]


def test_what_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="16-bit values"):
        ell.encode(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="65536 columns"):
        ell.encode(torch.zeros(1, 65_537).half())


@needs_triton
def test_the_kernel_multiplies_right():
    script = """
import torch
from lightlib.kernels.sparse_matmul.ell import encode
from lightlib.kernels.sparse_matmul.triton_ell import ell_matmul

for dtype in (torch.float16, torch.bfloat16):
    for n_out, n_in, tokens, sparsity in ((5, 8, 1, 0.0), (33, 520, 2, 0.6), (9, 3000, 1, 0.95)):
        W = (torch.randn(n_out, n_in) * (torch.rand(n_out, n_in) >= sparsity)).to(dtype)
        x = torch.randn(tokens, n_in).to(dtype)
        y, exact = ell_matmul(encode(W), x).double(), x.double() @ W.double().T
        # the interpreter cuts bfloat16 off instead of rounding it
        error = ((y - exact).norm() / exact.norm()).item()
        assert error < (1e-3 if dtype == torch.float16 else 1e-2), (dtype, n_out, error)
"""
    interpreted = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", script], env=interpreted, check=True, timeout=120)


@needs_triton
@pytest.mark.parametrize("arch", [80, 90])
def test_the_kernel_reads_16_bytes_at_once(arch):
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightlib.kernels.sparse_matmul.triton_ell import ell_kernel

    tensors = {"values": "*bf16", "columns": "*u8", "first": "*i16", "x": "*bf16", "y": "*bf16"}
    numbers = dict.fromkeys(("n_out", "n_in", "chunks"), "i32")
    fixed = {"TWO": False, "ROWS": 4}
    source = ASTSource(
        ell_kernel, {**tensors, **numbers, **dict.fromkeys(fixed, "constexpr")}, constexprs=fixed,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(5)},
    )  # fmt: skip
    made = compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})
    assert "ld.global.v4.b32" in made.asm["ptx"]
    assert len(made.asm["cubin"]) > 1000
