"""What can be taken out of a decoder block as a whole: heads with all their rows and columns, and neurons.

A unit's rows in the layers that make it and its columns in the layer that reads it depend on each other: they
go together or not at all. LLM-Pruner calls such a group coupled (Ma et al. 2023, arXiv:2305.11627). Under
grouped-query attention the unit is a key-value head with all query heads that share it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightlib.compact import CompactLinear
from lightlib.decoder import (
    MLP_SIZES,
    Roles,
    check_linears,
    find_blocks,
    head_dim,
    linear_shapes,
    roles,
    set_head_counts,
)
from lightlib.report import LayerReport

KINDS = ("heads", "neurons")
RESTRUCTURE = "lightlib.units:restructure"

Kept = dict[str, dict[str, Tensor]]  # {block: {kind: the units (kept) that stay, rising}}


@dataclass(frozen=True)
class Member:
    """A linear's share in the units of one kind: rows that make them (dim 0), or columns that read them (1).

    index (units, size): which rows or columns belong to each.
    """

    linear: str
    dim: int
    index: Tensor


def members(model: nn.Module, block: nn.Module) -> dict[str, list[Member]]:
    """{kind: all that its units have in `block`}; the layer that reads them comes last."""
    names = roles(model)
    return {"heads": head_members(block, names, head_dim(model)), "neurons": neuron_members(block, names)}


def head_members(block: nn.Module, names: Roles, size: int) -> list[Member]:
    """The rows of queries, keys and values, and the columns of what reads them, of each key-value head."""
    shapes = linear_shapes(block)
    heads = shapes[names.attention_out][1] // size
    parts = [shapes[name][0] for name in names.attention_in]
    reader = Member(names.attention_out, 1, torch.arange(heads * size))
    if len(parts) == 3:
        rows = [Member(name, 0, torch.arange(n)) for name, n in zip(names.attention_in, parts, strict=True)]
        groups = parts[1] // size
    elif names.value is None:  # queries, keys and values of a head lie side by side
        rows, groups = [Member(names.attention_in[0], 0, torch.arange(parts[0]))], heads
    else:  # all queries, then all keys, then all values
        groups = (parts[0] // size - heads) // 2
        q, k, v = torch.arange(parts[0]).split([heads * size, groups * size, groups * size])
        index = torch.cat([part.view(groups, -1) for part in (q, k, v)], dim=1)
        rows = [Member(names.attention_in[0], 0, index)]
    return [Member(m.linear, m.dim, m.index.view(groups, -1)) for m in (*rows, reader)]


def neuron_members(block: nn.Module, names: Roles) -> list[Member]:
    """The rows of gate and up, and the column of down, of each neuron of the MLP."""
    shapes = linear_shapes(block)
    count = shapes[names.mlp_out][1]
    halves = shapes[names.mlp_in[0]][0] // count  # gate and up may be one layer
    rows = [Member(name, 0, torch.arange(halves * count).view(halves, count).T) for name in names.mlp_in]
    return [*rows, Member(names.mlp_out, 1, torch.arange(count)[:, None])]


def unit_counts(model: nn.Module) -> dict[str, dict[str, int]]:
    """{block: {kind: how many units it has}}."""
    return {
        name: {kind: len(parts[-1].index) for kind, parts in members(model, block).items()}
        for name, block in find_blocks(model).items()
    }


def unit_weights(model: nn.Module, block: nn.Module) -> dict[str, int]:
    """{kind: weights and biases that go with one unit} of `block`."""
    found = {}
    for kind, parts in members(model, block).items():
        linears = [(block.get_submodule(m.linear), m) for m in parts]
        found[kind] = sum(
            m.index.shape[1] * (part.weight.shape[1 - m.dim] + (m.dim == 0 and part.bias is not None))
            for part, m in linears
        )
    return found


@torch.no_grad()
def scale_units(model: nn.Module, values: dict[str, dict[str, Tensor]]) -> nn.Module:
    """Multiply what leaves each unit by its value: {block: {kind: (units)}}; 0 masks it. In place."""
    for name, kinds in values.items():
        block = model.get_submodule(name)
        parts = members(model, block)
        for kind, value in kinds.items():
            reader = parts[kind][-1]
            linear = dense_part(model, f"{name}.{reader.linear}")
            factor = torch.empty(linear.in_features, dtype=torch.float64)
            factor[reader.index] = value.double().cpu()[:, None]
            linear.weight = nn.Parameter(
                linear.weight * factor.to(linear.weight), linear.weight.requires_grad
            )
    return model


@torch.no_grad()
def keep_units(model: nn.Module, kept: Kept, method: str) -> list[LayerReport]:
    """Take all units out that are not in `kept`; kinds that are not named stay whole. In place.

    Returns a row for each layer that became smaller. The model's config says the new sizes where it can, and
    then the model is a plain one; otherwise they become part of its structure. Raises ValueError for a kind
    without a unit left, and for packed layers, which are cut before they are packed.
    """
    check_linears(model)
    rows = []
    for name, old, new, units in cut_units(model, kept):
        gone = 1 - new.weight.double().norm() ** 2 / old.weight.double().norm() ** 2
        before, after = (sum(8 * p.nbytes for p in part.parameters()) for part in (old, new))
        shape, error = (new.out_features, new.in_features), gone.clamp_min(0).sqrt().item()
        notes = f"{units}; error of the weights alone"
        rows.append(LayerReport(method, name, shape, before, after, error, notes))
    describe(model)
    return rows


def cut_units(model: nn.Module, kept: Kept) -> Iterator[tuple[str, nn.Linear, nn.Linear, str]]:
    """Cut each layer to the units that stay: its name, what it was, what it is, and what stayed."""
    for name, kinds in kept.items():
        block = model.get_submodule(name)
        parts = members(model, block)
        for kind, index in kinds.items():
            count = len(parts[kind][-1].index)
            if not len(index):
                raise ValueError(f"{name}: none of its {count} {kind} would stay; keep one")
            if len(index) == count:
                continue
            for member in parts[kind]:
                old = dense_part(model, f"{name}.{member.linear}")
                new = cut(old, member.dim, member.index[index.cpu()].flatten().sort().values)
                model.set_submodule(f"{name}.{member.linear}", new)
                yield f"{name}.{member.linear}", old, new, f"{len(index)} of {count} {kind}"
            if kind == "heads":
                set_head_counts(model, block, len(index))


def cut(old: nn.Linear, dim: int, index: Tensor) -> nn.Linear:
    """A linear with these rows (dim 0) or columns (dim 1) of `old`, which stays as it is."""
    new = copy.copy(old)
    new._parameters = dict(old._parameters)
    index = index.to(old.weight.device)
    new.weight = nn.Parameter(old.weight.index_select(dim, index), old.weight.requires_grad)
    if dim == 0 and old.bias is not None:
        new.bias = nn.Parameter(old.bias[index], old.bias.requires_grad)
    new.out_features, new.in_features = new.weight.shape
    return new


def dense_part(model: nn.Module, name: str) -> nn.Linear:
    part = model.get_submodule(name)
    if isinstance(part, CompactLinear):
        raise ValueError(f"{name} is packed ({type(part).__name__}); take units out before layers are packed")
    return part


# what a pruned model is when it is loaded
def describe(model: nn.Module) -> None:
    """Say the sizes of the blocks in the model's config, or, where no config can, in its structure."""
    counts = list(unit_counts(model).values())
    sizes = {kind: [block[kind] for block in counts] for kind in KINDS}
    if hasattr(model, "structure") or not describe_in_config(model, sizes):
        model.structure = [*getattr(model, "structure", []), [RESTRUCTURE, sizes]]


def describe_in_config(model: nn.Module, sizes: dict[str, list[int]]) -> bool:
    """Give the model's config the sizes of its blocks if a plain model of such a config has them."""
    from transformers import AutoModelForCausalLM

    if any(len(set(each)) > 1 for each in sizes.values()):
        return False
    config, size = copy.deepcopy(model.config), head_dim(model)
    (groups,), (neurons,) = map(set, sizes.values())
    ratio = config.num_attention_heads // (
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    )
    for key in MLP_SIZES:
        if hasattr(config, key):
            setattr(config, key, neurons)
    if groups * ratio != config.num_attention_heads:
        config.head_dim, config.num_attention_heads = size, groups * ratio
        if getattr(config, "num_key_value_heads", None):
            config.num_key_value_heads = groups
    try:
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(config)
    except ValueError:
        return False
    wanted = {name: p.shape for name, p in plain.named_parameters()}
    if wanted != {name: p.shape for name, p in model.named_parameters()}:
        return False
    model.config.update(config.to_dict())
    return True


def restructure(model: nn.Module, heads: list[int], neurons: list[int]) -> nn.Module:
    """The structure of a pruned model, with weights still to be filled. In place.

    heads, neurons: how many key-value heads and neurons each block has.
    """
    sizes = zip(find_blocks(model), heads, neurons, strict=True)
    with torch.device("cpu"):  # the model may be without storage; its units are counted all the same
        kept = {name: {"heads": torch.arange(h), "neurons": torch.arange(d)} for name, h, d in sizes}
        for _ in cut_units(model, kept):
            pass
    return model
