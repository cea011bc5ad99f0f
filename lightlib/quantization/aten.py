"""ATen's products of bfloat16 inputs with packed codes: what a device has here, and how it wants the codes.

Four bits: w = (code - 8) scale + shift, in groups of 32 to 256 inputs. Eight bits: w = code scale, one a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUPS = (256, 128, 64, 32)


def four_bits(device: torch.device) -> str:
    """The name of the 4-bit product on this device."""
    return "aten::_weight_int4pack_mm" + ("_for_cpu" if device.type == "cpu" else "")


def missing(operation: str, device: torch.device) -> str:
    """Why `operation` does not run on `device`, or ""."""
    kind = device.type.upper()
    if kind not in ("CPU", "CUDA") or not torch._C._dispatch_has_kernel_for_dispatch_key(operation, kind):
        return (
            f"this build of torch has no {operation} for {device.type}, so each call decodes the weight first"
        )
    if kind == "CUDA" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{operation} needs a device of compute capability 8.0, so each call decodes the weight first"
    return ""


def lay_out4(codes: Tensor) -> Tensor:
    """Codes 0..15 (out, in) as the 4-bit product of their device reads them; in is a multiple of 32."""
    if not codes.is_cuda:
        return torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    pairs = (codes[:, ::2].int() << 4 | codes[:, 1::2].int()).to(torch.uint8)
    tiles = next(n for n in (8, 4, 2) if codes.shape[1] % (16 * n) == 0)
    return torch._convert_weight_to_int4pack(pairs, tiles)


def matmul4(x: Tensor, layout: Tensor, group: int, scale_and_shift: Tensor) -> Tensor:
    """x (tokens, in) times the weight in `layout`; scale_and_shift (groups, out, 2); all bfloat16."""
    product = torch._weight_int4pack_mm if x.is_cuda else torch._weight_int4pack_mm_for_cpu
    return product(x, layout, group, scale_and_shift)


def read4(layout: Tensor, n_out: int, n_in: int) -> Tensor:
    """The codes (out, in) back from their layout, int32."""
    # the order of nibbles is ATen's affair: identity times layout, at scale 1 and shift 8, reads it
    eye = torch.eye(n_in, dtype=torch.bfloat16, device=layout.device)
    plain = torch.tensor([1.0, 8.0]).bfloat16().expand(n_in // 32, n_out, 2).contiguous()
    return matmul4(eye, layout, 32, plain.to(layout.device)).T.int()
