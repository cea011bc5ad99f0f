"""Norms without a scale: what makes a model indifferent to the basis of its stream.

RMSNorm divides a vector by its length, which no rotation changes; its scale, which a rotation would mix up,
moves into the weights that read it. LayerNorm first takes the mean away: where everything that writes to the
stream is centred before, there is no mean to take, and it is an RMSNorm too.
Ashkboos et al. 2024, arXiv:2401.15024.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightlib.decoder import find_blocks, norm_readers, roles, untie_head, use_linear_everywhere


class UnitNorm(nn.Module):
    """x / sqrt(|x|^2 / width + eps): RMSNorm without a scale, over `width` values, of which some may be cut.

    >>> UnitNorm(4, 0.0)(torch.tensor([3.0, 4.0]))  # two of four values are left
    tensor([1.2000, 1.6000])
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        left = x.shape[-1] / self.width  # torch's norm divides by the number of values that are left
        y = F.rms_norm(x, x.shape[-1:], eps=self.eps / left)
        return y if left == 1 else y * left**-0.5

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}"


@torch.no_grad()
def fold_norms(model: nn.Module) -> nn.Module:
    """Make every norm that reads the stream a UnitNorm. In place; changes no output but by rounding.

    Scales and shifts move into the linear layers that read them, the head among them, which gets a weight of
    its own. Raises ValueError for a model whose norms come after the residual.
    """
    names, config = roles(model), model.config
    if not getattr(config, "do_layer_norm_before", True):
        raise ValueError(
            f"{config.model_type}: its norms follow the residual sum, so the stream has no free basis; "
            "models that norm first can be sliced"
        )
    if getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        raise ValueError(f"{config.model_type}: its embedding is projected; such a stream is not sliced")
    untie_head(use_linear_everywhere(model))
    writers = [names.embedding, *names.positions]
    for block in find_blocks(model):
        for norm, readers in norm_readers(names).items():
            fold(model, f"{block}.{norm}", [f"{block}.{reader}" for reader in readers], names.norm_offset)
        writers += [f"{block}.{names.attention_out}", f"{block}.{names.mlp_out}"]
    if fold(model, names.final_norm, ["lm_head"], names.norm_offset):
        for writer in writers:
            center(model, writer)
    return model


def fold(model: nn.Module, norm: str, readers: list[str], offset: float) -> bool:
    """Move a norm's scale and shift into its readers; whether it was a LayerNorm, which centres too."""
    old = model.get_submodule(norm)
    weight, shift = getattr(old, "weight", None), getattr(old, "bias", None)
    scale = torch.ones(model.config.hidden_size) if weight is None else weight.double() + offset
    for name in readers:
        part = model.get_submodule(name)
        W, bias = part.weight.double(), part.bias
        if shift is not None:
            bias = (0 if bias is None else bias.double()) + W @ shift.double()
        put(model, name, weight=W * scale.to(W), bias=bias)
    model.set_submodule(norm, UnitNorm(model.config.hidden_size, epsilon(old)))
    return isinstance(old, nn.LayerNorm)


def epsilon(norm: nn.Module) -> float:
    """What a norm adds before it takes the root."""
    return getattr(norm, "variance_epsilon", None) or norm.eps


def center(model: nn.Module, writer: str) -> None:
    """Take the mean over the stream's values from what `writer`, a linear layer or an embedding, gives."""
    part = model.get_submodule(writer)
    W, bias = part.weight.double(), getattr(part, "bias", None)
    along = 1 if isinstance(part, nn.Embedding) else 0
    parts = {"weight": W - W.mean(along, keepdim=True)}
    if bias is not None:
        parts["bias"] = bias.double() - bias.double().mean()
    put(model, writer, **parts)


def put(model: nn.Module, name: str, **parts: Tensor | None) -> None:
    """Put a part with these parameters, in its own type, where `name` is; the old one stays as it is."""
    old = model.get_submodule(name)
    new, dtype = copy.copy(old), old.weight.dtype
    new._parameters = dict(old._parameters)
    for key, value in parts.items():
        new._parameters[key] = None if value is None else nn.Parameter(value.to(dtype), requires_grad=False)
    if isinstance(new, nn.Embedding):
        new.embedding_dim = new.weight.shape[1]
    elif isinstance(new, nn.Linear):
        new.out_features, new.in_features = new.weight.shape
    model.set_submodule(name, new)
