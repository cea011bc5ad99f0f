"""What every product with integer codes must give: y = x W^T, in float64, with W as its codes say."""

from torch import Tensor

from lightlib.kernels.w4_matmul.packed import Packed


def matmul(weight: Packed, x: Tensor) -> Tensor:
    """weight (out, in); x (tokens, in) -> (tokens, out), float64."""
    codes, scale, zero = (
        part.double() for part in weight.parts()
    )  # (out, groups, group), (out, groups, 1) x 2
    W = codes * scale + zero if weight.kind_of_zero == "value" else (codes - zero) * scale
    return x.double() @ W.flatten(1).T
