"""GPTQ stepper: a small block of real weights, rounded column by column, with where each error goes."""

from __future__ import annotations

import functools

import ipywidgets as W
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from lightlib.machine import one_thread
from lightlib.quantization.grid import Int
from lightlib.second_order import inverse_factor
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.style import BLACK, BLUE, HEAT, VERMILION, panels

ROWS, COLUMNS = 8, 16
DAMPINGS = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)


def mixed(gram: Tensor, correlation: float) -> Tensor:
    """`gram` (in, in) with only a share of what its inputs have in common: 0 leaves its diagonal."""
    return gram * correlation + gram.diagonal().diag() * (1 - correlation)


def steps(weight: Tensor, gram: Tensor, grid: Int, damping: float = 0.01, act_order: bool = False) -> dict:
    """GPTQ on `weight` (out, in), one scale a row, with its state after 0, 1, ... columns.

    Columns stand in the order they are rounded. states: (in + 1, out, in), the last one being what
    `gptq_weight` gives; pushes: what column j adds to those after it; gptq, rtn: ||(W - W_k)X|| / ||WX||.
    """
    n_in = weight.shape[1]
    order = gram.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(n_in)
    scale, zero = (part[:, 0] for part in grid.fit(weight))
    W, H = weight[:, order].clone(), gram[order][:, order]
    U = inverse_factor(H, damping)
    states, pushes = [W.clone()], []
    for j in range(n_in):
        rounded = grid.value(grid.nearest(W[:, j], scale, zero), scale, zero)
        push = -torch.outer((W[:, j] - rounded) / U[j, j], U[j])  # (out, in); U[j] is 0 left of column j
        push[:, j] = 0
        W = W + push
        W[:, j] = rounded
        states.append(W.clone())
        pushes.append(push)
    plain, nearest = states[0], grid.rounded(weight)[:, order]
    k = torch.arange(n_in + 1)[:, None, None]
    by_rtn = torch.where(torch.arange(n_in) < k, nearest, plain)  # (in + 1, out, in)
    return {
        "order": order.tolist(),
        "states": torch.stack(states),
        "pushes": torch.stack(pushes),
        "gptq": lost(plain, torch.stack(states), H).tolist(),
        "rtn": lost(plain, by_rtn, H).tolist(),
    }


def lost(weight: Tensor, others: Tensor, gram: Tensor) -> Tensor:
    """||(W - W')X|| / ||WX|| for each W' (k, out, in)."""
    gone = weight - others
    return ((gone @ gram * gone).sum((1, 2)).clamp_min(0) / (weight @ gram * weight).sum()).sqrt()


def draw(fig: Figure, result: dict) -> None:
    """The block as it is now; what the last column handed on; the output's error so far."""
    left, middle, right = panels(fig, (1.1, 1.1, 1), (0.4, 0.35, 0.75), right=0.2, top=0.62, bottom=0.6)
    block, pushed, k = result["state"], result["push"], result["columns"][0]
    n_out, n_in = block.shape
    reach, most = result["reach"][0], max(abs(pushed).max(), 1e-9)
    left.imshow(block, cmap=HEAT, vmin=-reach, vmax=reach, aspect="auto", interpolation="nearest")
    left.add_patch(Rectangle((-0.5, -0.5), k, n_out, fill=False, ec=BLACK, lw=3, clip_on=False))
    left.set_title(
        f"weights ({-reach:.2g} dark, {reach:.2g} bright)\nin the frame they lie on the grid", fontsize=10
    )
    left.set_ylabel("output")
    middle.imshow(pushed, cmap="PuOr", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
    middle.add_patch(Rectangle((-0.5, -0.5), k, n_out, fill=False, ec=BLACK, lw=3, clip_on=False))
    said = f"(orange {-most:.2g}, violet {most:.2g})" if pushed.any() else "(nothing)"
    middle.set_title(f"what the last column handed on\n{said}", fontsize=10)
    for ax in (left, middle):
        ax.set(xticks=range(0, n_in, 3), yticks=[], xlabel="input, in the order of rounding")
        ax.set_xticklabels([str(i) for i in result["order"][::3]])
    for name, color in (("rtn", VERMILION), ("gptq", BLUE)):
        curve = [100 * e for e in result[f"{name}_curve"]]
        right.plot(range(n_in + 1), curve, color=color, lw=1, alpha=0.5)
        right.plot(range(k + 1), curve[: k + 1], color=color, lw=2.5)
        right.plot(k, curve[k], "o", color=color)
    right.set(xlabel="columns rounded", ylabel="error of the output (%)", xlim=(0, n_in))
    right.set(xticks=range(0, n_in + 1, 4), ylim=(0, 105 * max(*result["rtn_curve"], *result["gptq_curve"])))
    right.set_title("nearest", color=VERMILION)
    right.set_title("GPTQ", color=BLUE, loc="right")


def gptq_stepper(weight: Tensor, gram: Tensor, **options) -> Explorer:
    """Step through `gptq_weight` on the first 8 x 16 of `weight` (out, in); `gram` (in, in): its inputs'.

    >>> gptq_stepper(weight, gram).set(columns=16, correlation=0.0).result["times_better"]
    1.0
    """
    if gram.shape != (weight.shape[1],) * 2:
        raise ValueError(f"the gram of {weight.shape[1]} inputs is square, not {tuple(gram.shape)}")
    if weight.shape[0] < ROWS or weight.shape[1] < COLUMNS:
        raise ValueError(f"give a weight of at least {ROWS} x {COLUMNS}, not {tuple(weight.shape)}")
    block = weight[:ROWS, :COLUMNS].detach().float().cpu()
    inputs = gram[:COLUMNS, :COLUMNS].float().cpu()

    @functools.lru_cache(maxsize=256)
    def walk(bits, correlation, damping, act_order):
        with one_thread():
            return steps(block, mixed(inputs, correlation), Int(bits), damping, act_order)

    def compute(columns, **knobs):
        found = walk(**knobs)
        push = found["pushes"][columns - 1] if columns else torch.zeros_like(block)
        at_the_end = found["rtn"][-1], found["gptq"][-1]
        return {
            "rtn_error": found["rtn"][columns],
            "gptq_error": found["gptq"][columns],
            "rtn_error_at_the_end": at_the_end[0],
            "gptq_error_at_the_end": at_the_end[1],
            "times_better": at_the_end[0] / max(at_the_end[1], 1e-12),
            "columns": [columns],
            "order": found["order"],
            "state": found["states"][columns].numpy(),
            "push": push.numpy(),
            "reach": [block.abs().max().item()],
            "rtn_curve": found["rtn"],
            "gptq_curve": found["gptq"],
        }

    return Explorer(
        compute, draw, name="gptq_stepper", size=(8.6, 3.3), **options,
        columns=W.IntSlider(5, 0, COLUMNS, description="columns rounded"), bits=W.IntSlider(3, 2, 8),
        correlation=W.FloatSlider(1.0, min=0.0, max=1.0, step=0.1),
        damping=W.SelectionSlider(options=DAMPINGS, value=0.01),
        act_order=W.Checkbox(False, description="act order"),
    )  # fmt: skip
