"""What every attention kernel must give: softmax(q k^T) v, in float64; and the inputs it is defined for."""

import torch
from torch import Tensor

WIDEST = 512  # values of a head that a kernel reads; more than a tile's registers hold


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None) -> Tensor:
    """q (B, H, T, D), k and v (B, K, S, D), H a multiple of K -> (B, H, T, D), float64.

    The queries are the last T of S positions: query t sees the keys up to S - T + t, all of them where not
    `causal`. scale: 1 / sqrt(D) by default.
    """
    check(q, k, v, causal, scale)
    T, S, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))  # (B, H, S, D)
    scores = q.double() @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)  # (B, H, T, S)
    if causal:
        scores = scores.masked_fill(~visible(T, S, q.device), -torch.inf)
    return scores.softmax(-1) @ v


def visible(T: int, S: int, device: torch.device | None = None) -> Tensor:
    """Which of S keys the last T positions see (T, S): the lower triangle where T = S."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def output(q: Tensor) -> Tensor:
    """Room for what q (B, H, T, D) gives; a token's heads lie side by side, as the next layer reads them."""
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2)


def check(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> None:
    """Raises ValueError for inputs of which there is no attention, and for a query that would see no key."""
    given = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    same = q.ndim == k.ndim == 4 and k.shape == v.shape
    if not same or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"{given}: q must be (B, H, T, D), k and v (B, K, S, D)")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{given}: {q.shape[1]} heads are not a multiple of {k.shape[1]} kv heads")
    if k.shape[2] < max(1, q.shape[2] if causal else 1):
        raise ValueError(f"{given}: {q.shape[2]} queries cannot be the last of {k.shape[2]} positions")
    if scale is not None and scale <= 0:
        raise ValueError(f"scale {scale} is not positive; negate q instead")


def check_lengths(q: Tensor, lengths: Tensor | None) -> None:
    """Raises ValueError for more than one query, or lengths that are not one int32 for each of the batch."""
    if q.shape[2] != 1:
        raise ValueError(f"q {tuple(q.shape)}: decoding takes one query, not {q.shape[2]}; use attention")
    if lengths is not None and (lengths.shape != q.shape[:1] or lengths.dtype != torch.int32):
        raise ValueError(f"lengths are {lengths.dtype} {tuple(lengths.shape)}, not int32 ({q.shape[0]},)")
