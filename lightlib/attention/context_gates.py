"""The gates of dynamic context pruning: how much of a key is left after all later queries had their say.

Anagnostidis et al. 2023, arXiv:2305.15805
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightlib.decoder import find_blocks

HALVINGS = 24  # of [0, 1]: to 6e-8, what float32 tells apart near 1


def alpha_sigmoid(z: Tensor, alpha: float) -> Tensor:
    """The first of entmax_alpha([z, 0]): the sigmoid at alpha = 1, else 0 or 1 from |z| = 1 / (alpha - 1) on.

    The p with p^(alpha - 1) - (1 - p)^(alpha - 1) = (alpha - 1) z.  Peters et al. 2019, arXiv:1905.05702
    """
    if alpha - 1 < 1e-3:
        return z.sigmoid()
    with torch.no_grad():
        low, high, target = torch.zeros_like(z), torch.ones_like(z), (alpha - 1) * z
        for _ in range(HALVINGS):
            p = (low + high) / 2
            below = p ** (alpha - 1) - (1 - p) ** (alpha - 1) < target
            low, high = p.where(below, low), high.where(below, p)
        p = ((low + high) / 2).where(target < 1, 1.0).where(target > -1, 0.0)
        # the slope's two terms, each infinite where its side is 0 and alpha > 2: no slope there
        one, other = p ** (2 - alpha), (1 - p) ** (2 - alpha)
        slope = (1 / (1 / one + 1 / other)).where((p > 0) & (p < 1), 0.0)
    return p + slope * (z - z.detach())


def kept_so_far(gates: Tensor, first: int = 0) -> Tensor:
    """I (B, T, S) from gates (B, T, S) in [0, 1]: a key's share that no query up to this one has closed.

    The queries are those of the tokens `first`, first + 1, ... of the S; a token's own gate, and those of
    queries before it, do not count. Gates of 1 keep all.
    """
    T, S = gates.shape[1:]
    later = torch.ones(T, S, dtype=torch.bool, device=gates.device).tril(first - 1)
    return gates.where(later, 1.0).cumprod(1)


class Gate(nn.Module):
    """z (B, T, S) of queries and keys made from hidden states (B, T, C); above 0 a key stays."""

    def __init__(self, width: int, rank: int, bias: float = 2.0):
        super().__init__()
        self.query = nn.Linear(width, rank, bias=False)
        self.key = nn.Linear(width, rank, bias=False)
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        """x (B, T, C), keys (B, S, rank)."""
        return self.query(x) @ keys.mT / keys.shape[-1] ** 0.5 + self.bias


def context_gates(model: nn.Module, rank: int = 64, seed: int = 0) -> nn.ModuleList:
    """Untrained gates, one a block. They hold 2 x rank x hidden size weights a block, and keep nearly all."""
    weight = next(model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gates = nn.ModuleList(Gate(model.config.hidden_size, rank) for _ in find_blocks(model))
    return gates.to(weight)


def save_gates(gates: nn.ModuleList, file: str | Path) -> Path:
    """Write the gates as safetensors; `load_gates` reads them back."""
    file = Path(file).expanduser()
    save_file({name: t.contiguous() for name, t in gates.state_dict().items()}, file)
    return file


def load_gates(file: str | Path, model: nn.Module) -> nn.ModuleList:
    """The gates that `save_gates` wrote, for `model`. Raises ValueError where they are another model's."""
    tensors = load_file(Path(file).expanduser())
    gates = context_gates(model, rank=len(tensors["0.query.weight"]))
    try:
        gates.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{file} holds gates of another model: {error}") from error
    return gates.eval().requires_grad_(False)
