"""Up to 64 tokens times a weight of 4- or 8-bit codes, in Triton: two rungs.

v1  codes become weights (code, zero and scale in float32), which tensor cores multiply
v2  codes become halves by their bits alone, and each block's sum is scaled, not its weights

With few tokens the weight's bytes are what takes time, if no more than about five instructions are spent on
each weight. In v2 a byte holds a low and a high code, which are multiplied with two runs of x.
"""

import torch
import triton
import triton.language as tl

ROWS, MOST_TOKENS = 128, 64  # of a program
PROGRAMS, BLOCKS_EACH = 3, 4  # programs that a multiprocessor should have, blocks of each at least


@triton.jit
def v1(
    codes, scale, zero, x, y, n_out, tokens, n_in, blocks_each,
    ZERO: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, SHARE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y (splits, tokens, out) = x (tokens, in) W^T, a BM x BN tile over some blocks of columns."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    token = tl.program_id(1) * BN + tl.arange(0, BN)
    column = tl.arange(0, BLOCK)
    inside, real = row < n_out, token < tokens
    PER_BLOCK: tl.constexpr = BLOCK * BITS // 8  # bytes
    shift = column // PER_BLOCK * 4
    codes += row.to(tl.int64)[:, None] * (n_in * BITS // 8) + (column % PER_BLOCK)[None, :]
    x += token.to(tl.int64)[:, None] * n_in + column[None, :]
    first = tl.program_id(2) * blocks_each
    total = tl.zeros([BM, BN], tl.float32)
    for block in range(first, tl.minimum(first + blocks_each, n_in // BLOCK)):
        code = (
            tl.load(codes + block * PER_BLOCK, mask=inside[:, None], other=0).to(tl.int32) >> shift[None, :]
        )
        code = (code & (2**BITS - 1)).to(tl.float32)  # (BM, BLOCK)
        at = block // SHARE * n_out + row
        s = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)[:, None]
        z = tl.full([1, 1], 2 ** (BITS - 1), tl.float32)
        if ZERO != "middle":
            z = tl.load(zero + at, mask=inside, other=0).to(tl.float32)[:, None]
        W = code * s + z if ZERO == "value" else (code - z) * s
        inputs = tl.load(x + block * BLOCK, mask=real[:, None], other=0.0)  # (BN, BLOCK)
        if WIDE:
            total = tl.dot(W, inputs.to(tl.float32).T, total)
        else:
            total = tl.dot(W.to(inputs.dtype), inputs.T, total)
    place = (tl.program_id(2) * tokens + token).to(tl.int64)[None, :] * n_out + row[:, None]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside[:, None] & real[None, :])


@triton.jit
def minus(lifted, zero, WIDE: tl.constexpr):
    """Halves `lifted` minus `zero`, exactly; in float32 where WIDE."""
    if WIDE:
        return lifted.to(tl.float32) - zero.to(tl.float32)
    return lifted - zero.to(lifted.dtype)


@triton.jit
def low(byte, zero, kind: tl.constexpr, WIDE: tl.constexpr):
    """The low codes of bytes, minus zero. Below the bits of 1024, or 128, a code is what is added to it."""
    if kind == tl.float16:
        return minus(((byte & 15).to(tl.uint16) | 0x6400).to(kind, bitcast=True), zero + 1024, WIDE)
    return minus(((byte & 15).to(tl.uint16) | 0x4300).to(kind, bitcast=True), zero + 128, WIDE)


@triton.jit
def high(byte, zero, kind: tl.constexpr, WIDE: tl.constexpr):
    """The high codes, minus zero. float16 holds them where they are, sixteenfold: no shift."""
    if kind == tl.float16:
        sixteenfold = ((byte & 0xF0).to(tl.uint16) | 0x6400).to(kind, bitcast=True)
        return minus(sixteenfold * 0.0625, zero + 64, WIDE)
    return minus(((byte >> 4).to(tl.uint16) | 0x4300).to(kind, bitcast=True), zero + 128, WIDE)


@triton.jit
def whole(byte, zero, kind: tl.constexpr, WIDE: tl.constexpr):
    """Codes of 8 bits, minus zero."""
    code = byte.to(tl.uint16)
    if kind == tl.float16:
        return minus((code | 0x6400).to(kind, bitcast=True), zero + 1024, WIDE)
    # bfloat16 has seven bits below 128: 128 + (code & 127), less 128 if the eighth is set, else 256, is
    # code - 128
    centred = minus(
        ((code & 0x7F) | 0x4300).to(kind, bitcast=True), ((code & 0x80) ^ 0x4380).to(kind, bitcast=True), WIDE
    )
    return minus(centred, zero - 128, WIDE)


@triton.jit
def v2(
    codes, scale, zero, x, y, n_out, tokens, n_in, blocks_each,
    ZERO: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, SHARE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y (splits, tokens, out) = x (tokens, in) W^T, a BM x BN tile over some blocks of columns."""
    kind: tl.constexpr = x.dtype.element_ty
    PER_BLOCK: tl.constexpr = BLOCK * BITS // 8  # bytes; columns of a run
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    token = tl.program_id(1) * BN + tl.arange(0, BN)
    column = tl.arange(0, PER_BLOCK)
    inside, real = row < n_out, token < tokens
    codes += row.to(tl.int64)[:, None] * (n_in * BITS // 8) + column[None, :]
    x += token.to(tl.int64)[:, None] * n_in + column[None, :]
    first = tl.program_id(2) * blocks_each
    total = tl.zeros([BM, BN], tl.float32)
    for block in range(first, tl.minimum(first + blocks_each, n_in // BLOCK)):
        byte = tl.load(codes + block * PER_BLOCK, mask=inside[:, None], other=0)  # (BM, PER_BLOCK)
        at = block // SHARE * n_out + row
        z = tl.full([1, 1], 2 ** (BITS - 1), tl.float32)
        if ZERO == "code":
            z = tl.load(zero + at, mask=inside, other=0).to(tl.float32)[:, None]
        inputs = tl.load(x + block * BLOCK, mask=real[:, None], other=0.0)  # (BN, PER_BLOCK)
        if WIDE:
            inputs = inputs.to(tl.float32)
        if BITS == 4:
            others = tl.load(x + block * BLOCK + PER_BLOCK, mask=real[:, None], other=0.0)
            if WIDE:
                others = others.to(tl.float32)
            product = tl.dot(low(byte, z, kind, WIDE), inputs.T)  # (BM, BN)
            product = tl.dot(high(byte, z, kind, WIDE), others.T, product)
        else:
            product = tl.dot(whole(byte, z, kind, WIDE), inputs.T)
        s = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)[:, None]
        total += product * s
        if ZERO == "value":  # W = (code - middle) s + the value of the middle code, which the sum of x meets
            sums = tl.sum(inputs.to(tl.float32), 1)
            if BITS == 4:
                sums += tl.sum(others.to(tl.float32), 1)
            least = tl.load(zero + at, mask=inside, other=0.0).to(tl.float32)[:, None]
            total += (least + z * s) * sums[None, :]
    place = (tl.program_id(2) * tokens + token).to(tl.int64)[None, :] * n_out + row[:, None]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside[:, None] & real[None, :])


RUNGS = {"v1": v1, "v2": v2}


def int_matmul(weight, x, *, rung: str = "v2", splits: int = 1):
    """x (tokens, in) W^T -> (tokens, out), 16-bit x; weight: a `Packed`, its columns cut in `splits`."""
    (n_out, n_in), tokens, blocks = weight.shape, len(x), weight.shape[1] // weight.block
    x = x.contiguous()
    blocks_each = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, blocks_each)
    y = torch.empty(splits, tokens, n_out, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    knobs = options(weight.bits, tokens)
    grid = triton.cdiv(n_out, knobs["BM"]), triton.cdiv(tokens, knobs["BN"]), splits
    RUNGS[rung][grid](
        weight.codes, weight.scale, weight.zero, x, y, n_out, tokens, n_in, blocks_each,
        ZERO=weight.kind_of_zero, BITS=weight.bits, BLOCK=weight.block, SHARE=weight.group // weight.block,
        # the interpreter multiplies bfloat16 as if its bits were integers
        WIDE=triton.knobs.runtime.interpret and x.dtype == torch.bfloat16, **knobs,
    )  # fmt: skip
    return y[0] if splits == 1 else y.sum(0).to(x.dtype)


def options(bits: int, tokens: int) -> dict[str, int]:
    """The tile of a program, warps so that no register spills, and stages that fit in 99 KiB."""
    BN = next(n for n in (16, 32, MOST_TOKENS) if tokens <= n or n == MOST_TOKENS)
    stages = 4 if BN < 64 else 3 if bits == 4 else 2
    return {"BM": ROWS, "BN": BN, "num_warps": 4 if BN < 64 else 8, "num_stages": stages}


def splits_for(weight, tokens: int, processors: int) -> int:
    """In how many parts the columns are cut, so that all multiprocessors have work, and no part is short."""
    programs = triton.cdiv(weight.shape[0], ROWS) * triton.cdiv(tokens, MOST_TOKENS)
    longest = weight.shape[1] // weight.block // BLOCKS_EACH
    return max(1, min(longest, triton.cdiv(PROGRAMS * processors, programs)))
