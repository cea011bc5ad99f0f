"""Tucker across depth: the layers of one role, one a block, are a stack whose slices share their two bases.

W_l = U C_l V^T with U and V for all blocks and a small C_l for each: Tucker with the layer mode whole, known
as Tucker-2 (Tucker 1966) and, for sets of matrices, as GLRAM (Ye 2005, Machine Learning 61, 167-191). Where
one side stays whole, W_l = C_l V^T: all blocks look at the same directions of their inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightlib.calibration import Gram, stream_blocks
from lightlib.change import changing, remember
from lightlib.decoder import check_linears, find_blocks, linears
from lightlib.lowrank.multilinear import joined
from lightlib.lowrank.tucker import Tucker, in_dtype
from lightlib.lowrank.tucker_ranks import ranks_by_energy, tails_of
from lightlib.report import Compressed, Report
from lightlib.shared_linear import SHARE, SharedLinear, sharing


def shared_tucker(
    weights: Sequence[Tensor], rank_out: int | None, rank_in: int | None, sweeps: int = 3
) -> Tucker:
    """The stack (L, out, in) of `weights`: core (L, rank_out, rank_in), U (out, rank_out), V (in, rank_in).

    None leaves a side whole, without a matrix. HOSVD, then sweeps of HOOI. The stack is not built: the gram
    of its unfolding is the sum of the slices'.
    """
    W = [weight.double() for weight in weights]
    U, V = directions(W, rank_out), directions([each.T for each in W], rank_in)
    for _ in range(sweeps if rank_out and rank_in else 0):
        U = directions([each @ V for each in W], rank_out)
        V = directions([each.T @ U for each in W], rank_in)
    slices = (each if U is None else U.T @ each for each in W)
    core = torch.stack([each if V is None else each @ V for each in slices])
    return in_dtype(core, (None, U, V), weights[0])


def directions(matrices: Sequence[Tensor], rank: int | None) -> Tensor | None:
    """Orthonormal columns (n, rank): the directions that hold most of all `matrices` (n, m) together."""
    return None if rank is None else torch.linalg.eigh(gram_of(matrices)).eigenvectors.flip(-1)[:, :rank]


def gram_of(matrices: Sequence[Tensor]) -> Tensor:
    """The gram (n, n) of `matrices` (n, m) side by side, in float64."""
    return sum(M.double() @ M.double().T for M in matrices)


def shared_ranks(
    weights: Sequence[Tensor], stored: int, name: str = "stack"
) -> tuple[int | None, int | None]:
    """(rank_out, rank_in) that lose least in at most `stored` numbers; None where a side had better be whole.

    Raises ValueError, which speaks of `name`, where not even ranks of 1 are few enough.
    """
    tails = [None, tails_of(gram_of(weights)), tails_of(gram_of([W.T for W in weights]))]
    _, rank_out, rank_in = ranks_by_energy((len(weights), *weights[0].shape), tails, stored, name)
    return rank_out, rank_in


def tucker_across_layers(
    model: nn.Module,
    batches: list[Tensor] | None = None,
    *,
    fraction: float = 0.2,
    sweeps: int = 3,
    device=None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """The same layer of all blocks (all queries, say) with shared bases and a core for each, for each layer.

    At most 1 - fraction of their numbers are stored; what is shared is stored once. Ranks are those that lose
    least by HOSVD's bound, often one side whole. A report's row counts a
    block's core and its share of the rest. Needs no data; with `batches` the report's errors are those of the
    layers' outputs. Raises ValueError where blocks differ in their sizes, or cannot be that small.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction}: give a number from 0 to below 1")
    with changing(model, inplace) as light:
        check_linears(light)
        groups = stacks(light)
        shared = {
            name: shared_layers(name, parts, fraction, sweeps, device)
            for name, parts in tqdm(groups.items(), desc="tucker_across_layers", disable=not progress)
        }
        rows = []
        for index, block in enumerate(stream_blocks(light, batches, device=device, progress=progress)):
            grams = block.collect(Gram, of=tuple(shared))
            for name, layers in shared.items():
                gram = grams[name].value if name in grams else None
                new = layers[index]
                block.replace("tucker_across_layers", name, new, gram, notes(new, gram is None))
            rows += block.rows
        describe(light, shared)
    return Compressed(light, Report(tuple(rows)))


def stacks(model: nn.Module) -> dict[str, list[nn.Linear]]:
    """{layer, by its name in a block: that of each block}. Raises ValueError where their sizes differ."""
    blocks = {name: linears(module) for name, module in find_blocks(model).items()}
    (first, expected), *_ = blocks.items()
    for block, parts in blocks.items():
        for name, part in {**expected, **parts}.items():
            sizes = [(p.out_features, p.in_features) for p in (expected.get(name), parts.get(name)) if p]
            if len(set(sizes)) != 1 or len(sizes) != 2:
                found = " and ".join(joined(size) for size in sizes)
                raise ValueError(
                    f"{block}.{name} is not of the size that {first} has ({found}): only blocks that are "
                    "alike can share; compress before they are cut to sizes of their own"
                )
            if not isinstance(part, nn.Linear):
                raise ValueError(
                    f"{block}.{name} is a {type(part).__name__}; share the layers before packing"
                )
    return {name: [parts[name] for parts in blocks.values()] for name in expected}


def shared_layers(
    name: str, parts: list[nn.Linear], fraction: float, sweeps: int, device
) -> list[SharedLinear]:
    """The layers that take the place of `parts`, one a block."""
    home = parts[0].weight.device
    weights = [part.weight.detach().to(device or home) for part in parts]
    ranks = shared_ranks(weights, int((1 - fraction) * weights[0].numel() * len(parts)), name)
    found = shared_tucker(weights, *ranks, sweeps)
    core, (_, U, V), new = found.core.to(home), found.factors, sharing(parts, *ranks)
    if V is not None:
        put(new[0].reduce, V.T.to(home))
    if U is not None:
        put(new[0].expand, U.to(home))
    for layer, C, part in zip(new, core, parts, strict=True):
        put(layer.core, C)
        layer.bias = None if part.bias is None else nn.Parameter(part.bias.clone(), requires_grad=False)
    return new


def put(linear: nn.Linear, weight: Tensor) -> None:
    """Give a layer its weight (out, in)."""
    linear.weight = nn.Parameter(weight.contiguous().clone(), requires_grad=False)


def describe(model: nn.Module, shared: dict[str, list[SharedLinear]]) -> None:
    """Say in the model's structure what is shared, for `load`."""
    blocks = list(find_blocks(model))
    settings = {
        "layers": {name: [f"{block}.{name}" for block in blocks] for name in shared},
        "ranks": {name: list(layers[0].ranks) for name, layers in shared.items()},
    }
    remember(model, SHARE, settings)


def notes(layer: SharedLinear, weights_alone: bool) -> str:
    """How many blocks share the layer's bases, and their ranks."""
    n_out, n_in = layer.out_features, layer.in_features
    ranks = ", ".join("whole" if r is None else str(r) for r in layer.ranks)
    alone = "; error of the weights alone" if weights_alone else ""
    return f"{layer.blocks} x {n_out} x {n_in}, rank whole, {ranks}{alone}"
