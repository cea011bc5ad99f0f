"""The blocks' linear layers as tensor networks: trains, Tucker, CP. They need no data."""

from __future__ import annotations

from torch import Tensor, nn

from lightlib.calibration import Block
from lightlib.lowrank.cp import als
from lightlib.lowrank.multilinear import factor, joined
from lightlib.lowrank.tensor_layers import FactoredLinear, TTLinear
from lightlib.lowrank.tensor_walk import head_modes, head_width, replaced, sliced
from lightlib.lowrank.tt_matrix import rank_for, tt_matrix
from lightlib.lowrank.tucker import hooi
from lightlib.lowrank.tucker_layers import CPLinear, TuckerLinear
from lightlib.lowrank.tucker_ranks import ranks_by_energy, tails
from lightlib.report import Compressed


def tensor_train(
    model: nn.Module,
    batches: list[Tensor] | None = None,
    *,
    fraction: float = 0.2,
    order: int = 3,
    device=None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """Each linear layer of the blocks as a train of `order` cores, with at most 1 - fraction of its numbers.

    All bonds of a layer have one rank, or less where they need no more. Needs no data; with `batches` the
    report's errors are those of the layers' outputs. Raises ValueError where a layer cannot be that small.
    """

    def make(block: Block, name: str, linear: nn.Linear, stored: int) -> FactoredLinear:
        shapes = factor(linear.out_features, order), factor(linear.in_features, order)
        rank = rank_for(*shapes, stored, f"{block.name}.{name}")
        return TTLinear(tt_matrix(linear.weight.detach(), *shapes, rank), linear.bias)

    return replaced("tensor_train", model, batches, make, fraction, device, progress, inplace)


def tucker(
    model: nn.Module,
    batches: list[Tensor] | None = None,
    *,
    fraction: float = 0.2,
    heads: bool = True,
    order: int = 1,
    sweeps: int = 3,
    device=None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """Each linear layer of the blocks as core and factors, with at most 1 - fraction of its numbers.

    heads: the attention's layers are seen as (heads, head_dim, in) or (out, heads, head_dim), and heads stay
    whole. order: into how many modes the outputs and the inputs of all other layers are split; in 1, it is
    their SVD. Ranks are those that lose least by HOSVD's bound; a mode may come out whole. sweeps: of HOOI,
    after HOSVD. Needs no data; with `batches` the report's errors are those of
    the layers' outputs. Raises ValueError where a layer cannot be that small.
    """
    size = head_width(model, heads)

    def make(block: Block, name: str, linear: nn.Linear, stored: int) -> FactoredLinear:
        found = head_modes(block, name, linear, size)
        if found:
            whole = [0] if name in block.roles.attention_in else [1]
        else:
            found = factor(linear.out_features, order), factor(linear.in_features, order)
            whole = [0] if order == 1 else []
        out_shape, in_shape = found
        tensor = linear.weight.detach().view(*out_shape, *in_shape)
        ranks = ranks_by_energy(tensor.shape, tails(tensor, whole), stored, f"{block.name}.{name}")
        return TuckerLinear(hooi(tensor, ranks, sweeps), len(out_shape), linear.bias)

    return replaced("tucker", model, batches, make, fraction, device, progress, inplace)


def cp(
    model: nn.Module,
    batches: list[Tensor] | None = None,
    *,
    fraction: float = 0.2,
    heads: bool = True,
    slices: int = 8,
    sweeps: int = 10,
    seed: int = 0,
    device=None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """Each linear layer of the blocks as a sum of outer products, with at most 1 - fraction of its numbers.

    A weight has three modes, as if cut into slices W_s = A diag(c_s) B^T that share A and B. heads: those of
    the attention's layers are the heads; all other layers are cut along their longer side, into as near to
    `slices` parts as divide it. sweeps, seed: of the alternating least squares and its start.
    Needs no data; with `batches` the report's errors are those of the layers' outputs. Raises ValueError
    where a layer cannot be that small.
    """
    size = head_width(model, heads)

    def make(block: Block, name: str, linear: nn.Linear, stored: int) -> FactoredLinear:
        out_shape, in_shape = head_modes(block, name, linear, size) or sliced(linear, slices)
        shape = (*out_shape, *in_shape)
        rank = stored // sum(shape)
        if not rank:
            raise ValueError(
                f"{block.name}.{name}: {joined(shape)} takes {sum(shape)} numbers at rank 1, {stored} may be "
                "stored; allow more of them"
            )
        tensor = linear.weight.detach().view(shape)
        return CPLinear(als(tensor, rank, sweeps, seed=seed), len(out_shape), linear.bias)

    return replaced("cp", model, batches, make, fraction, device, progress, inplace)
