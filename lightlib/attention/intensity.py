"""FLOPs per byte of a decode step: the weights serve the whole batch, a cache serves its own sequence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightlib.attention.cost import held_tokens, kv_bytes
from lightlib.cost import flops, size
from lightlib.decoder import attention_width, find_blocks, roles
from lightlib.report import facts_table


@dataclass(frozen=True)
class Intensity:
    """FLOPs and bytes of one decode step: a multiply and an add are two, and each byte is read once."""

    attention_flops: int
    attention_bytes: int  # of the cache
    weight_flops: int
    weight_bytes: int

    @property
    def attention(self) -> float:
        """FLOPs a byte of the cache: 2 x query heads / kv heads / bytes of a number, whatever the batch."""
        return self.attention_flops / self.attention_bytes

    @property
    def weights(self) -> float:
        """FLOPs a byte of the weights: as many times those of one sequence as the batch has sequences."""
        return self.weight_flops / self.weight_bytes

    @property
    def step(self) -> float:
        """FLOPs a byte of the whole step."""
        return (self.attention_flops + self.weight_flops) / (self.attention_bytes + self.weight_bytes)

    def _repr_html_(self) -> str:
        return facts_table(self, ("attention_bytes", "weight_bytes"))


def arithmetic_intensity(
    model: nn.Module,
    batch: int = 1,
    context: int = 1024,
    *,
    kv_heads: int | None = None,
    bits: float | None = None,
) -> Intensity:
    """What one decode step of `batch` sequences computes and reads, with `context` tokens cached for each.

    kv_heads: as if each block cached so many, the weights as they are. bits: of each cached number. Weights
    count packed as they are stored, and without embeddings of which a step reads a row. Softmax, norms and
    activations count nothing. Raises ValueError for less than one sequence, token or head.
    """
    if context < 1:
        raise ValueError(f"context={context}: a step reads at least the token it is given")
    cached = kv_bytes(model, context, batch, bits, kv_heads)
    names = roles(model)
    widths = [attention_width(block, names) for block in find_blocks(model).values()]
    attention = 4 * batch * sum(w * n for w, n in zip(widths, held_tokens(model, context), strict=True))
    # lightlib.cost counts attention without windows; here its share is taken out again
    linear = flops(model, context).decode_per_token - 4 * context * sum(widths)
    return Intensity(attention, cached, batch * linear, size(model).stored_bytes - table_bytes(model))


def table_bytes(model: nn.Module) -> int:
    """Bytes of the tables of which a step reads a row: embeddings, but for one that the head shares."""
    names, head = roles(model), {id(weight) for weight in model.get_output_embeddings().parameters()}
    parts = (model.get_submodule(name) for name in (names.embedding, *names.positions))
    weights = (weight for part in parts for weight in part.parameters())
    return sum(weight.nbytes for weight in weights if id(weight) not in head)
