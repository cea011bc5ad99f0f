"""Linear layers whose weights are tensor networks: inputs pass the factors, the dense weight is not built."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from lightlib.compact import CompactLinear
from lightlib.lowrank.tt_matrix import TTMatrix, core_sizes
from lightlib.lowrank.work import DENSE, Work, cheapest, contraction_flops


class FactoredLinear(CompactLinear):
    """y = x W^T + b with W (out, in), seen as a tensor of out_shape and in_shape, held in factors.

    The factors are parameters: gradients reach them, and a cast of the model casts them. A call takes the
    order that costs the fewest FLOPs for its tokens, which may be to decode W and multiply by it.
    """

    def __init__(
        self,
        out_shape: Sequence[int],
        in_shape: Sequence[int],
        factors: Mapping[str, Tensor | None],
        bias: Tensor | None,
    ):
        super().__init__(math.prod(in_shape), math.prod(out_shape), bias)
        self.out_shape, self.in_shape = tuple(out_shape), tuple(in_shape)
        for name, factor in factors.items():
            kept = None if factor is None else nn.Parameter(factor.detach().contiguous(), requires_grad=False)
            self.register_parameter(name, kept)

    @cached_property
    def flops(self) -> dict[str, Work]:
        """{order of a product: what it costs}."""
        raise NotImplementedError

    def contract(self, x: Tensor, order: str) -> Tensor:
        """x W^T (..., out) in this order, which is not the dense one."""
        raise NotImplementedError

    def flops_for(self, tokens: int) -> int:
        return self.flops[cheapest(self.flops, tokens)].of(tokens)

    def fast_path(self, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
        if cheapest(self.flops, tokens=1) == DENSE:
            return "", "even for one token, decoding the weight takes less FLOPs than to pass its factors"
        factors = len(list(self.parameters())) - (self.bias is not None)
        return f"contraction of {factors} {self.called}", ""

    def forward(self, x: Tensor) -> Tensor:
        order = cheapest(self.flops, max(1, x.numel() // self.in_features))
        if order == DENSE:
            return super().forward(x)
        y = self.contract(x, order)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class TTLinear(FactoredLinear):
    """W as a train of cores (r, out_k, in_k, r'), `core0`, `core1`, ..."""

    called = "cores"

    def __init__(self, matrix: TTMatrix, bias: Tensor | None = None):
        cores = {f"core{k}": core for k, core in enumerate(matrix.cores)}
        super().__init__(matrix.out_shape, matrix.in_shape, cores, bias)
        self.ranks = matrix.ranks

    def matrix(self, dtype: torch.dtype) -> TTMatrix:
        """The train, in this dtype."""
        return TTMatrix(tuple(getattr(self, f"core{k}").to(dtype) for k in range(len(self.in_shape))))

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.matrix(at_least_float32(self.core0)).to_matrix().to(dtype)

    @cached_property
    def flops(self) -> dict[str, Work]:
        return contraction_flops(self.out_shape, self.in_shape, self.ranks)

    def contract(self, x: Tensor, order: str) -> Tensor:
        return self.matrix(x.dtype).times(x, order)

    def settings(self) -> dict:
        return {"out_shape": list(self.out_shape), "in_shape": list(self.in_shape), "ranks": list(self.ranks)}

    @classmethod
    def empty(cls, in_features, out_features, bias=None, *, out_shape, in_shape, ranks) -> TTLinear:
        sizes = core_sizes(out_shape, in_shape, ranks)
        return cls(TTMatrix(tuple(torch.zeros(size) for size in sizes)), bias)


def at_least_float32(factor: Tensor) -> torch.dtype:
    """The dtype in which to build W from factors of this one: rounding sums up on the way."""
    return torch.promote_types(factor.dtype, torch.float32)
