"""What generation asks of a cache's rows: beams in another order, rows repeated, some rows alone."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class BatchRows:
    """A cache layer's part of that; in `_for_each` the layer says which tensors it holds along the batch."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._for_each(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._for_each(lambda held: held.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._for_each(lambda held: held[indices])

    def _for_each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor along the batch."""
        raise NotImplementedError
