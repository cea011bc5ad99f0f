"""Check the integer products against float64 at odd sizes, then time them beside cuBLAS and ATen's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lightlib.kernels.harness import TOLERANCE, Limits, checked, copies_beyond_cache, poisoned, timed
from lightlib.kernels.w4_matmul import op
from lightlib.kernels.w4_matmul.packed import Packed, encode
from lightlib.kernels.w4_matmul.reference import matmul

ODD = [
    (130, 32, 32, 1),
    (130, 128, 64, 2),
    (257, 512, 128, 17),
    (1000, 2048, 2048, 64),
]  # out, in, group, tokens


@dataclass(frozen=True)
class Row:
    """One product y = x W^T, W (out, in): our "int4" or "int8", "cuBLAS" in bfloat16, or "ATen int4"."""

    kernel: str
    n_out: int
    n_in: int
    tokens: int
    stored_bytes: int
    us: float
    p10_us: float
    p90_us: float
    launched_us: float
    gb_per_s: float  # of stored bytes
    of_roofline: float
    times_cublas: float


def rounded(n_out: int, n_in: int, group: int, bits: int, kind: str, device: str = "cuda") -> Packed:
    """Random codes with a zero of the given kind: "middle", "code" or "value"."""
    codes = torch.randint(2**bits, (n_out, n_in), dtype=torch.uint8, device=device)
    scale = torch.rand(n_out, n_in // group, device=device) / n_in**0.5 / 2 ** (bits - 1)
    zero = {
        "middle": None,
        "code": torch.randint(2**bits, scale.shape, device=device),
        "value": -scale * 2 ** (bits - 1),
    }[kind]
    return encode(codes, scale, zero, bits, float_zero=kind == "value")


def check(bits: int, device: str = "cuda") -> float:
    """The largest relative error over odd sizes, zeros and types. Raises AssertionError beyond TOLERANCE."""
    worst = 0.0
    for n_out, n_in, group, tokens in ODD:
        for kind in ("middle", "code", "value"):
            for dtype in TOLERANCE:
                held = rounded(n_out, n_in, group, bits, kind, device)
                x = torch.randn(tokens, n_in, device=device).to(dtype)
                with poisoned():
                    y = op.multiply(held, x)
                where = (
                    f"int{bits} {n_out} x {n_in}, groups of {group}, {tokens} tokens, zero: {kind}, {dtype}"
                )
                worst = max(worst, checked(where, y, matmul(held, x)))
    return worst


def bench(
    n_out: int, n_in: int, tokens: tuple[int, ...], limits: Limits, device: str = "cuda"
) -> Iterator[Row]:
    """Time 4 bits in groups of 128 and 8 bits with one scale a row, in bfloat16."""
    W = torch.randn(n_out, n_in, device=device, dtype=torch.bfloat16)
    held = {
        "int4": rounded(n_out, n_in, 128, 4, "code", device),
        "int8": rounded(n_out, n_in, n_in, 8, "middle", device),
    }
    for n in tokens:
        x = torch.randn(n, n_in, device=device, dtype=torch.bfloat16)
        row = partial(measured, n_out, n_in, n, limits)
        dense = [partial(F.linear, x, W.clone()) for _ in range(copies_beyond_cache(W.nbytes))]
        yield (cublas := row("cuBLAS", W.nbytes, dense, None))
        for name, weight in held.items():
            stored = weight.stored_bits() // 8
            copies = [replace(weight, codes=weight.codes.clone()) for _ in range(copies_beyond_cache(stored))]
            yield row(name, stored, [partial(op.multiply, copy, x) for copy in copies], cublas.us)
        try:
            found = row("ATen int4", *aten_int4(n_out, n_in, x), cublas.us)
        except RuntimeError as error:  # a baseline that this device lacks must not stop ours
            print(f"ATen int4 does not run here: {error}", flush=True)
        else:
            yield found


def aten_int4(n_out: int, n_in: int, x: Tensor) -> tuple[int, list]:
    """(bytes, products) of random codes in the layout of torch's own 4-bit product, groups of 128."""
    pairs = torch.randint(256, (n_out, n_in // 2), dtype=torch.uint8, device=x.device)
    codes = torch._convert_weight_to_int4pack(pairs, 8)
    scales = torch.rand(n_in // 128, n_out, 2, device=x.device).bfloat16()
    stored = codes.nbytes + scales.nbytes
    copies = [codes.clone() for _ in range(copies_beyond_cache(stored))]
    return stored, [partial(torch._weight_int4pack_mm, x, copy, 128, scales) for copy in copies]


def measured(
    n_out: int, n_in: int, tokens: int, limits: Limits, kernel: str, stored: int, calls: list, cublas_us
) -> Row:
    """One row; cublas_us: None where this is cuBLAS itself."""
    taken = timed(calls)
    floor = limits.floor_us(stored + 2 * tokens * (n_in + n_out), 2 * tokens * n_out * n_in)
    return Row(
        kernel, n_out, n_in, tokens, stored, **asdict(taken), gb_per_s=stored / taken.us / 1e3,
        of_roofline=floor / taken.us, times_cublas=(cublas_us or taken.us) / taken.us,
    )  # fmt: skip
