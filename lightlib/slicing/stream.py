"""The residual stream of a decoder, place by place: who writes to it, who reads it, and in which basis.

A place lies in front of each norm: the block's input, the sum after its attention, the input of the next. Its
basis is free: turn what the writers write by Q, what the readers read by Q^T, and nothing has changed; cut
columns of Q, and both sides become smaller. Residuals pass from basis to basis through a shortcut.
Ashkboos et al. 2024, arXiv:2401.15024.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightlib.decoder import Roles, check_linears, feed_forward, find_blocks, is_parallel, roles
from lightlib.shortcut import LowRankShortcut, Shortcut
from lightlib.slicing.invariance import UnitNorm, fold_norms, put


class SlicedBlock(nn.Module):
    """A decoder block whose residuals pass through shortcuts; all else is the family's own.

    h = x S + attention(norm(x)), y = h S' + mlp(norm(h)); side by side where the family does so:
    y = x S + attention(norm(x)) + mlp(norm(x)). Where a family norms what a branch gives (Gemma 2 and 3), a
    `turn` brings it into the stream's basis.
    """

    def __init__(self, block: nn.Module, names: Roles, parallel: bool, width: int):
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self.names, self.parallel = names, parallel
        # what the model may hand over by place instead of by name
        self.order = tuple(inspect.signature(type(block).forward).parameters)[2:]
        if hasattr(block, "attention_type"):
            self.attention_type = block.attention_type
        first = next(block.parameters())
        eye = torch.eye(width, dtype=first.dtype, device=first.device)
        self.attention_shortcut = Shortcut(eye.clone())
        self.mlp_shortcut = None if parallel else Shortcut(eye.clone())
        for turn, norm in (("attention_turn", names.attention_post), ("mlp_turn", names.mlp_post)):
            post = None if norm is None else self.get_submodule(norm)
            scale = None if post is None else post.weight + names.norm_offset
            setattr(self, turn, None if post is None else Shortcut(torch.diag(scale.detach())))
            if post is not None:
                self.set_submodule(norm, UnitNorm(width, post.eps))

    def forward(self, hidden_states: Tensor, *args, **named) -> Tensor:
        h = self.attend(hidden_states, *args, **named)
        if self.parallel:
            return h + self.feed_forward(hidden_states)
        return self.mlp_shortcut(h, self.feed_forward(h))

    def attend(self, x: Tensor, *args, **named) -> Tensor:
        """The stream behind the attention: x S + attention(norm(x))."""
        names, named = self.names, dict(zip(self.order, args, strict=False)) | named
        attention = self.get_submodule(names.attention_out.rpartition(".")[0])
        y = attention(self.get_submodule(names.attention_norm)(x), **named)[0]
        if self.attention_turn is not None:
            y = self.attention_turn(self.get_submodule(names.attention_post)(y))
        return x + y if self.attention_shortcut is None else self.attention_shortcut(x, y)

    def feed_forward(self, x: Tensor) -> Tensor:
        """What the MLP adds: mlp(norm(x))."""
        y = feed_forward(self, self.names, self.get_submodule(self.names.mlp_norm)(x))
        if self.mlp_turn is not None:
            y = self.mlp_turn(self.get_submodule(self.names.mlp_post)(y))
        return y


@dataclass(frozen=True)
class Place:
    """A place in the stream: names of the modules that write there and of those that read there.

    shortcut: the writer that brings the residual there; the first place has none.
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]

    @property
    def shortcut(self) -> str | None:
        return next((name for name in self.writers if name.endswith("_shortcut")), None)


def open_stream(model: nn.Module) -> nn.Module:
    """Fold the norms and give every residual a shortcut, an identity. In place; changes no output."""
    check_linears(model, whole=True)
    fold_norms(model)
    names, width, parallel = roles(model), model.config.hidden_size, is_parallel(model)
    for name, block in find_blocks(model).items():
        model.set_submodule(name, SlicedBlock(block, names, parallel, width))
    return model


def places(model: nn.Module) -> list[Place]:
    """The places of an opened stream: one or two for each block, and the one that the head reads."""
    names, found = roles(model), []
    writers = (names.embedding, *names.positions)
    for name, block in find_blocks(model).items():

        def inside(*parts, name=name):
            return tuple(f"{name}.{part}" for part in parts)

        attention = inside("attention_turn" if block.attention_turn is not None else names.attention_out)
        mlp = inside("mlp_turn" if block.mlp_turn is not None else names.mlp_out)
        if block.parallel:
            found.append(Place(writers, inside(*names.attention_in, *names.mlp_in, "attention_shortcut")))
            writers = (*attention, *mlp, *inside("attention_shortcut"))
        else:
            found.append(Place(writers, inside(*names.attention_in, "attention_shortcut")))
            writers = (*attention, *inside("attention_shortcut"))
            found.append(Place(writers, inside(*names.mlp_in, "mlp_shortcut")))
            writers = (*mlp, *inside("mlp_shortcut"))
    return [*found, Place(writers, ("lm_head",))]


@torch.no_grad()
def turn(model: nn.Module, place: Place, Q: Tensor) -> None:
    """Bring a place into the basis of the columns of Q (width, kept), float64. In place."""
    for name in place.writers:
        part = model.get_submodule(name)
        W = part.weight.double()
        if isinstance(part, (nn.Embedding, Shortcut)):
            put(model, name, weight=W @ Q.to(W.device))
        elif part.bias is None:
            put(model, name, weight=Q.T.to(W.device) @ W)
        else:
            put(model, name, weight=Q.T.to(W.device) @ W, bias=part.bias.double() @ Q.to(W.device))
    for name in place.readers:
        part = model.get_submodule(name)
        W = part.weight.double()
        put(model, name, weight=Q.T.to(W.device) @ W if isinstance(part, Shortcut) else W @ Q.to(W.device))


def share_basis(block: SlicedBlock) -> None:
    """Say that a block's two places have one basis: its attention's residual needs no shortcut then."""
    block.attention_shortcut = None


def low_rank_pays(width: int, before: int, after: int) -> bool:
    """Whether a shortcut from `before` to `after` of `width` directions takes less products as I - B B^T."""
    return before <= after and 2 * (width - after) < after


@torch.no_grad()
def use_low_rank(model: nn.Module, place: Place, B: Tensor, after: int) -> None:
    """Bring the residual to a place of `after` directions through I - B B^T, B (before, rank). In place."""
    old = model.get_submodule(place.shortcut).weight
    model.set_submodule(place.shortcut, LowRankShortcut(B.to(old), after))


def restructure(model: nn.Module, widths: list[int], shared: bool, low_rank: bool) -> nn.Module:
    """The structure of a sliced model, with weights still to be filled. In place.

    widths: of each place; shared: whether blocks have one basis each; low_rank: whether shortcuts are
    I - B B^T where that pays.
    """
    width, before = model.config.hidden_size, None
    for place, after in zip(places(open_stream(model)), widths, strict=True):
        turn(model, place, torch.eye(width, after, dtype=torch.float64))
        if low_rank and before is not None and low_rank_pays(width, before, after):
            use_low_rank(model, place, torch.zeros(before, min(before, width - after)), after)
        before = after
    for block in find_blocks(model).values():
        if shared and not block.parallel:
            share_basis(block)
    return model
