"""What the loss loses with a weight, from its gradients: Taylor's series, cut after one term or two.

LeCun et al. 1989 (Optimal Brain Damage); Molchanov et al. 2019, arXiv:1906.10771. The diagonal of the Fisher
information, the mean of squared gradients, stands for the curvature.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from lightlib.decoder import linear_shapes
from lightlib.machine import matmul_rate
from lightlib.quality import LOGITS_AT_ONCE, device_of
from lightlib.units import Member

WEIGHT_SCORES = ("first", "second", "mixed", "vector", "magnitude")
AGGREGATES = ("sum", "max", "product", "last")


def weight_importance(W: Tensor, g: Tensor | None, g2: Tensor | None, kind: str) -> Tensor:
    """How much the loss moves when one weight of W (out, in) becomes zero: (out, in), float32.

    g: gradient of the mean loss; g2: mean of the squared gradients of the samples. "first" |w g|, exact for a
    loss linear in w; "second" |w g2 w|; "mixed" |w g - w g2 w / 2|, exact for a parabola whose curvature is
    g2; "vector" w g with its sign, for sums in which weights may cancel; "magnitude" w^2, without gradients.
    """
    W = W.detach().float()
    if kind == "magnitude":
        return W.square()
    if kind == "second":
        return W.square() * g2
    if kind == "mixed":
        return (W * g - 0.5 * W.square() * g2).abs()
    return W * g if kind == "vector" else (W * g).abs()


def sum_of_units(scores: Tensor, member: Member) -> Tensor:
    """The scores (out, in) of one linear summed over the rows or columns of each unit: (units), float64."""
    lines = scores.sum(1 - member.dim, dtype=torch.float64).cpu()  # (out) or (in)
    return lines[member.index].sum(1).abs()


def aggregate_members(sums: Tensor, how: str) -> Tensor:
    """One score a unit (units) of what its linears have (members, units); the reader is the last of them."""
    if how == "max":
        return sums.amax(0)
    if how == "product":
        return sums.prod(0)
    return sums.sum(0) if how == "sum" else sums[-1]


def gradients(
    model: nn.Module,
    names: list[str],
    batches: list[Tensor],
    *,
    squares: bool = False,
    progress: bool = True,
    title: str = "gradients",
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """{linear: (gradient (out, in), mean square (out, in) of the samples' gradients, or None)}, float32.

    The loss is that of the next token, its mean over a sample; a sample is a row of a batch. Where squares
    are asked for, one runs at a time. The model keeps its flags and gets no .grad. Raises ValueError for a
    gradient that is not finite.
    """
    parts = [part for ids in batches for part in ids.split(1 if squares else at_once(model, ids))]
    rows = sum(map(len, parts))
    given = {name: weight.detach() for name, weight in model.named_parameters()}
    wanted = [given[f"{name}.weight"].requires_grad_() for name in names]
    g = [torch.zeros_like(W, dtype=torch.float32, requires_grad=False) for W in wanted]
    g2 = [torch.zeros_like(found) for found in g] if squares else []
    device = device_of(model)
    if progress:
        title = f"{title}, {forecast(model, wanted, parts, squares, device)}"
    with evaluating(model), torch.enable_grad(), tqdm(total=rows, desc=title, disable=not progress) as bar:
        for part in parts:
            for i, gradient in enumerate(torch.autograd.grad(loss_of(model, given, part.to(device)), wanted)):
                g[i].add_(gradient, alpha=len(part) / rows)
                if squares:
                    g2[i].add_(gradient.float().square(), alpha=1 / rows)
            bar.update(len(part))
    for name, W, found in zip(names, wanted, g, strict=True):
        if not found.isfinite().all():
            raise ValueError(f"{name}: its gradient in {W.dtype} is not finite; take the model to float32")
    return dict(zip(names, zip(g, g2 or [None] * len(g), strict=True), strict=True))


def at_once(model: nn.Module, ids: Tensor) -> int:
    """How many rows of ids (batch, length) may run together, for their logits' sake."""
    return max(1, LOGITS_AT_ONCE // (ids.shape[1] * model.config.vocab_size))


def loss_of(model: nn.Module, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Mean loss of the next token in ids (batch, length), of the model with these weights."""
    logits = functional_call(model, weights, (ids,), {"use_cache": False}).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten().to(logits.device))


def forecast(model: nn.Module, wanted: list[Tensor], parts: list[Tensor], squares: bool, device) -> str:
    """What a pass forward and back for all rows will take: "about 0.31 GB beside the model and 12 s"."""
    held = sum(W.numel() * (4 * (1 + squares) + W.itemsize) for W in wanted)
    weights = sum(n_out * n_in for n_out, n_in in linear_shapes(model).values())
    tokens = sum(ids.numel() for ids in parts)
    seconds = 3 * 2 * weights * tokens / matmul_rate(str(device)) / 1e9
    return f"about {held / 1e9:.2g} GB beside the model and {max(seconds, 1):.0f} s"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While it lasts, nothing is dropped out; afterwards each module is in the mode in which it was."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
