"""The bitmap product and unpacking in Triton: in Triton's own interpreter, and what they compile to."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightlib.kernels.sparse_matmul import bitmap
from tests.kernels.sass import main_loop, opcodes, resources, said
from tests.kernels.test_sparse_matmul import weight

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
TENSORS = {"words": "*i32", "offsets": "*i32"}
SIZES = {"n_out": "i32", "n_in": "i32"}

START = """
import torch
from lightlib.kernels.sparse_matmul import bitmap
from lightlib.kernels.sparse_matmul.layouts import encode
from lightlib.kernels.sparse_matmul.triton_bitmap import bitmap_matmul, room
from lightlib.kernels.sparse_matmul.triton_expand import EXPAND, expand_bitmap
from tests.kernels.test_sparse_matmul import same_bits, weight

torch.use_deterministic_algorithms(True)  # and so what is not written yet is NaN, or the largest integer
assert torch.ones(1).new_empty(2).isnan().all()
"""


def interpret(script):
    """Run a script with Triton's interpreter, which is chosen when a kernel is imported."""
    interpreted = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", START + script], env=interpreted, cwd=root, check=True, timeout=300)


def test_the_product_is_right_at_odd_sizes_and_times_a_unit_matrix_the_weight():
    interpret("""
cases = [  # shape, tokens, sparsity, splits
    ((1, 8), 1, 0.0, 1), ((128, 128), 16, 0.0, 1), ((130, 136), 5, 0.5, 1), ((130, 264), 17, 0.5, 2),
    ((100, 264), 3, 0.95, 2), ((33, 72), 2, 1.0, 1), ((5, 392), 33, 0.6, 1), ((16, 128), 66, 0.6, 1),
    ((8, 128), 2, 0.5, 3),  # more parts than there are columns to cut
]
for dtype, allowed in ((torch.float16, 1e-3), (torch.bfloat16, 1e-2)):
    for shape, tokens, sparsity, splits in cases:
        W, x = weight(shape, sparsity, dtype), torch.randn(tokens, shape[1]).to(dtype)
        y, exact = bitmap_matmul(bitmap.encode(W), x, splits=splits), x.double() @ W.double().T
        assert y.dtype == dtype and y.shape == exact.shape, (dtype, shape, y.shape)
        # the interpreter cuts bfloat16 off instead of rounding it
        assert (y.double() - exact).norm() <= allowed * exact.norm(), (dtype, shape, tokens, sparsity)

W = weight((130, 136), 0.5, torch.float16)
unit = torch.eye(136, dtype=torch.float16)
assert same_bits(bitmap_matmul(bitmap.encode(W), unit).T.contiguous(), W)

W, x = torch.ones(8, 256).half(), torch.zeros(1, 256).half()
x[0, [0, 1, 128]] = torch.tensor([4096.0, 1.0, -4096.0]).half()
assert (bitmap_matmul(bitmap.encode(W), x, splits=2) == 1).all()  # 4097 is no number of 16 bits
""")


def test_a_weight_is_unpacked_bit_by_bit_from_tiles_of_any_fill():
    interpret("""
odd = weight((130, 72), 0.8)
odd[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-40])
odd[1, 5] = -0.0
mask = odd != 0
mask[1, 5] = mask[7, 7] = True
dropped = mask & (torch.arange(72) % 3 > 0)
cases = [(odd, mask), (odd, dropped)]
shapes = [((1, 1), 0.0), ((129, 65), 0.5), ((40, 200), 0.95), ((128, 128), 0.0), ((9, 72), 1.0)]
for shape, sparsity in shapes:
    cases += [(weight(shape, sparsity, dtype), None) for dtype in (torch.float16, torch.bfloat16)]
for W, mask in cases:
    for layout, expand in EXPAND.items():
        stored = encode(layout, W, mask)
        dense = expand(stored)
        assert dense.dtype == W.dtype and same_bits(dense, stored.dense()), (W.shape, layout)
    assert mask is dropped or same_bits(dense, W)

# a tile has room for 2^n values, of which the last stands for all that is not stored
rooms = []
for kept in (1016, 1023, 1024, 16376, 16377, 16383, 16384):
    W = torch.arange(1, 16385).short().view(128, 128)
    W = torch.where(W - 1 < kept, W, 0).view(torch.float16)
    stored = bitmap.encode(W, W.view(torch.int16) != 0)
    rooms.append(room(stored))
    assert same_bits(expand_bitmap(stored), W), kept
assert rooms == [1024, 2048, 2048, 16384, 16384, 16384, 16384], rooms
""")


def test_inputs_that_the_kernel_cannot_read_are_refused():
    from lightlib.kernels.sparse_matmul.triton_bitmap import bitmap_matmul

    stored = bitmap.encode(weight((8, 64), 0.5))
    with pytest.raises(ValueError, match=r"takes \(tokens, 64\)"):
        bitmap_matmul(stored, torch.zeros(2, 72).bfloat16())
    with pytest.raises(ValueError, match="cast one of them"):
        bitmap_matmul(stored, torch.zeros(2, 64).half())
    with pytest.raises(ValueError, match="not a multiple of 8"):
        bitmap_matmul(bitmap.encode(weight((8, 12), 0.5)), torch.zeros(2, 12).bfloat16())


# what the compiler makes of them
def compiled(kernel, types, fixed, arch, options):
    """A kernel's machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [i for i, kind in enumerate(types.values()) if kind[0] == "*"]
    source = ASTSource(
        kernel, types | dict.fromkeys(fixed, "constexpr"), constexprs=fixed,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )  # fmt: skip
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert made.metadata.shared <= 99 * 1024  # what a block may have on every GPU from sm_80 on
    return made.asm["cubin"]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("values", "tokens", "most"), [(8192, 16, 10.0), (16384, 64, 12.0)])
def test_the_product_decodes_a_weight_in_few_instructions_and_spills_none(arch, values, tokens, most):
    from lightlib.kernels.sparse_matmul.triton_bitmap import OPTIONS, bitmap_kernel

    types = TENSORS | {"x": "*bf16", "y": "*bf16"} | SIZES | {"tokens": "i32"}
    fixed = {"ROOM": values, "BN": tokens, "UPCAST": False}
    cubin = compiled(bitmap_kernel, types, fixed, arch, OPTIONS)
    loop = main_loop(cubin)
    # outside the loop a compiler may put a few pointers aside
    assert resources(cubin)["STACK"] <= 64 and not re.search(r"\b(STL|LDL)\b", " ".join(loop))
    assert any(("HGMMA" if arch == 90 else "HMMA") in instruction for instruction in loop)
    assert sum("POPC" in instruction for instruction in loop) == 2  # for 64 weights of a lane
    assert sum("LDS.U16" in instruction for instruction in loop) == 64
    assert sum("LDGSTS" in instruction for instruction in loop) >= 10  # all that is read comes ahead
    assert len(opcodes(loop)) / 64 <= most


@pytest.mark.parametrize("arch", [80, 90])
def test_unpacking_spills_no_registers_and_loads_16_bytes_at_once(arch):
    from lightlib.kernels.sparse_matmul.triton_bitmap import OPTIONS
    from lightlib.kernels.sparse_matmul.triton_expand import BLOCK, bitmap_kernel, compact_kernel, csl_kernel

    types = TENSORS | {"dense": "*i16"} | SIZES
    for kernel, fixed, options, wide in (
        (csl_kernel, {"BLOCK": BLOCK}, {}, "LDG.E.128"),
        (compact_kernel, {"BLOCK": BLOCK}, {}, "LDG.E"),
        (bitmap_kernel, {"ROOM": 16384}, OPTIONS, "LDG.E.128"),
    ):
        octets = {"words": "*u8"} if kernel is compact_kernel else {}
        cubin = compiled(kernel, types | octets, fixed, arch, options)
        assert resources(cubin)["STACK"] == 0 and wide in said("nvdisasm", "-c", cubin=cubin)
