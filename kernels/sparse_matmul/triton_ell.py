"""One or two tokens times a row-ELL weight, in Triton: every value is read once, multiplied, and added up.

No tensor core, no shared memory: with so few tokens only bytes count. See ell.py for the layout.
"""

import triton
import triton.language as tl

CHUNK, GROUPS = tl.constexpr(256), tl.constexpr(8)


@triton.jit
def ell_kernel(values, columns, first, x, y, n_out, n_in, chunks, TWO: tl.constexpr, ROWS: tl.constexpr):
    """y (1 or 2, out) = x (1 or 2, in) W^T, ROWS of W for each program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    slot = tl.arange(0, CHUNK)[None, :]
    inside = row < n_out
    one = tl.zeros([ROWS, CHUNK], tl.float32)
    other = tl.zeros([ROWS, CHUNK], tl.float32)
    for chunk in range(chunks):
        at = row * chunks + chunk
        value = tl.load(values + at * CHUNK + slot, mask=inside, other=0.0).to(tl.float32)
        column = tl.load(columns + at * CHUNK + slot, mask=inside, other=0).to(tl.int32)
        # lanes that hold slots side by side read inputs of one group, which lie within 512 bytes
        column += tl.load(first + at * GROUPS + slot % GROUPS, mask=inside, other=0).to(tl.int32) & 0xFFFF
        one += value * tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        if TWO:
            other += value * tl.load(x + n_in + column, mask=inside, other=0.0).to(tl.float32)
    kind = y.dtype.element_ty
    tl.store(y + row, tl.sum(one, 1, keep_dims=True).to(kind), mask=inside)
    if TWO:
        tl.store(y + n_out + row, tl.sum(other, 1, keep_dims=True).to(kind), mask=inside)


def ell_matmul(weight, x, rows: int = 4):
    """x (1 or 2, in) W^T -> (1 or 2, out), by `ell_kernel`; weight: an `ell.ELL`."""
    n_out, n_in = weight.shape
    y = x.new_empty(len(x), n_out)
    ell_kernel[(triton.cdiv(n_out, rows),)](
        weight.values, weight.columns, weight.first, x, y, n_out, n_in, weight.values.shape[1],
        TWO=len(x) == 2, ROWS=rows, num_warps=rows,
    )  # fmt: skip
    return y
