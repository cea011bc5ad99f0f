"""What can be taken out of a decoder as a whole: heads with all their rows and columns, neurons, channels.

A unit's rows in the layers that make it and its columns in the layer that reads it depend on each other: they
go together or not at all. LLM-Pruner calls such a group coupled (Ma et al. 2023, arXiv:2305.11627). Under
grouped-query attention the unit is a key-value head with all query heads that share it. A channel of the
stream is made and read in every block.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightlib.change import remember
from lightlib.compact import CompactLinear
from lightlib.decoder import (
    MLP_SIZES,
    Roles,
    check_linears,
    check_table,
    find_blocks,
    head_dim,
    linear_shapes,
    roles,
    set_head_counts,
    stream_norms,
)
from lightlib.report import LayerReport

KINDS = ("heads", "neurons")  # of a block
WHOLE = ""  # the name of the model itself, the place of units that reach into every block
RESTRUCTURE = "lightlib.units:restructure"

Kept = dict[str, dict[str, Tensor]]  # {block or WHOLE: {kind: the units (kept) that stay, rising}}


@dataclass(frozen=True)
class Member:
    """A layer's share in the units of one kind: rows that make them (dim 0), or columns that read them (1).

    index (units, size): which rows or columns belong to each. An embedding makes channels by its columns.
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


def channel_members(model: nn.Module) -> list[Member]:
    """All that makes and reads the channels of the stream, but for its norms; the head comes last.

    A head that shares the embedding's weight is not named beside it. Raises ValueError where no channel can
    go alone: a LayerNorm takes the mean of all, and the norms of a sliced model read directions.
    """
    check_table(model)
    names, found = roles(model), []
    norm, head = model.get_submodule(names.final_norm), model.get_output_embeddings()
    if isinstance(norm, nn.LayerNorm) or not hasattr(norm, "weight"):
        raise ValueError(
            f"{model.config.model_type}: its {type(norm).__name__} reads channels together, so none goes "
            "alone; slicegpt narrows the stream of such a model, or take heads and neurons"
        )
    for block in find_blocks(model):
        found += [(f"{block}.{linear}", 1) for linear in (*names.attention_in, *names.mlp_in)]
        found += [(f"{block}.{linear}", 0) for linear in (names.attention_out, names.mlp_out)]
    found.append((names.embedding, 1))
    if head.weight is not model.get_input_embeddings().weight:
        found.append(("lm_head", 1))
    channels = torch.arange(norm.weight.numel())[:, None]
    return [Member(name, dim, channels) for name, dim in found]


def parts_of(model: nn.Module, place: str) -> dict[str, list[Member]]:
    """{kind: members} of the units of a block, given its name, or of the whole model (WHOLE)."""
    if place == WHOLE:
        return {"channels": channel_members(model)}
    return members(model, model.get_submodule(place))


def layer_name(place: str, name: str) -> str:
    """A layer's name in the model, from that in its place."""
    return f"{place}.{name}" if place else name


def unit_counts(model: nn.Module) -> dict[str, dict[str, int]]:
    """{block: {kind: how many units it has}}."""
    return {
        name: {kind: len(parts[-1].index) for kind, parts in members(model, block).items()}
        for name, block in find_blocks(model).items()
    }


def unit_weights(model: nn.Module, place: str) -> dict[str, int]:
    """{kind: weights and biases that go with one unit} of a block, given its name, or of the WHOLE model."""
    found = {}
    for kind, parts in parts_of(model, place).items():
        layers = [(dense_part(model, layer_name(place, m.linear)), m) for m in parts]
        found[kind] = sum(
            m.index.shape[1] * (part.weight.shape[1 - m.dim] + (m.dim == 0 and part.bias is not None))
            for part, m in layers
        )
    if place == WHOLE:
        found["channels"] += len(stream_norms(model))
    return found


@torch.no_grad()
def scale_units(model: nn.Module, values: dict[str, dict[str, Tensor]]) -> nn.Module:
    """Multiply what leaves each unit by its value: {block: {kind: (units)}}; 0 masks it. In place."""
    for name, kinds in values.items():
        parts = members(model, model.get_submodule(name))
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
    check_linears(model, whole=True)
    rows = []
    for name, old, new, units in cut_units(model, kept):
        gone = 1 - new.weight.double().norm() ** 2 / old.weight.double().norm() ** 2
        before, after = (sum(8 * p.nbytes for p in part.parameters()) for part in (old, new))
        shape, error = tuple(new.weight.shape), gone.clamp_min(0).sqrt().item()
        notes = f"{units}; error of the weights alone"
        rows.append(LayerReport(method, name, shape, before, after, error, notes))
    describe(model)
    return rows


def cut_units(model: nn.Module, kept: Kept) -> Iterator[tuple[str, nn.Module, nn.Module, str]]:
    """Cut each layer to the units that stay: its name, what it was, what it is, and what stayed."""
    for place, kinds in kept.items():
        parts = parts_of(model, place)
        for kind, index in kinds.items():
            count = len(parts[kind][-1].index)
            if not len(index):
                raise ValueError(f"{place or 'the stream'}: none of its {count} {kind} would stay; keep one")
            if len(index) == count:
                continue
            tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
            for member in parts[kind]:
                name = layer_name(place, member.linear)
                old = dense_part(model, name)
                new = cut(old, member.dim, member.index[index.cpu()].flatten().sort().values)
                model.set_submodule(name, new)
                yield name, old, new, f"{len(index)} of {count} {kind}"
            if kind == "heads":
                set_head_counts(model, model.get_submodule(place), len(index))
            elif kind == "channels":
                narrow_stream(model, index, count, tied)


def cut(old: nn.Linear | nn.Embedding, dim: int, index: Tensor) -> nn.Linear | nn.Embedding:
    """A layer with these rows (dim 0) or columns (dim 1) of `old`, which stays as it is."""
    new = copy.copy(old)
    new._parameters = dict(old._parameters)
    index = index.to(old.weight.device)
    new.weight = nn.Parameter(old.weight.index_select(dim, index), old.weight.requires_grad)
    if isinstance(new, nn.Embedding):
        new._buffers, new.embedding_dim = dict(old._buffers), len(index)
        return new
    if dim == 0 and old.bias is not None:
        new.bias = nn.Parameter(old.bias[index], old.bias.requires_grad)
    new.out_features, new.in_features = new.weight.shape
    return new


def narrow_stream(model: nn.Module, index: Tensor, width: int, tied: bool) -> None:
    """Fit norms, head and config to the channels (index) that stay of `width`; layers are cut. In place.

    An RMSNorm divides by the number of channels that are left. The stream shrinks with the root of it and the
    norms' weights grow, so that each norm gives what it gave with the others at zero, its eps included.
    """
    names, shrink = roles(model), (len(index) / width) ** 0.5
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for name in stream_norms(model):
        norm, grow = model.get_submodule(name), 1 / shrink
        if name == names.final_norm and tied and not hasattr(embedding, "embed_scale"):
            grow /= shrink  # the head shrinks with the embedding
        if name.rpartition(".")[2] in (names.attention_post, names.mlp_post):
            grow = 1.0  # it reads what shrank, and what it gives is to shrink
        kept = norm.weight[index.to(norm.weight.device)].double()
        scaled = (kept + names.norm_offset) * grow - names.norm_offset
        norm.weight = nn.Parameter(scaled.to(norm.weight), norm.weight.requires_grad)
    writers = [f"{b}.{part}" for b in find_blocks(model) for part in (names.attention_out, names.mlp_out)]
    if hasattr(embedding, "embed_scale"):  # the root of the width, which plain transformers gives it too
        embedding.scalar_embed_scale = len(index) ** 0.5
        embedding.embed_scale = torch.full_like(embedding.embed_scale, embedding.scalar_embed_scale)
    else:
        writers.append(names.embedding)
    for name in writers:
        part = model.get_submodule(name)
        for key, value in list(part.named_parameters(recurse=False)):
            setattr(part, key, nn.Parameter(value * shrink, value.requires_grad))
    if tied:
        head.weight = embedding.weight
        head.in_features = len(index)
    size = head_dim(model)
    model.config.hidden_size, model.config.head_dim = len(index), size


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
        remember(model, RESTRUCTURE, sizes)


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
