"""SharedLinear: a linear layer of which every block has a small core of its own, and all share the rest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightlib.compact import weight_of


class SharedLinear(nn.Module):
    """y = expand(core(reduce(x))) + b: `reduce` (r_in, in) and `expand` (out, r_out) are the same modules in
    all of `blocks` blocks, `core` (r_out, r_in) and the bias are this one's.

    All three are nn.Linear, or nn.Identity where a side stays whole; one that is rounded or pruned in one
    block is no longer shared with the others.
    """

    def __init__(self, reduce: nn.Module, core: nn.Linear, expand: nn.Module, bias: bool, blocks: int):
        super().__init__()
        self.in_features = getattr(reduce, "in_features", core.in_features)
        self.out_features = getattr(expand, "out_features", core.out_features)
        self.reduce, self.core, self.expand, self.blocks = reduce, core, expand, blocks
        empty = torch.empty(self.out_features) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)

    @property
    def stages(self) -> list[tuple[str, ...]]:
        """Its linears in the order they run."""
        names = ("reduce", "core", "expand")
        return [(name,) for name in names if not isinstance(getattr(self, name), nn.Identity)]

    @property
    def ranks(self) -> tuple[int | None, int | None]:
        """(r_out, r_in); None where a side is whole."""
        return getattr(self.expand, "in_features", None), getattr(self.reduce, "out_features", None)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W (out, in)."""
        W, *others = (weight_of(getattr(self, name)) for (name,) in self.stages)
        for weight in others:
            W = weight @ W
        return W.to(dtype)

    def stored_bits(self) -> int:
        """Bits of its core in a file, and its share, rounded down, of what all blocks share."""
        shared = sum(8 * t.nbytes for part in (self.reduce, self.expand) for t in part.parameters())
        return sum(8 * t.nbytes for t in self.core.parameters()) + shared // self.blocks

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.core(self.reduce(x)))
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, blocks={self.blocks}"


# what a model of such layers is when it is loaded
SHARE = "lightlib.shared_linear:share_linears"


def share_linears(
    model: nn.Module, layers: dict[str, list[str]], ranks: dict[str, list[int | None]]
) -> nn.Module:
    """Put layers that share in place of nn.Linear, with weights still to be filled. In place.

    layers: {a name for the group: the layers in it}; ranks: {group: [r_out, r_in]}, None for a whole side.
    """
    for group, names in layers.items():
        for name, new in zip(
            names, sharing([model.get_submodule(n) for n in names], *ranks[group]), strict=True
        ):
            model.set_submodule(name, new)
    return model


def sharing(linears: list[nn.Linear], rank_out: int | None, rank_in: int | None) -> list[SharedLinear]:
    """A layer for each of `linears`, all of them sharing; weights are still to be filled."""
    n_out, n_in = linears[0].out_features, linears[0].in_features
    reduce = nn.Linear(n_in, rank_in, bias=False) if rank_in else nn.Identity()
    expand = nn.Linear(rank_out, n_out, bias=False) if rank_out else nn.Identity()
    cores = [nn.Linear(rank_in or n_in, rank_out or n_out, bias=False) for _ in linears]
    pairs = zip(cores, linears, strict=True)
    return [SharedLinear(reduce, core, expand, old.bias is not None, len(linears)) for core, old in pairs]
