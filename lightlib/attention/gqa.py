"""Let query heads share keys and values: multi-head attention to grouped-query (GQA) or multi-query (MQA).

MQA: Shazeer 2019, arXiv:1911.02150. Converting a trained model by mean pooling, and training it on for 5 % of
its steps: Ainslie et al. 2023, arXiv:2305.13245. For the training: lightlib.adapters.recover.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightlib.attention.merging import POOLS, Heads, merge, merge_aligned
from lightlib.calibration import Block, Gram, stream_blocks
from lightlib.change import changing
from lightlib.decoder import check_linears, check_sharing, head_dim, set_head_counts, turning_channels
from lightlib.report import Compressed, LayerReport, Report, relative_error
from lightlib.units import dense_part, unit_counts

HOWS = (*POOLS, "aligned")


class GramWithOne(Gram):
    """The gram (in + 1, in + 1) of a layer's inputs with a 1 behind each, which a bias multiplies."""

    def __init__(self, n_in: int, device: torch.device):
        super().__init__(n_in + 1, device)

    def add(self, x: Tensor) -> None:
        super().add(F.pad(x, (0, 1), value=1.0))


def share_heads(
    model: nn.Module,
    batches: list[Tensor] | None = None,
    *,
    kv_heads: int = 1,
    how: str = "mean",
    seed: int = 0,
    device=None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """Leave every block `kv_heads` key and value heads, each for a group of neighbouring query heads.

    The cache shrinks as they do; the model stays a plain one. kv_heads: any number that divides the model's;
    its own changes nothing. how: a group's "mean" (the paper's), its "first" head, a "random" one (drawn with
    `seed`), or "aligned": heads are turned towards each other first, so far as queries and the output layer
    can take the turns in exactly. With `batches`, "aligned" weighs what it loses by the inputs, and errors in
    the report are those of the outputs; rows of a layer that only took turns in have the error 0.
    Raises ValueError for a number that does not divide, a family that cannot share, and a model that is
    factorized, packed or no plain one any more.
    """
    if how not in HOWS:
        raise ValueError(f"how={how!r}: choose one of {', '.join(map(repr, HOWS))}")
    with changing(model, inplace) as light:
        present = check(light, kv_heads)
        if kv_heads == present:
            return Compressed(light, Report(()))
        rows, generator = [], torch.Generator().manual_seed(seed)
        for block in stream_blocks(light, batches, device=device, progress=progress, title="share heads"):
            first, old = block.roles.attention_in[0], take_apart(light, block)
            watched = block.collect(GramWithOne, of=(first,)).get(first)
            gram, notes = None if watched is None else watched.value.double(), how
            notes += "; error of the weights alone" if gram is None else ""
            if how == "aligned":
                turning = turning_channels(light, block.module)
                new, seen = merge_aligned(old, kv_heads, turning, gram)
                notes += "" if turning is not None else "; keys by mean, since a norm follows them"
            else:
                new, seen = merge(old, kv_heads, how, generator)
            rows += install(light, block, old, new, seen, gram, notes)
        # last, so that work that is broken off leaves it as it was
        light.config.num_key_value_heads = kv_heads
    return Compressed(light, Report(tuple(rows)))


def check(model: nn.Module, kv_heads: int) -> int:
    """How many key-value heads each block has. Raises ValueError where they cannot become `kv_heads`."""
    check_sharing(model)
    check_linears(model, whole=True)
    if hasattr(model, "structure"):
        raise ValueError("this model is no plain one any more (sliced or pruned unevenly); share heads first")
    present = next(iter(unit_counts(model).values()))["heads"]
    divisors = [n for n in range(1, present + 1) if present % n == 0]
    if kv_heads not in divisors:
        raise ValueError(
            f"kv_heads={kv_heads} does not divide the model's {present} key-value heads into equal groups; "
            f"choose one of {', '.join(map(str, divisors))}"
        )
    return present


def take_apart(model: nn.Module, block: Block) -> Heads:
    """The block's weights by head, in float64."""
    made, reader = layers(model, block)
    size = head_dim(model)
    rows = torch.cat([with_bias(part) for part in made])  # all queries, then all keys, then all values
    queries = reader.in_features // size
    kept = (len(rows) // size - queries) // 2
    q, k, v = rows.unflatten(0, (-1, size)).split([queries, kept, kept])
    return Heads(q, k, v, reader.weight.double().T.unflatten(0, (queries, size)))


def layers(model: nn.Module, block: Block) -> tuple[list[nn.Linear], nn.Linear]:
    """The layers that make queries, keys and values, one or three, and the one that reads the heads."""
    *made, reader = (dense_part(model, f"{block.name}.{name}") for name in block.roles.attention)
    return made, reader


def with_bias(part: nn.Linear) -> Tensor:
    """[W b] (out, in + 1) in float64; without a bias, b is 0."""
    bias = part.weight.new_zeros(part.out_features) if part.bias is None else part.bias
    return torch.cat([part.weight, bias[:, None]], 1).double()


def install(
    model: nn.Module, block: Block, old: Heads, new: Heads, seen: Heads, gram: Tensor | None, notes: str
) -> list[LayerReport]:
    """Give the block its new heads; a row for each layer whose weight is another one now."""
    made, reader = layers(model, block)
    letters = ("qkv",) if len(made) == 1 else "qkv"
    inner, rows = None if gram is None else gram[:-1, :-1], []
    for name, part, kinds in zip(block.roles.attention_in, made, letters, strict=True):
        if all(getattr(new, kind) is getattr(old, kind) for kind in kinds):
            continue
        before, now, effect = (
            torch.cat([getattr(heads, kind).flatten(0, 1) for kind in kinds]) for heads in (old, new, seen)
        )
        error = relative_error(before[:, :-1], effect[:, :-1], inner)
        rows.append(put(block, name, part, now[:, :-1], now[:, -1], error, notes))
    if new.o is not old.o:
        rows.append(put(block, block.roles.attention_out, reader, new.o.flatten(0, 1).T, None, 0.0, notes))
    set_head_counts(model, block.module, len(new.k))
    return rows


def put(
    block: Block, name: str, old: nn.Linear, weight: Tensor, bias: Tensor | None, error: float, notes: str
) -> LayerReport:
    """Put a linear with this weight (out, in) where `old` was, which stays as it is; bias None: its own."""
    new = copy.copy(old)
    new._parameters = dict(old._parameters)
    new.weight = nn.Parameter(weight.to(old.weight).contiguous(), old.weight.requires_grad)
    if bias is not None and old.bias is not None:
        new.bias = nn.Parameter(bias.to(old.bias).contiguous(), old.bias.requires_grad)
    new.out_features = len(weight)
    block.module.set_submodule(name, new)
    bits = (sum(8 * p.nbytes for p in part.parameters()) for part in (old, new))
    return LayerReport("share_heads", f"{block.name}.{name}", tuple(weight.shape), *bits, error, notes)
