"""Packed weights in the compressed-tensors format "pack-quantized", which transformers and vLLM load.

A row of W (out, in) is a row of codes without gaps, the first in the lowest bits of the first 32-bit word;
zero points lie the same way along `out`. A reader takes 2^(bits-1) from both, so w = (code - zero) * scale
with our codes as they are.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightlib.compact import CompactLinear, compact_layers
from lightlib.decoder import linears
from lightlib.export.codes import DENSE_WAY_OUT, integer_codes
from lightlib.export.huggingface import plain_model, write


def to_compressed_tensors(model: nn.Module, folder: str | Path, tokenizer=None) -> Path:
    """Write the model with its codes packed; `AutoModelForCausalLM.from_pretrained(folder)` loads it.

    Grids `Int` of 2 to 8 bits in groups, per channel or per tensor (the scale repeated for each row), with or
    without integer zero points; layers may differ, and dense ones stay dense. In float32 and float16 the
    weights come back bit-equal; in bfloat16 a reader rounds the scales to 8 bits of mantissa.
    transformers decodes everything at the first call (zero points: at loading), so nothing is smaller or
    faster there; vLLM runs the codes packed, and wants one grid for the layers it fuses (q, k, v; gate, up).
    Readers before the middle of 2026 know 2, 4 and 8 bits only.
    Raises ValueError for float_zero and other grids, other compact layers, GPT-2, and zero points in a model
    of several grids.
    """
    if not compact_layers(model):
        raise ValueError("the model has no compact layer to pack; write it with to_huggingface")
    schemes = {}

    def packed(name: str, layer: CompactLinear) -> dict[str, Tensor]:
        tensors, schemes[name] = packed_layer(name, layer)
        return tensors

    plain = plain_model(model, packed, conv1d=False)
    plain.config.quantization_config = quantization_config(schemes, list(linears(plain)))
    return write(plain, folder, tokenizer)


def packed_layer(name: str, layer: CompactLinear) -> tuple[dict[str, Tensor], dict]:
    """(the layer's tensors by their name in the format, its scheme)."""
    weight = integer_codes(name, layer)
    grid = weight.grid
    if grid.float_zero:
        raise ValueError(
            f"{name}: compressed-tensors has integer zero points and no float_zero minimum; quantize with "
            f"Int({grid.bits}, group_size={grid.group_size}), use to_gguf (4 bits), or {DENSE_WAY_OUT}"
        )
    tensors = {
        "weight_packed": pack_rows(weight.codes, grid.bits),
        # transformers decodes zero points in the dtype of the scale: float16 would round every weight
        "weight_scale": weight.scale.half() if grid.symmetric else weight.scale,
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if not grid.symmetric:
        tensors["weight_zero_point"] = pack_rows(weight.zero.T, grid.bits).T.contiguous()
    if layer.bias is not None:
        tensors["bias"] = layer.bias
    scheme = {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric, "dynamic": False}
    strategy = "channel" if grid.group_size is None else "group"
    return tensors, scheme | {"strategy": strategy, "group_size": grid.group_size}


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, n) side by side in 32-bit words: int32 (rows, ceil(n * bits / 32)).

    >>> pack_rows(torch.tensor([[1, 2, 3]]), 4)
    tensor([[801]], dtype=torch.int32)
    """
    rows, n = codes.shape
    eights = F.pad(codes.to(torch.uint8), (0, -n % 32)).reshape(rows, -1, 8).long()
    word = (eights << torch.arange(0, 8 * bits, bits)).sum(-1, keepdim=True)  # 8 codes in `bits` bytes
    whole = (word >> torch.arange(0, 8 * bits, 8) & 255).to(torch.uint8).view(rows, -1)
    return whole.view(torch.int32)[:, : -(-n * bits // 32)].contiguous()


def quantization_config(schemes: dict[str, dict], dense: list[str]) -> dict:
    """The part of config.json that says which layer is packed how; `dense` names the linears that are not."""
    kinds = []
    for scheme in schemes.values():
        if scheme not in kinds:
            kinds.append(scheme)
    asymmetric = [name for name, scheme in schemes.items() if not scheme["symmetric"]]
    if asymmetric and len(kinds) > 1:
        raise ValueError(
            f"{asymmetric[0]}: transformers reads zero points only where all packed layers share one grid, "
            f"and these {len(schemes)} have {len(kinds)}; take symmetric grids or one for all, or "
            f"{DENSE_WAY_OUT}"
        )
    inputs = {"input_activations": None, "output_activations": None}
    members = [[name for name, scheme in schemes.items() if scheme == kind] for kind in kinds]
    targets = [["Linear"]] if len(kinds) == 1 else members
    groups = {
        f"group_{i}": {"targets": names, "weights": kind, **inputs}
        for i, (kind, names) in enumerate(zip(kinds, targets, strict=True))
    }
    # packed zero points have another shape than transformers 5.23 expects, unless it decodes as it loads
    decode = {"dequantize": True} if asymmetric else {}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": dense,
        **decode,
    }
