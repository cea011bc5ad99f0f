"""CompactLinear: a linear layer whose weight is stored in fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CompactLinear(nn.Module):
    """y = x W^T + b with W (out, in) held in packed tensors.

    A subclass stores its tensors as buffers and says how to read them: `dense`, `settings`, `empty`. The
    forward here is right everywhere; a subclass adds a faster path and names it in `fast_path`.
    """

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W as an ordinary tensor (out, in)."""
        raise NotImplementedError

    def settings(self) -> dict:
        """What `empty` needs, besides the shape, to rebuild this layer's structure: plain JSON values."""
        raise NotImplementedError

    @classmethod
    def empty(cls, in_features: int, out_features: int, bias: Tensor | None, **settings) -> CompactLinear:
        """A layer of this structure with tensors still to be filled."""
        raise NotImplementedError

    def stored(self) -> dict[str, Tensor]:
        """The tensors that a file must hold, by name."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def stored_bits(self) -> int:
        """Bits that the layer takes in a file."""
        return sum(t.numel() * t.element_size() * 8 for t in self.stored().values())

    def flops_for(self, tokens: int) -> int:
        """FLOPs of a call with so many tokens, a multiply and an add being two; reading codes counts none."""
        return 2 * tokens * self.in_features * self.out_features

    def mask(self) -> Tensor | None:
        """Which weights (out, in) a layer stores that drops some and leaves the others as they are."""
        return None

    def learnable(self) -> dict[str, Tensor]:
        """{parameter: mask (out, in) of the weights that it holds, row by row} of weights that can learn."""
        return {}

    def fast_path(self, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
        """(operation, reason): what multiplies packed weights for such inputs, or "" and why nothing does."""
        return "", "no packed matmul exists for this layer, so each call decodes it to dense first"

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dense(x.dtype), bias)

    def _apply(self, fn, recurse=True):
        # model.to(bfloat16) must not round what is stored otherwise: packed tensors change device only
        precise = {
            name: (buffer, buffer.dtype) for name, buffer in self._buffers.items() if buffer is not None
        }
        super()._apply(fn, recurse)
        for name, (before, dtype) in precise.items():
            after = self._buffers[name]
            if after.dtype != dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.settings()}"


class Through(torch.autograd.Function):
    """forward(x) of a packed layer with the gradients to x and bias that its dense weight gives.

    Packed products and rounded inputs have none of their own, and the decoded weight is not kept until then.
    """

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, layer: CompactLinear, forward: Callable) -> Tensor:
        ctx.layer = layer
        return forward(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x = gradient @ ctx.layer.dense(gradient.dtype) if ctx.needs_input_grad[0] else None
        bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return x, bias, None, None


@contextmanager
def letting_gradients_through(model: nn.Module) -> Iterator[None]:
    """While it lasts, gradients pass layers of `model` whose weights are codes as they pass dense ones."""
    layers = [
        part for part in compact_layers(model).values() if all(p is part.bias for p in part.parameters())
    ]
    try:
        for layer in layers:
            layer.forward = partial(through, layer, layer.forward)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def through(layer: CompactLinear, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """forward(x), to which gradients pass `layer` as they pass a dense one."""
    return Through.apply(x, layer.bias, layer, forward)


def weight_of(linear: nn.Module) -> Tensor:
    """A layer's weight (out, in) in float32, dense; of nn.Linear, or of a layer that has `dense`."""
    return linear.weight.detach().float() if isinstance(linear, nn.Linear) else linear.dense()


def compact_layers(model: nn.Module) -> dict[str, CompactLinear]:
    """The compact layers in `model` by their name in it."""
    return {name: part for name, part in model.named_modules() if isinstance(part, CompactLinear)}
