"""GPTQ: round one column at a time and let the columns still to come absorb the error.

Frantar et al. 2022, arXiv:2210.17323.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd

import torch
from torch import Tensor, nn

from lightlib.calibration import Gram, stream_blocks
from lightlib.change import changing
from lightlib.machine import one_thread
from lightlib.quantization.grid import Grid, Int, QuantizedWeight, grid_for
from lightlib.quantization.linear import QuantLinear
from lightlib.report import Compressed, Report
from lightlib.second_order import inverse_factor


def gptq_weight(
    weight: Tensor,
    gram: Tensor,
    grid: Grid,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    block_size: int = 32,
    mask: Tensor | None = None,
    name: str = "weight",
) -> QuantizedWeight:
    """`weight` (out, in) on `grid`, such that ||(W - W')X|| is small for inputs with `gram` X^T X (in, in).

    act_order: begin with the columns whose inputs are largest. static_groups: they keep the groups they lie
    in, with scales fitted before the first column moves; without it, groups follow the new order, and the
    result stores that order. mask (out, in): weights that are and stay zero; the others make up for them too.
    With an identity gram this is plain rounding, bit for bit.
    """
    n_in = weight.shape[1]
    group = n_in // grid.groups(n_in, name)
    natural = torch.arange(n_in, device=gram.device)
    order = gram.diagonal().argsort(descending=True, stable=True) if act_order else natural
    U = inverse_factor(gram[order][:, order], damping, name)  # (in, in), upper triangular
    W = weight.detach().float()[:, order].T.contiguous()  # (in, out): a column of the weight is a row here

    # one scale a row serves all columns, so it can be fitted at the start, and columns can go back home
    fixed = static_groups or grid.per_tensor or group == n_in
    scale, zero = grid.fit(weight.detach()) if fixed else weight.new_zeros(2, len(weight), n_in // group)
    fitted = list(zip(scale.T.contiguous(), zero.T.contiguous(), strict=True))
    group_of = (order // group * (not grid.per_tensor)).tolist()
    stays = torch.ones_like(W) if mask is None else mask[:, order].T.to(W.dtype)  # (in, out)
    codes = torch.empty(n_in, len(weight), dtype=torch.uint8, device=weight.device)
    if not fixed:
        # a group begins with a block, so that it is up to date when it is fitted
        block_size = gcd(group, block_size) if group > block_size else group * (block_size // group)

    pivots = U.diagonal().tolist()
    with one_thread():
        for begin in range(0, n_in, block_size):
            end = min(begin + block_size, n_in)
            errors = torch.empty(end - begin, len(weight), device=weight.device)
            for j in range(begin, end):
                if fixed:
                    s, z = fitted[group_of[j]]
                elif j % group == 0:
                    s, z = grid.fit_groups((W[j : j + group] * stays[j : j + group]).T)
                    scale[:, j // group], zero[:, j // group] = s, z
                column, error = W[j], errors[j - begin]
                code = grid.nearest(column * stays[j], s, z)
                codes[j] = code
                torch.sub(column, grid.value(code, s, z), out=error).div_(pivots[j])
                W[j + 1 : end].addr_(U[j, j + 1 : end], error, alpha=-1)
            W[end:] -= U[begin:end, end:].T @ errors  # later blocks hear of it once a block

    if fixed:
        light = QuantizedWeight(grid, codes[order.argsort()].T.contiguous(), scale, zero)
    else:
        light = QuantizedWeight(grid, codes.T.contiguous(), scale, zero, order if act_order else None)
    return light.within(mask, name)


def gptq(
    model: nn.Module,
    batches: list[Tensor],
    *,
    grid: Grid | Mapping[str, Grid] = Int(4, group_size=64),
    damping: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    true_sequential: bool = False,
    device=None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """GPTQ on the blocks' linear layers; embedding and head stay dense, and pruned layers keep their zeros.

    true_sequential: each layer is fitted to inputs that come through the rounded layers before it in its
    block, not only through the rounded blocks. damping: part of the gram's mean diagonal that is added to it.
    act_order with static_groups costs no byte and helps most where a few inputs are far larger than the rest.
    Raises ValueError without batches, and where a group size does not divide a layer's inputs.
    """
    if not batches:
        raise ValueError("gptq needs batches to see the layers' inputs; rtn rounds without them")
    with changing(model, inplace) as light:
        rows = []
        for block in stream_blocks(light, batches, device=device, progress=progress, title="gptq"):
            masks = block.open()
            everything = [tuple(name for stage in block.stages for name in stage)]
            for names in block.stages if true_sequential else everything:
                names = [name for name in names if isinstance(block.linears[name], nn.Linear)]
                grams = block.collect(Gram, of=names)
                for name in names:
                    linear, gram, whole = block.linears[name], grams[name].value, f"{block.name}.{name}"
                    weight = gptq_weight(
                        linear.weight, gram, grid_for(grid, whole), damping=damping, act_order=act_order,
                        static_groups=static_groups, mask=masks.get(name), name=whole,
                    )  # fmt: skip
                    block.replace("gptq", name, QuantLinear(weight, linear.bias), gram)
                block.settle(names)
            rows += block.rows
    return Compressed(light, Report(tuple(rows)))
