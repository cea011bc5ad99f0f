"""Attention against float64 in Triton's interpreter, at its limits; what it compiles to; the operations."""

import os
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from math import ceil
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightlib.kernels.flash_attention import op
from lightlib.kernels.flash_attention.reference import attention as exact

needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")
both_types = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
both_kernels = pytest.mark.parametrize("kernel", ["attention", "decode"])
archs = pytest.mark.parametrize("arch", [80, 90])
SIZES = [(1, 1), (5, 17), (33, 33), (17, 70)]  # (T, S)
# relative; the interpreter cuts weights and outputs in bfloat16 off instead of rounding them
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 8e-3}


def inputs(B, H, K, T, S, D, dtype=torch.float32, seed=0):
    """q (B, H, T, D), k and v (B, K, S, D)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, T, D), (B, K, S, D), (B, K, S, D)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def error(y, expected) -> float:
    return ((y.double() - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def run():
    """Calls a kernel's launcher by its name, in a process in which Triton interprets."""
    from lightlib.kernels.flash_attention import triton_decode, triton_forward

    launchers = {"attention": triton_forward.attention, "decode": triton_decode.decode}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:  # read when Triton is imported
            patch.setenv("TRITON_INTERPRET", "1")
            patch.setenv("OMP_NUM_THREADS", "1")
            assert pool.submit(os.getenv, "TRITON_INTERPRET").result() == "1"
        yield lambda kernel, *args, **knobs: pool.submit(launchers[kernel], *args, **knobs).result(120)


# limits
@needs_triton
@both_types
@both_kernels
def test_one_key_gives_its_value_bit_by_bit(run, kernel, dtype):
    q, k, v = inputs(2, 6, 2, 1, 1, 24, dtype)
    assert torch.equal(run(kernel, q, k, v), v.repeat_interleave(3, 1))


@needs_triton
@both_kernels
def test_equal_keys_give_the_mean_of_the_values(run, kernel):
    q, k, v = inputs(1, 2, 2, 1, 70, 16, torch.float16)
    y = run(kernel, q, k[:, :, :1].expand_as(k), v)
    assert error(y, v.double().mean(2, keepdim=True)) < 5e-4


@needs_triton
@both_types
@both_kernels
def test_a_key_that_dominates_gives_its_value_and_large_scores_do_not_overflow(run, kernel, dtype):
    q, k, v = inputs(1, 2, 1, 1, 70, 16, dtype)
    q[:] = 50.0
    k[:] = -50.0
    k[:, :, 41] = 50.0  # a score of 10^4, all others of -10^4
    assert torch.equal(run(kernel, q, k, v), v[:, :, 41:42].expand(1, 2, 1, 16))
    k[:] = 50.0  # all of 10^4
    assert (
        error(run(kernel, q, k, v), v.double().mean(2, keepdim=True).expand(1, 2, 1, 16)) < TOLERANCE[dtype]
    )


@needs_triton
def test_a_query_does_not_see_what_comes_after_it(run):
    q, k, v = inputs(1, 1, 1, 5, 70, 16, torch.float16)
    y = run("attention", q, k, v)
    for t in range(5):
        after = torch.arange(70) > 65 + t
        other = v.masked_fill(after[:, None], 7.0), k.masked_fill(after[:, None], -7.0)
        changed = run("attention", q, other[1], other[0])
        assert torch.equal(changed[:, :, : t + 1], y[:, :, : t + 1])
        assert t == 4 or not torch.equal(changed[:, :, t + 1], y[:, :, t + 1])


@needs_triton
@pytest.mark.parametrize("splits", [2, 3, 20])
def test_keys_in_parts_give_the_same_whole_also_when_parts_are_empty(run, splits):
    q, k, v = inputs(2, 6, 2, 1, 200, 24, torch.float16)
    # weights are rounded to 16 bits beside the largest of their part
    assert error(run("decode", q, k, v, splits=splits), run("decode", q, k, v).double()) < 5e-4
    # equal weights and whole numbers leave nothing to round but the output
    k, v = k[:, :, :1].expand_as(k), (4 * v).round()
    assert torch.equal(run("decode", q, k, v, splits=splits), run("decode", q, k, v))


@needs_triton
@both_types
def test_full_lengths_change_nothing_and_garbage_beyond_a_length_is_not_read(run, dtype):
    q, k, v = inputs(3, 2, 1, 1, 130, 16, dtype)
    full = torch.full((1,), 130, dtype=torch.int32).expand(3)
    assert torch.equal(run("decode", q, k, v, full, splits=2), run("decode", q, k, v, splits=2))
    lengths = torch.tensor([1, 67, 0], dtype=torch.int32)
    for b, n in enumerate(lengths):
        k[b, :, n:] = v[b, :, n:] = float("nan")
    for splits in (1, 3):
        y = run("decode", q, k, v, lengths, splits=splits)
        assert torch.equal(y[0], v[0, :, :1].expand(2, 1, 16))
        assert error(y[1:2], exact(q[1:2], k[1:2, :, :67], v[1:2, :, :67])) < TOLERANCE[dtype]
        assert not y[2].any()


# against float64
@needs_triton
@both_types
@pytest.mark.parametrize(
    ("B", "H", "K", "T", "S", "D"),
    [(1, 1, 1, 1, 17, 16), (2, 4, 2, 5, 17, 24), (1, 3, 1, 33, 70, 40), (1, 2, 2, 17, 17, 1),
     (1, 1, 1, 129, 194, 16), (1, 1, 1, 3, 70, 130)],
)  # fmt: skip
def test_attention_is_right_at_odd_sizes(run, dtype, B, H, K, T, S, D):
    q, k, v = inputs(B, H, K, T, S, D, dtype)
    for causal in (True, False):
        y = run("attention", q, k, v, causal)
        assert y.shape == q.shape and y.dtype == dtype
        assert error(y, exact(q, k, v, causal)) < TOLERANCE[dtype]


@needs_triton
@both_types
@pytest.mark.parametrize(
    ("B", "H", "K", "S", "D", "splits"),
    [(1, 1, 1, 17, 16, 1), (2, 4, 2, 70, 24, 2), (1, 6, 2, 131, 40, 3), (1, 17, 1, 33, 16, 2),
     (1, 1, 1, 70, 130, 2), (1, 1, 1, 1100, 16, 18)],
)  # fmt: skip
def test_decoding_is_right_at_odd_sizes(run, dtype, B, H, K, S, D, splits):
    q, k, v = inputs(B, H, K, 1, S, D, dtype)
    k[:, :, -1] = 1.5 * q[:, :: H // K, 0]  # so the maximum rises in the last part
    assert error(run("decode", q, k, v, splits=splits), exact(q, k, v)) < TOLERANCE[dtype]


@needs_triton
def test_more_queries_than_keys_are_fine_where_each_sees_all(run):
    q, k, v = inputs(1, 2, 1, 33, 17, 16, torch.float16)
    assert error(run("attention", q, k, v, False), exact(q, k, v, False)) < 5e-4


@needs_triton
@both_kernels
def test_strides_and_the_scale_are_those_given(run, kernel):
    q, k, v = inputs(2, 4, 2, 1, 70, 24, torch.float16)
    laid_out = q.transpose(1, 2).contiguous().transpose(1, 2), k.mT.contiguous().mT, v[:1].expand_as(v)
    y = run(kernel, *laid_out, scale=0.5)
    assert error(y, exact(q, k, v[:1].expand_as(v), scale=0.5)) < 5e-4


@needs_triton
def test_the_heads_of_a_token_lie_side_by_side_for_the_next_layer(run):
    y = run("attention", *inputs(1, 4, 2, 5, 5, 16, torch.float16))
    assert y.transpose(1, 2).is_contiguous()


@needs_triton
@pytest.mark.parametrize("processors", [1, 108, 132])
def test_the_parts_fill_a_gpu_and_none_is_empty(processors):
    from lightlib.kernels.flash_attention.triton_decode import splits_for

    assert splits_for(1, 8, 8192, 132) == 32 and splits_for(64, 8, 8192, 132) == 1
    for batch, kv_heads in ((1, 1), (1, 8), (4, 8), (300, 1)):
        for keys in (1, 64, 65, 1000, 8192, 100_000):
            parts = splits_for(batch, kv_heads, keys, processors)
            each = ceil(ceil(keys / parts) / 64) * 64  # as the kernel cuts them
            assert 1 <= parts <= max(1, 2 * processors // (batch * kv_heads))
            assert (parts - 1) * each < keys


@needs_triton
def test_other_types_and_sizes_are_refused():
    from lightlib.kernels.flash_attention.triton_decode import decode
    from lightlib.kernels.flash_attention.triton_forward import attention

    for launcher in (attention, decode):
        with pytest.raises(TypeError, match="float16 or bfloat16 in all three"):
            launcher(*inputs(1, 1, 1, 1, 4, 16))
        with pytest.raises(ValueError, match="beyond 512"):
            launcher(*inputs(1, 1, 1, 1, 4, 600, torch.float16))


# what the compiler makes of them
def built(kernel, arch, D, *, ones=(), causal=True):
    """The kernel for heads of D values as it is launched on this architecture; `ones`: sizes that are 1."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightlib.kernels.flash_attention import triton_decode, triton_forward

    fn, block = {
        "attention": (triton_forward.attention_kernel, triton_forward.blocks(D, wgmma=arch == 90)),
        "decode": (triton_decode.decode_kernel, triton_decode.blocks(D, group=4)),
        "combine": (triton_decode.combine_kernel, {}),
    }[kernel]
    options = {name: block.pop(name) for name in ("num_stages", "num_warps") if name in block}
    fixed = {"D": D, "WIDTH": D, "CAUSAL": causal, "UPCAST": False, **block, **dict.fromkeys(ones, 1)}
    fixed = {name: value for name, value in fixed.items() if name in fn.arg_names}
    kinds = dict.fromkeys(("q", "k", "v", "out"), "*bf16") | dict.fromkeys(
        ("sums", "totals", "peaks"), "*fp32"
    )
    kinds |= {"lengths": "*i32", "scale": "fp32", **dict.fromkeys(fixed, "constexpr")}
    signature = {name: kinds.get(name, "i32") for name in fn.arg_names}
    # pointers and strides are multiples of 16, as they are for whole heads
    even = [i for i, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or name[1:2] == "_"]
    source = ASTSource(fn, signature, constexprs=fixed, attrs={(i,): [["tt.divisibility", 16]] for i in even})
    return compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(made, tmp_path) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of a compiled kernel."""
    import triton

    (tmp_path / "kernel.cubin").write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run(
        [tool, "--dump-resource-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    return {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said)}


@needs_triton
@archs
@both_kernels
@pytest.mark.parametrize("D", [64, 128])
def test_nothing_spills_and_the_tensor_cores_multiply(kernel, arch, D, tmp_path):
    made = built(kernel, arch, D)
    used = resources(made, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    programs = {"attention": 1, "decode": 3}[kernel]  # at once on a multiprocessor
    assert programs * 32 * made.metadata.num_warps * used["REG"] <= 65536
    assert made.metadata.shared <= 99 * 1024  # what any GPU since 2020 has
    wgmma = kernel == "attention" and arch == 90
    assert ("wgmma.mma_async" if wgmma else "mma.sync") in made.asm["ptx"]
    assert "cp.async.cg.shared.global" in made.asm["ptx"]  # 16 bytes at once, while others are multiplied


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "ones", "causal"),
    [("attention", ("T", "S", "group"), True), ("attention", ("S", "group"), False),
     ("decode", ("S", "group"), True), ("combine", ("parts",), True)],
)  # fmt: skip
def test_sizes_of_one_compile_as_the_constants_that_triton_makes_of_them(kernel, ones, causal):
    made = built(kernel, 90, 16, ones=ones, causal=causal)
    assert made.asm["ptx"].count(".entry") == 1 and "st.global" in made.asm["ptx"]


# operations
@pytest.mark.parametrize(("T", "S"), SIZES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("H", "K"), [(2, 2), (6, 2)])
def test_without_a_gpu_attention_is_right(T, S, causal, H, K):
    q, k, v = inputs(2, H, K, T, S, 24)
    torch.testing.assert_close(op.attention(q, k, v, causal), exact(q, k, v, causal).float())
    torch.testing.assert_close(op.attention(q, k, v, causal, 0.3), exact(q, k, v, causal, 0.3).float())


def test_without_a_gpu_decoding_reads_no_garbage_either():
    q, k, v = inputs(3, 6, 2, 1, 20, 24)
    torch.testing.assert_close(op.decode(q, k, v), exact(q, k, v).float())
    lengths = torch.tensor([20, 7, 0], dtype=torch.int32)
    k[1, :, 7:] = v[1, :, 7:] = float("nan")
    y = op.decode(q, k, v, lengths)
    torch.testing.assert_close(y[:1], exact(q[:1], k[:1], v[:1]).float())
    torch.testing.assert_close(y[1:2], exact(q[1:2], k[1:2, :, :7], v[1:2, :, :7]).float())
    assert not y[2].any()


def test_the_last_query_alone_is_decoding():
    q, k, v = inputs(2, 6, 2, 5, 20, 24)
    torch.testing.assert_close(op.decode(q[:, :, 4:], k, v), op.attention(q, k, v)[:, :, 4:])


@both_types
def test_the_operations_are_traced(dtype):
    q, k, v = inputs(2, 6, 2, 5, 20, 24, dtype)
    for args in ((q, k, v), (q, k, v, False, 0.3), (q[:, :, :1], k, v)):
        torch.library.opcheck(torch.ops.lightlib.flash_attention, args)
    for args in ((q[:, :, :1], k, v), (q[:, :, :1], k, v, torch.tensor([20, 3], dtype=torch.int32), 0.3)):
        torch.library.opcheck(torch.ops.lightlib.flash_decode, args)


@pytest.mark.parametrize(("T", "S"), SIZES)
def test_flops_are_those_that_torch_counts_for_its_own(T, S):
    q, k, v = inputs(2, 6, 2, T, S, 24)
    with FlopCounterMode(display=False) as theirs, sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    with FlopCounterMode(display=False) as ours:
        op.attention(q, k, v)
    assert ours.get_total_flops() == theirs.get_total_flops() == 4 * 2 * 6 * T * S * 24
    with FlopCounterMode(display=False) as of_one:
        op.decode(q[:, :, :1], k, v)
    assert of_one.get_total_flops() * T == ours.get_total_flops()


@pytest.mark.parametrize("attention", [op.attention, exact], ids=["operation", "reference"])
def test_shapes_without_attention_are_refused(attention):
    with pytest.raises(ValueError, match=r"\(1, 2, 9, 8\).* 9 queries cannot be the last of 5 positions"):
        attention(*inputs(1, 2, 1, 9, 5, 8))
    with pytest.raises(ValueError, match="3 heads are not a multiple of 2 kv heads"):
        attention(*inputs(1, 3, 2, 1, 5, 8))
    q, k, v = inputs(1, 2, 1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"k and v must|k and v \(B, K, S, D\)"):
        attention(q, k, v[:, :, 1:])
    with pytest.raises(ValueError, match="not positive"):
        attention(q, k, v, True, 0.0)


def test_lengths_that_cannot_be_are_refused():
    q, k, v = inputs(2, 2, 1, 2, 5, 8)
    with pytest.raises(ValueError, match="takes one query, not 2"):
        op.decode(q, k, v)
    with pytest.raises(ValueError, match=r"torch.int64 \(2,\), not int32 \(2,\)"):
        op.decode(q[:, :, :1], k, v, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"torch.int32 \(1,\), not int32 \(2,\)"):
        op.decode(q[:, :, :1], k, v, torch.tensor([1], dtype=torch.int32))
