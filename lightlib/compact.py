"""CompactLinear: a linear layer whose weight is stored in fewer bits."""

from __future__ import annotations

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


def compact_layers(model: nn.Module) -> dict[str, CompactLinear]:
    """The compact layers in `model` by their name in it."""
    return {name: part for name, part in model.named_modules() if isinstance(part, CompactLinear)}
