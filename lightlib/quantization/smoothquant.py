"""SmoothQuant: move the difficulty of outliers from the inputs, where it is, to the weights, which bear it.

Xiao et al. 2022, arXiv:2211.10438.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightlib.calibration import AbsMax, Samples, output_error, stream_blocks, together
from lightlib.change import changing
from lightlib.folding import folds
from lightlib.quantization.int8_linear import Int8Linear
from lightlib.report import Compressed, Report

ALPHAS = tuple(step / 10 for step in range(1, 10))


def smoothing_scale(maxima: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    """s (in,) = max|x|^alpha / max|w|^(1 - alpha), which divides inputs and multiplies weights (out, in).

    At 1 all input channels end with equal maxima, at 0 all weight columns do.
    """
    columns = torch.stack([W.float().abs().amax(0) for W in weights]).amax(0)
    return (maxima.clamp_min(1e-5).pow(alpha) / columns.clamp_min(1e-5).pow(1 - alpha)).clamp_min(1e-5)


def best_alpha(
    maxima: Tensor,
    weights: list[Tensor],
    inputs: Tensor,
    rounded: Callable[[Tensor, Tensor], nn.Module],
    tie: Callable[[Tensor], Tensor] = lambda scale: scale,
) -> tuple[float, list[float]]:
    """(the alpha with the least error, the error at each of ALPHAS) of the outputs on `inputs` (tokens, in).

    rounded: builds the 8-bit layer from a smoothed weight and the maxima of its smoothed inputs.
    """
    errors = []
    for alpha in ALPHAS:
        scale = tie(smoothing_scale(maxima, weights, alpha))
        layers = [rounded(W.float() * scale, maxima / scale) for W in weights]
        errors.append(
            sum(
                output_error(W.float() * scale, None, layer, inputs / scale)
                for W, layer in zip(weights, layers, strict=True)
            )
        )
    return ALPHAS[errors.index(min(errors))], errors


def smoothquant(
    model: nn.Module,
    batches: list[Tensor] | None,
    *,
    alpha: float | str | None = 0.5,
    activations: str = "token",
    per_tensor: bool = False,
    everywhere: bool = False,
    device=None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """W8A8 on the blocks' linear layers, with inputs that come from a norm smoothed first.

    alpha: how much of the difficulty moves, 0 to 1; "search" takes the best of 0.1 to 0.9 for each norm;
    None leaves the inputs as they are, which is plain W8A8. activations: one scale a "token", for the
    "tensor" of each call, or a "static" one from the batches. per_tensor: one scale for a whole weight.
    everywhere: also smooth what the value and up projections make, where that is exact (folding.py); the
    paper smooths what norms make. Raises ValueError without batches where a scale or alpha depends on them.
    """
    if not batches and (alpha is not None or activations == "static"):
        raise ValueError("smoothquant needs batches to see the inputs' largest values")
    if alpha not in (None, "search") and not (isinstance(alpha, (int, float)) and 0 <= alpha <= 1):
        raise ValueError(f"alpha={alpha!r}: give a number from 0 to 1, 'search' or None")

    def rounded(weight: Tensor, maxima: Tensor | None, bias: Tensor | None = None) -> Int8Linear:
        scale = 1.0 if maxima is None else maxima.max().item() / 127
        return Int8Linear(weight, bias, activations=activations, per_tensor=per_tensor, static_scale=scale)

    with changing(model, inplace) as light:
        rows = []
        places = [fold for fold in folds(light) if alpha is not None and (everywhere or fold.rows is None)]
        for block in stream_blocks(light, batches, device=device, progress=progress, title="smoothquant"):
            parts = block.dense
            found = block.collect(together(AbsMax, Samples), of=tuple(parts))
            maxima, inputs = ({n: s.parts[i].value for n, s in found.items()} for i in range(2))
            notes = dict.fromkeys(parts, "not smoothed")
            for fold in places:
                if set(fold.readers) <= set(parts):
                    weights = [parts[name].weight for name in fold.readers]
                    first = fold.readers[0]
                    chosen = alpha
                    if alpha == "search":
                        chosen, _ = best_alpha(maxima[first], weights, inputs[first], rounded, fold.tie)
                    scale = fold.tie(smoothing_scale(maxima[first], weights, chosen))
                    fold.apply(block.module, scale)
                    maxima |= {name: maxima[name] / scale for name in fold.readers}
                    inputs |= {name: inputs[name] / scale for name in fold.readers}
                    notes |= dict.fromkeys(fold.readers, f"alpha {chosen:g}")
            for name, part in parts.items():
                new = rounded(part.weight, maxima.get(name), part.bias)
                block.replace("smoothquant", name, new, notes=notes[name], inputs=inputs.get(name))
            rows += block.rows
    return Compressed(light, Report(tuple(rows)))
