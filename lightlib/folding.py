"""Move a scale of each channel from a linear layer's inputs into its weight, without changing the model.

(x / s) (s W)^T = x W^T. Dividing x costs nothing where what makes x can be divided instead: a norm's weight,
the rows of the value projection, the rows of a gated MLP's up projection. Used by AWQ and SmoothQuant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightlib.decoder import check_linears, norm_readers, roles


@dataclass(frozen=True)
class Fold:
    """The linears that read one signal, and the part of the block that can give it divided.

    rows: how many of the source's last outputs the signal is; None for a norm. heads: (kv heads, queries a kv
    head), where a value channel reaches several channels of the signal, which must share their scale.
    """

    readers: tuple[str, ...]
    source: str
    rows: int | None = None
    heads: tuple[int, int] = (1, 1)
    norm_offset: float = 0.0

    def tie(self, scale: Tensor) -> Tensor:
        """The nearest scale (in,) that can be folded: equal for all query heads that read one value head."""
        kv_heads, queries = self.heads
        shared = scale.log().view(kv_heads, queries, -1).mean(1, keepdim=True).exp()
        return shared.expand(-1, queries, -1).reshape(-1)

    @torch.no_grad()
    def apply(self, block: nn.Module, scale: Tensor) -> None:
        """Divide the signal by `scale` (in,), as `tie` returns it, and multiply its readers' columns."""
        source = block.get_submodule(self.source)
        for reader in self.readers:
            part = block.get_submodule(reader)
            rewrite(part, "weight", part.weight.float() * scale)
        weight, bias = source.weight.float(), getattr(source, "bias", None)
        if self.rows is None:
            rewrite(source, "weight", (weight + self.norm_offset) / scale - self.norm_offset)
            divisor = scale
        else:
            kv_heads, queries = self.heads
            shared = scale.view(kv_heads, queries, -1)[:, 0].reshape(-1)
            divisor = torch.cat([shared.new_ones(len(weight) - self.rows), shared])
            rewrite(source, "weight", weight / divisor[:, None])
        if bias is not None:
            rewrite(source, "bias", bias.float() / divisor)


def rewrite(part: nn.Module, name: str, value: Tensor) -> None:
    """Give `part` a new parameter, and leave the old one as it is: work that is broken off puts it back."""
    old = getattr(part, name)
    setattr(part, name, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad))


def folds(model: nn.Module) -> list[Fold]:
    """Where a block of this model takes a scale exactly; names are those in a block. Linears without a fold
    have an activation, or interleaved heads, in front of them."""
    check_linears(model, whole=True)
    names, config = roles(model), model.config
    block = model.get_submodule(names.blocks)[0]
    found = []
    for norm, linears in norm_readers(names).items():
        affine = getattr(block.get_submodule(norm), "weight", None) is not None
        if affine and getattr(config, "do_layer_norm_before", True):
            found.append(Fold(linears, norm, norm_offset=names.norm_offset))
    if names.value:
        kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = block.get_submodule(names.attention_out).in_features
        queries = config.num_attention_heads // kv
        found.append(Fold((names.attention_out,), names.value, width // queries, (kv, queries)))
    if names.gated or getattr(config, "activation_function", "") == "relu":
        hidden = block.get_submodule(names.mlp_out).in_features
        found.append(Fold((names.mlp_out,), names.up, hidden))
    return found
