"""What stays makes up for what goes: values for the masks of kept units, block by block, by least squares.

The third step of Kwon et al. 2022, arXiv:2204.09656. The values go into the weights that read the units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightlib.calibration import Block, stream_blocks
from lightlib.decoder import roles
from lightlib.units import Kept, Member, members, scale_units

LARGEST = 10.0  # a mask beyond it says that the fit is not to be trusted
ENOUGH = 1e-12  # of the diagonal: keeps directions without any input from becoming infinite


@dataclass(frozen=True)
class Tuned:
    """Mask values (kept) of a layer, and ||Y - Y'|| / ||Y|| of its output with masks of 1 and with these.

    given_up: a value was beyond 10, so all are 1.
    """

    values: Tensor
    before: float
    after: float
    given_up: bool = False


def tuned(
    weight: Tensor,
    index: Tensor,
    gram: Tensor,
    cross: Tensor,
    kept: Tensor,
    *,
    whole: float,
    damp: float = 1.0,
) -> Tuned:
    """Masks m of the kept units that bring X diag(m) W^T nearest to the targets Y (tokens, out).

    weight W (out, in): of the layer that reads the units. index (units, size): columns of each unit. gram
    X^T X (in, in) and cross X^T Y (in, out): of the inputs X as they now are; whole |Y|^2, for the errors.
    kept: indices of units. damp: weighs |m - 1|^2, with the mean over units of |their own output|^2 as unit.
    Where Y is what the kept units give with masks of 1, they stay 1.
    """
    (k, size), columns = index[kept].shape, index[kept].flatten().to(weight.device)
    W = weight.double()[:, columns]
    products = gram.double()[columns][:, columns] * (W.T @ W)  # of what two columns give, over all tokens
    normal = products.view(k, size, k, size).sum((1, 3))
    right = (cross.double()[columns] * W.T).sum(1).view(k, size).sum(1)
    scale = normal.diagonal().mean().clamp_min(1e-300)
    damping = (damp + ENOUGH) * scale * torch.eye(k, dtype=torch.float64, device=weight.device)
    m = 1 + torch.linalg.solve(normal + damping, right - normal.sum(1))
    ones = torch.ones_like(m)
    given_up = not bool(m.abs().max() <= LARGEST)
    values = ones if given_up else m

    def error(m: Tensor) -> float:
        gone = (m @ normal @ m - 2 * m @ right).item() + whole
        return math.sqrt(max(gone, 0.0) / max(whole, 1e-300))

    return Tuned(values, error(ones), error(values), given_up)


class Against:
    """X^T X (in, in) and X^T Y (in, out) of inputs X and the targets Y of the same tokens, batch by batch."""

    def __init__(self, targets: list[Tensor]):
        self.targets = iter(targets)
        self.gram = self.cross = self.whole = 0.0

    def add(self, x: Tensor) -> None:
        x, y = x.float(), next(self.targets)
        self.gram = self.gram + x.T @ x
        self.cross = self.cross + x.T @ y
        self.whole += y.square().sum().item()


class Given:
    """What a layer with this weight (out, in) gives (tokens, out), without bias, batch by batch."""

    def __init__(self, weight: Tensor):
        self.weight, self.value = weight.float(), []

    def add(self, x: Tensor) -> None:
        self.value.append(x.float() @ self.weight.T)


@torch.no_grad()
def tune_masks(
    model: nn.Module, batches: list[Tensor], kept: Kept, *, damp: float = 1.0, progress: bool = True
) -> dict[str, Tuned]:
    """Mask the units that are not in `kept`, and give the others values. In place; {layer that reads them}.

    Two streams go through the blocks, that of the dense model and that of the model as it becomes. The masks
    of each attention, then of each MLP, bring the stream after it nearest to the dense one: they make up for
    what blocks before have lost, too. Where a norm comes between the layer and the stream, its output is
    brought nearest to the dense layer's instead.
    """
    found, dense, adds = {}, None, adds_to_stream(model)
    for block in stream_blocks(model, batches, progress=progress, title="tune"):
        parts = {kind: each[-1] for kind, each in members(model, block.module).items()}
        pruned, block.inputs = block.inputs, dense or block.inputs
        lag = [(x - y).flatten(0, -2).float() * adds for x, y in zip(block.inputs, pruned, strict=True)]
        dense, targets = outputs(block, parts)
        block.inputs = pruned
        block.settle((*block.roles.attention_in, *block.roles.mlp_in))  # these stay, so they run once
        weights = {kind: block.module.get_submodule(m.linear).weight for kind, m in parts.items()}
        masks = masks_of(kept[block.name], parts)
        scale_units(model, {block.name: masks})
        for kind, reader in parts.items():
            if kind in masks:
                wanted = [y + behind for y, behind in zip(targets[kind], lag, strict=True)]
                seen, stays = see(block, reader, Against(wanted)), kept[block.name][kind]
                sums = dict(whole=seen.whole, damp=damp)
                one = tuned(weights[kind], reader.index, seen.gram, seen.cross, stays, **sums)
                values = masks[kind].double().index_copy(0, stays, one.values.cpu())
                scale_units(model, {block.name: {kind: values}})
                found[f"{block.name}.{reader.linear}"] = one
            if kind == "heads":
                given = see(block, reader, Given(block.module.get_submodule(reader.linear).weight)).value
                lag = [m + (y - x) * adds for m, y, x in zip(lag, targets[kind], given, strict=True)]
                block.settle((reader.linear,))
    return found


def adds_to_stream(model: nn.Module) -> bool:
    """Whether what attention and MLP give is added to the stream as it is."""
    return roles(model).attention_post is None and getattr(model.config, "do_layer_norm_before", True)


def masks_of(kept: dict[str, Tensor], readers: dict[str, Member]) -> dict[str, Tensor]:
    """{kind: 1 for units in `kept`, 0 for the others (units)}."""
    return {kind: torch.zeros(len(readers[kind].index)).index_fill(0, kept[kind], 1) for kind in kept}


def see(block: Block, reader: Member, statistic):
    """The statistic, with the inputs of the block's layer `reader` added to it."""
    block.collect(lambda n_in, device: statistic, of=(reader.linear,))
    return statistic


def outputs(block: Block, readers: dict[str, Member]) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """(the block's outputs, {kind: what its reader gives (tokens, out), without bias}) for each batch."""
    names, room = {kind: m.linear for kind, m in readers.items()}, block.room
    block.room = math.inf
    block.settle(tuple(names.values()))
    whole, targets = block.run(), {}
    for kind, name in names.items():
        bias = block.module.get_submodule(name).bias
        given = (y.flatten(0, -2).float() for y in block.settled[name])
        targets[kind] = [y if bias is None else y - bias.float() for y in given]
    block.settled, block.room = {}, room
    return whole, targets
