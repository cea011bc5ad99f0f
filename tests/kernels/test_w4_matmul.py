"""Codes of 4 and 8 bits as the kernels read them; the kernels in Triton's interpreter, and compiled."""

import importlib.util
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightlib.kernels.w4_matmul import op
from lightlib.kernels.w4_matmul.packed import encode
from lightlib.kernels.w4_matmul.reference import matmul
from lightlib.quantization.grid import Int
from lightlib.quantization.linear import QuantLinear
from tests.kernels.sass import main_loop, opcodes, resources

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
KINDS = {"middle": {"symmetric": True}, "code": {}, "value": {"float_zero": True}}


def quantized(n_out, n_in, group, bits, kind):
    """A layer of random weights, and its weight packed."""
    torch.manual_seed(n_out)
    grid = Int(bits, group, **KINDS[kind])
    layer = QuantLinear(grid.encode(torch.randn(n_out, n_in)))
    weight = layer.quantized()
    zero = None if grid.symmetric else weight.zero
    return layer, encode(weight.codes, weight.scale, zero, bits, float_zero=grid.float_zero)


# layout
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(
    ("n_in", "group"), [(96, 32), (128, 64), (384, 128), (512, 256), (192, 96), (416, None)]
)
def test_a_packed_weight_is_that_of_the_layer_to_the_last_bit(n_in, group, bits, kind):
    for n_out in (1, 7, 64):
        layer, packed = quantized(n_out, n_in, group, bits, kind)
        assert packed.kind_of_zero == kind and packed.bits == (4 if bits <= 4 else 8)
        assert torch.equal(packed.dense(), layer.dense())


def test_one_scale_for_the_whole_weight_serves_every_row():
    weight = Int(4, symmetric=True, per_tensor=True).encode(torch.randn(5, 64))
    packed = encode(weight.codes, weight.scale, bits=4)
    assert packed.scale.shape == (1, 5) and torch.equal(packed.dense(), weight.dense())


def test_a_byte_holds_a_column_and_the_one_half_a_block_further():
    codes = (torch.arange(256) // 16).to(torch.uint8)[None]
    packed = encode(codes, torch.ones(1, 2))
    assert packed.block == 128
    assert packed.codes[0, :64].tolist() == (codes[0, :64] | codes[0, 64:128] << 4).tolist()
    assert packed.codes[0, 64:].tolist() == (codes[0, 128:192] | codes[0, 192:] << 4).tolist()


@pytest.mark.parametrize(
    ("group", "block"), [(32, 32), (64, 64), (96, 32), (128, 128), (192, 64), (384, 128)]
)
def test_a_block_is_the_largest_that_divides_the_group(group, block):
    codes = torch.zeros(2, 2 * group, dtype=torch.uint8)
    assert encode(codes, torch.ones(2, 2)).block == block


@pytest.mark.parametrize(("bits", "kind", "per_weight"), [
    (4, "middle", 4 + 16 / 64), (4, "code", 4 + 24 / 64), (4, "value", 4 + 32 / 64),
    (8, "middle", 8 + 16 / 64), (8, "code", 8 + 24 / 64), (3, "middle", 4 + 16 / 64),
])  # fmt: skip
def test_bits_are_those_of_the_formula(bits, kind, per_weight):
    assert quantized(33, 256, 64, bits, kind)[1].stored_bits() == per_weight * 33 * 256


def test_groups_that_no_kernel_reads_are_refused_with_a_way_out():
    codes = torch.zeros(3, 96, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"mlp\.up: groups of 48 in a weight of 3 x 96.*leave this layer"):
        encode(codes, torch.ones(3, 2), name="mlp.up")
    with pytest.raises(ValueError, match="groups of 40 in a weight of 3 x 40"):
        encode(codes[:, :40], torch.ones(3, 1))
    with pytest.raises(ValueError, match="code 9 does not fit in 3 bits"):
        encode(codes + 9, torch.ones(3, 3), bits=3)


# the operation, on a CPU
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [0, 1, 130])
def test_the_operation_multiplies_right(kind, tokens):
    layer, packed = quantized(9, 192, 64, 4, kind)
    x = torch.randn(tokens, 192)
    torch.testing.assert_close(op.multiply(packed, x), layer(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(op.multiply(packed, x).double(), matmul(packed, x), rtol=1e-5, atol=1e-5)


def test_the_operation_is_one_of_torch_and_its_flops_are_counted():
    packed = quantized(9, 192, 64, 4, "code")[1]
    x = torch.randn(5, 192)
    torch.library.opcheck(op.int_matmul, (packed.codes, packed.scale, packed.zero, x, 4))
    torch.library.opcheck(op.int_matmul, (packed.codes, packed.scale, None, x, 4))
    with FlopCounterMode(display=False) as counter:
        op.multiply(packed, x)
    assert counter.get_total_flops() == 2 * 5 * 192 * 9


def test_inputs_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"x is \(2, 64\); a weight of \(9, 192\) takes \(tokens, 192\)"):
        op.multiply(quantized(9, 192, 64, 4, "code")[1], torch.zeros(2, 64))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device for Triton is here")
def test_why_triton_cannot_run_is_said_once():
    op.missing.cache_clear()
    with pytest.warns(UserWarning, match="codes are unpacked for each product, since Triton cannot run"):
        reason = op.missing()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op.missing() == reason != ""


# the kernels, in Triton's interpreter
def interpreted(script: str) -> None:
    """Run a script that finds NaN in memory which nothing was written to."""
    head = """
import torch
from lightlib.kernels.w4_matmul.packed import encode
from lightlib.kernels.w4_matmul.reference import matmul
from lightlib.kernels.w4_matmul.triton_matmul import int_matmul

torch.use_deterministic_algorithms(True)
torch.manual_seed(0)
assert torch.empty(3).isnan().all()
"""
    flags = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", head + script], env=flags, check=True, timeout=120)


@needs_triton
def test_each_rung_multiplies_right():
    interpreted("""
def check(rung, dtype, n_out, n_in, group, tokens, splits, bits, kind):
    codes = torch.randint(2**bits, (n_out, n_in))
    scale = torch.rand(n_out, n_in // group) + 0.5
    zeros = {"middle": None, "code": torch.randint(2**bits, scale.shape), "value": torch.randn(scale.shape)}
    weight = encode(codes, scale, zeros[kind], bits, float_zero=kind == "value")
    x = torch.randn(tokens, n_in).to(dtype)
    y, exact = int_matmul(weight, x, rung=rung, splits=splits), matmul(weight, x)
    # the interpreter cuts bfloat16 off instead of rounding it
    error = ((y.double() - exact).norm() / exact.norm()).item()
    assert y.dtype == dtype and error < (1e-3 if dtype == torch.float16 else 1e-2), (rung, dtype, kind, error)

for rung in ("v1", "v2"):
    for dtype in (torch.float16, torch.bfloat16):
        for bits in (4, 8):
            check(rung, dtype, 5, 256, 128, 1, 1, bits, "middle")
            check(rung, dtype, 129, 256, 64, 5, 3, bits, "code")
            check(rung, dtype, 33, 192, 32, 17, 3, bits, "value")
            check(rung, dtype, 7, 384, 384, 33, 1, bits, "code")
            check(rung, dtype, 3, 512, 256, 65, 3, bits, "value")
            check(rung, dtype, 2, 288, 96, 1, 20, bits, "middle")
""")


@needs_triton
def test_one_hot_inputs_read_out_every_code_and_every_scale():
    interpreted("""
for dtype in (torch.float16, torch.bfloat16):
    for bits in (4, 8):
        codes = torch.arange(2 * 256).view(2, 256) * 7 % 2**bits
        assert len(codes.unique()) == 2**bits
        one_hot, ones = torch.eye(256).to(dtype), torch.ones(2, 4)
        for zero in (None, torch.zeros(2, 4), torch.full((2, 4), 2.0**bits - 1)):
            middle = 2 ** (bits - 1) if zero is None else zero[0, 0]
            y = int_matmul(encode(codes, ones, zero, bits), one_hot)
            assert torch.equal(y, (codes - middle).T.to(dtype)), (dtype, bits, zero)
        # groups that differ only in scale: each input meets the scale of its group
        scale = 2.0 ** torch.arange(8).view(2, 4)
        y = int_matmul(encode(torch.full((2, 256), 2 ** (bits - 1) + 1), scale, None, bits), one_hot)
        assert torch.equal(y, scale.repeat_interleave(64, 1).T.to(dtype))
""")


@needs_triton
def test_columns_are_split_until_a_gpu_is_full_but_no_part_gets_short():
    from lightlib.kernels.w4_matmul.triton_matmul import options, splits_for

    def splits(n_out, n_in, tokens=1):
        return splits_for(encode(torch.zeros(n_out, n_in), torch.ones(n_out, n_in // 128)), tokens, 132)

    assert splits(256, 1024) == 2  # four blocks each
    assert splits(128, 128 * 400) == 100
    assert splits(128 * 50, 128 * 40) == 8  # three programs for each of 132 multiprocessors
    assert splits(1, 128) == 1
    assert [options(4, n)["BN"] for n in (1, 16, 17, 33, 64, 100)] == [16, 16, 32, 64, 64, 64]


# machine code
# instructions for each weight in the main loop, as counted, for (bits, dtype, arch)
COUNTED = {
    ("v1", 4, "bf16", 80): 11.10, ("v1", 4, "bf16", 90): 9.32,
    ("v2", 4, "fp16", 80): 3.98, ("v2", 4, "fp16", 90): 3.80,
    ("v2", 4, "bf16", 80): 4.90, ("v2", 4, "bf16", 90): 4.29,
    ("v2", 8, "fp16", 80): 4.29, ("v2", 8, "fp16", 90): 4.45,
    ("v2", 8, "bf16", 80): 5.77, ("v2", 8, "bf16", 90): 5.95,
}  # fmt: skip


def compiled(rung, bits, dtype, arch, tokens, zero="middle", block=128):
    """The cubin of a rung for up to so many tokens, and how many weights a lane takes in one step."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightlib.kernels.w4_matmul.triton_matmul import RUNGS, options

    knobs = options(bits, tokens)
    launch = {name: knobs.pop(name) for name in ("num_warps", "num_stages")}
    types = {"codes": "*u8", "scale": "*fp16", "zero": {"code": "*u8", "value": "*fp16"}.get(zero)}
    types |= {"x": f"*{dtype}", "y": f"*{dtype}"}
    types |= dict.fromkeys(("n_out", "tokens", "n_in", "blocks_each"), "i32")
    fixed = {"ZERO": zero, "BITS": bits, "BLOCK": block, "SHARE": 1, "WIDE": False, **knobs}
    fixed |= {"zero": None} if zero == "middle" else {}
    even = [i for i, name in enumerate(types) if name not in ("tokens", "blocks_each", *fixed)]
    source = ASTSource(
        RUNGS[rung], {**types, **dict.fromkeys(fixed, "constexpr")}, constexprs=fixed,
        attrs={(i,): [["tt.divisibility", 16]] for i in even},
    )  # fmt: skip
    made = compile(source, target=GPUTarget("cuda", arch, 32), options=launch)
    assert made.metadata.shared <= 99 * 1024
    return made.asm["cubin"], knobs["BM"] * block / (32 * launch["num_warps"])


@needs_triton
@pytest.mark.parametrize(("rung", "bits", "dtype", "arch"), COUNTED)
def test_a_weight_takes_few_instructions(rung, bits, dtype, arch):
    cubin, weights = compiled(rung, bits, dtype, arch, 16)
    names = opcodes(main_loop(cubin))
    assert len(names) / weights <= 1.1 * COUNTED[rung, bits, dtype, arch]
    assert any(name.startswith("HGMMA" if arch == 90 else "HMMA") for name in names)
    assert any(name.startswith("LDGSTS") for name in names)  # the weight is read ahead, past the registers
    assert resources(cubin)["STACK"] == resources(cubin)["LOCAL"] == 0  # no register is spilled


@needs_triton
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("bits", "tokens", "zero", "block"),
    [(4, 64, "value", 128), (8, 64, "code", 128), (8, 32, "value", 128), (4, 16, "code", 32)],
)
def test_larger_tiles_and_zeros_of_all_kinds_spill_no_register(arch, bits, tokens, zero, block):
    cubin, _ = compiled("v2", bits, "bf16", arch, tokens, zero, block)
    used = resources(cubin)
    assert used["STACK"] == used["LOCAL"] == 0 < used["REG"] < 255
