"""What every sparse product must give: y = x W^T, in float64."""

from torch import Tensor


def matmul(weight: Tensor, x: Tensor) -> Tensor:
    """weight (out, in), dense; x (tokens, in) -> (tokens, out), float64."""
    return x.double() @ weight.double().T
