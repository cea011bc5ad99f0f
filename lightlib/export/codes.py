"""What the formats can say: integer codes with a scale and a zero for each group of neighbouring inputs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightlib.compact import CompactLinear

DENSE_WAY_OUT = "write the model dense with to_huggingface, or packed with lightlib.save"


def integer_codes(name: str, layer: CompactLinear):
    """The layer's QuantizedWeight on the CPU: codes (out, in), scale and zero (out, groups) also per tensor.

    Raises ValueError for a layer that is not `(codes - zero) * scale`, or `codes * scale + zero` on a grid
    with float_zero.
    """
    if not hasattr(layer, "quantized"):
        raise ValueError(f"{name}: {type(layer).__name__} holds no integer codes; {DENSE_WAY_OUT}")
    weight = layer.quantized()
    if type(weight.grid).__name__ != "Int":
        raise ValueError(f"{name}: the points of {weight.grid} are not integer steps; {DENSE_WAY_OUT}")
    codes = weight.codes.cpu()
    scale, zero = (t.cpu().expand(len(codes), -1).contiguous() for t in (weight.scale, weight.zero))
    weight = replace(weight, codes=codes, scale=scale, zero=zero)
    if not torch.equal(decoded(weight), layer.dense().cpu()):
        raise ValueError(
            f"{name}: its groups are not of neighbouring inputs, which the format cannot say; quantize with "
            f"static_groups=True beside act_order, or {DENSE_WAY_OUT}"
        )
    return weight


def decoded(weight) -> Tensor:
    """What a reader of the formats makes of the codes: float32 (out, in)."""
    out, groups = weight.scale.shape
    Q, s, z = weight.codes.view(out, groups, -1).float(), weight.scale[..., None], weight.zero[..., None]
    return (Q * s + z if weight.grid.float_zero else (Q - z) * s).view(out, -1)
