"""Which layout for how many tokens, what share of zeros and which device: as measured, or else as counted."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from pathlib import Path

from lightlib.kernels import results
from lightlib.kernels.sparse_matmul.layouts import LAYOUTS

# Where nothing was measured: row-ELL costs least for a token or two; the bitmap has the fewest bytes up to
# nine zeros in ten, but decoding it keeps a data-centre GPU busier than its memory beyond two thirds
FEW, SCATTER_FROM = 2, 0.65


@dataclass(frozen=True)
class Choice:
    """A layout, and how many times as fast as cuBLAS it was nearest to here; None: not measured."""

    layout: str
    times_cublas: float | None


def choose(
    shape: tuple[int, int], zeros: float, tokens: int, device: str = "", folder: Path = results.FOLDER
) -> Choice:
    """The layout of a weight (out, in) with this share of zeros that multiplies so many tokens fastest."""
    near = nearest(results.rows(device, folder), shape, zeros, tokens)
    if near:
        best = max(near, key=lambda row: row["times_cublas"])
        return Choice(best["layout"], best["times_cublas"])
    layout = "ell" if tokens <= FEW else "csl" if zeros > SCATTER_FROM else "bitmap"
    return Choice(layout, None)


def nearest(rows: tuple[dict, ...], shape: tuple[int, int], zeros: float, tokens: int) -> list[dict]:
    """The rows of all layouts at the measured point that is nearest; none if no layout serves the tokens."""
    ours = [row for row in rows if row["layout"] in LAYOUTS]
    rows = [row for row in ours if row["layout"] != "ell" or tokens <= FEW]
    if not rows:
        return []

    def distance(row: dict) -> tuple[float, float, float]:
        size = row["n_out"] * row["n_in"] / (shape[0] * shape[1])
        return abs(log(row["tokens"] / tokens)), abs(row["sparsity"] - zeros), abs(log(size))

    least = min(map(distance, rows))
    return [row for row in rows if distance(row) == least]
