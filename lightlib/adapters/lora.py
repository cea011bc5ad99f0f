"""LoRA: beside each frozen weight W (out, in), a product B A of low rank learns.

Hu et al. 2021, arXiv:2106.09685; on packed weights as in QLoRA, Dettmers et al. 2023, arXiv:2305.14314.
`peft_files` writes and reads adapters as peft does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightlib.change import changing, remember
from lightlib.compact import CompactLinear, through
from lightlib.decoder import find_blocks, linears, use_linear_everywhere
from lightlib.report import Compressed, Report
from lightlib.training import train


class LoRALinear(nn.Module):
    """y = base(x) + (alpha / rank) x A^T B^T with A (rank, in) random and B (out, rank) zero at first."""

    def __init__(
        self,
        base: nn.Linear | CompactLinear,
        rank: int,
        alpha: float,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.base, self.rank, self.alpha = base, rank, alpha
        device = next(t for t in (*base.parameters(), *base.buffers()) if t is not base.bias).device
        A = torch.empty(rank, base.in_features, device="cpu")
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        self.A = nn.Parameter(A.to(device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def update(self) -> Tensor:
        """What is added to the base's weight: (alpha / rank) B A (out, in)."""
        return self.alpha / self.rank * (self.B @ self.A)

    def forward(self, x: Tensor) -> Tensor:
        packed = isinstance(self.base, CompactLinear)
        y = through(self.base, self.base, x) if packed else self.base(x)  # (..., out)
        low = F.linear(x.to(self.A.dtype), self.A)  # (..., rank)
        return y + (self.alpha / self.rank * F.linear(low, self.B)).to(y.dtype)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}"


def lora(
    model: nn.Module,
    batches: list[Tensor],
    *,
    rank: int | Mapping[str, int] = 8,
    alpha: float = 16,
    targets: Collection[str] | None = None,
    steps: int = 100,
    lr: float = 1e-3,
    checkpoint: str | Path | None = None,
    watch: Callable[[int, float], None] = lambda step, loss: None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """Train low-rank updates of the blocks' linear layers on `batches`; all other weights stay as they are.

    Where every base is a dense nn.Linear, the updates are merged into it at the end and the model is as plain
    as before; over packed layers they stay beside them, in float32 (`lora_layers` shows them, `save_adapter`
    writes them). rank, alpha, targets: as `add_lora` takes them; steps, lr, checkpoint, watch: as `train`
    does. The report has no rows, since no layer gets smaller. Raises ValueError without batches, and for a
    rank or targets that do not fit.
    """
    if not batches:
        raise ValueError("lora needs batches to train on")
    with changing(model, inplace) as light:
        add_lora(light, rank=rank, alpha=alpha, targets=targets)
        layers = lora_layers(light)
        try:
            weights = [p for layer in layers.values() for p in (layer.A, layer.B)]
            train(
                light,
                weights,
                batches,
                steps=steps,
                lr=lr,
                watch=watch,
                checkpoint=checkpoint,
                progress=progress,
            )
            if not any(isinstance(layer.base, CompactLinear) for layer in layers.values()):
                merge_lora(light)
        except BaseException:
            _forget(light)  # `changing` puts the layers back
            raise
    return Compressed(light, Report(()))


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers of `model` that carry an update, by their name in it."""
    return {name: part for name, part in model.named_modules() if isinstance(part, LoRALinear)}


def add_lora(
    model: nn.Module,
    *,
    rank: int | Mapping[str, int] = 8,
    alpha: float = 16,
    targets: Collection[str] | None = None,
) -> list[str]:
    """Put an update beside every linear layer of the blocks, in place; returns their names.

    No output changes, since B begins at zero. rank: one for all layers, or {block: the rank of its layers},
    where blocks that are not named learn nothing. targets: only layers whose last name part is among these,
    such as ("q_proj", "v_proj"). Raises ValueError for a target that no layer has, a block that there is not,
    for a rank that does not fit, and where there are updates already.
    """
    use_linear_everywhere(model)
    shapes = block_linears(model)
    if isinstance(targets, str):
        targets = (targets,)
    known = sorted({name.rpartition(".")[2] for name in shapes})
    unknown = sorted(set(targets or ()) - set(known))
    if unknown or (targets is not None and not targets):
        raise ValueError(f"targets: no layer is named {unknown}; the blocks have {', '.join(known)}")
    blocks = list(find_blocks(model))
    ranks = rank if isinstance(rank, Mapping) else dict.fromkeys(blocks, rank)
    if strange := sorted(ranks.keys() - set(blocks)):
        raise ValueError(f"rank: the model has no block {strange[0]}; the first is {blocks[0]}")
    layers = {}
    for name in shapes:
        block = next((block for block in ranks if name.startswith(f"{block}.")), None)
        if block is not None and (targets is None or name.rpartition(".")[2] in targets):
            if not 0 < ranks[block] <= min(shapes[name]):
                raise ValueError(f"{name}: rank={ranks[block]} does not lie from 1 to {min(shapes[name])}")
            layers[name] = (ranks[block], alpha)
    wrap(model, layers)
    return list(layers)


def ranks_by_importance(model: nn.Module, importance: Mapping[str, float], rank: int) -> dict[str, int]:
    """{block: rank} in proportion to the blocks' importance, for `add_lora`; 1 at least.

    They take as many weights as `rank` in all these blocks does, or a few less. Recovery as in CFSP, Wang et
    al. 2025, arXiv:2409.13199: what matters more gets more to learn with. Raises ValueError where a block's
    importance is negative, or all are 0.
    """
    if min(importance.values()) < 0 or not sum(importance.values()):
        raise ValueError("ranks are in proportion to the importance: none may be negative, nor all 0")
    blocks = find_blocks(model)
    cost = {
        name: sum(part.in_features + part.out_features for part in linears(blocks[name]).values())
        for name in importance
    }
    budget = rank * sum(cost.values())
    scale = budget / sum(value * cost[name] for name, value in importance.items())
    wanted = {name: scale * value for name, value in importance.items()}
    ranks = {name: max(1, int(value)) for name, value in wanted.items()}
    spare = budget - sum(ranks[name] * cost[name] for name in ranks)
    while spare < 0:  # a block got 1 that should have had less
        name = max(ranks, key=ranks.get)
        ranks[name], spare = ranks[name] - 1, spare + cost[name]
    for name in sorted(ranks, key=lambda name: ranks[name] - wanted[name]):
        if cost[name] <= spare:
            ranks[name], spare = ranks[name] + 1, spare - cost[name]
    return ranks


def wrap(model: nn.Module, layers: dict[str, tuple[int, float]]) -> None:
    """Put updates beside {layer: (rank, alpha)}, and remember them for `save` and `load`. In place."""
    generator = torch.Generator().manual_seed(0)
    for name, (rank, alpha) in layers.items():
        model.set_submodule(name, LoRALinear(model.get_submodule(name), rank, alpha, generator))
    remember(model, WRAP, {"layers": {name: list(pair) for name, pair in layers.items()}})


WRAP = "lightlib.adapters.lora:wrap"


@torch.no_grad()
def merge_lora(model: nn.Module) -> list[str]:
    """Add each update to its base's weight and take it away; returns the layers' names. In place.

    All are merged or none. Raises ValueError where there are none, and for a packed base, which has no dense
    weight to add to.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA layers to merge; add_lora or load_adapter adds them")
    for name, layer in layers.items():
        if isinstance(layer.base, CompactLinear):
            raise ValueError(
                f"{name}: {type(layer.base).__name__} is packed, so an update cannot be added to its weight; "
                "keep the adapter beside it, or put an nn.Linear that holds base.dense() in place of its base"
            )
    for name, layer in layers.items():
        W = layer.base.weight
        # a parameter of its own: where work is broken off, the old one is put back
        layer.base.weight = nn.Parameter((W.float() + layer.update()).to(W.dtype), W.requires_grad)
        model.set_submodule(name, layer.base)
    _forget(model)
    return list(layers)


def block_linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of the blocks' linear layers by name in the model; ValueError where they carry updates."""
    if lora_layers(model):
        raise ValueError("the model has LoRA layers already; merge_lora merges them")
    return {
        f"{block}.{name}": (part.out_features, part.in_features)
        for block, module in find_blocks(model).items()
        for name, part in linears(module).items()
    }


def _forget(model: nn.Module) -> None:
    """Take the updates out of what `save` remembers of the model's structure."""
    model.structure = [row for row in model.structure if row[0] != WRAP]
    if not model.structure:
        del model.structure
