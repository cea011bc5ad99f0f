"""What a method returns: the lighter model and a table of what it did, a row a layer."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, fields
from typing import NamedTuple

from torch import Tensor, nn


@dataclass(frozen=True)
class LayerReport:
    """One changed layer. `bits_*`: bits its weights take in a file; `error`: ||(W - W')X|| / ||WX||."""

    method: str
    name: str
    shape: tuple[int, int]
    bits_before: int
    bits_after: int
    error: float
    notes: str = ""

    @property
    def bits_per_weight(self) -> float:
        return self.bits_after / math.prod(self.shape)


@dataclass(frozen=True)
class Report:
    """The rows of one method, or of several in the order they ran. Shown as a table in a notebook."""

    rows: tuple[LayerReport, ...]

    def __add__(self, other: Report) -> Report:
        return Report(self.rows + other.rows)

    def __iter__(self):
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def mean_error(self) -> float:
        return sum(row.error for row in self.rows) / max(len(self.rows), 1)

    def __repr__(self) -> str:
        before, after = (sum(getattr(row, key) for row in self.rows) for key in ("bits_before", "bits_after"))
        names = " then ".join(dict.fromkeys(row.method for row in self.rows))
        return (
            f"{names}: {len(self.rows)} layers, {before / 8e6:.2f} -> {after / 8e6:.2f} MB, "
            f"mean error {self.mean_error:.4f}"
        )

    def _repr_html_(self) -> str:
        head = ("method", "layer", "shape (out, in)", "bits a weight", "relative error", "notes")
        lines = [
            (
                r.method,
                r.name,
                f"{r.shape[0]} x {r.shape[1]}",
                f"{r.bits_per_weight:.2f}",
                f"{r.error:.4f}",
                r.notes,
            )
            for r in self.rows
        ]
        return f"<p>{html.escape(repr(self))}</p>{table(head, lines)}"


class Compressed(NamedTuple):
    """`light, reports = method(model, batches)`."""

    model: nn.Module
    reports: Report


def relative_error(before: Tensor, after: Tensor, gram: Tensor | None = None) -> float:
    """||(W - W')X|| / ||WX|| from the inputs' gram X^T X; of the weights alone when `gram` is None."""
    gone = before - after
    if gram is None:
        return (gone.norm() / before.norm().clamp_min(1e-30)).item()
    lost, whole = ((m @ gram * m).sum().clamp_min(0) for m in (gone, before))
    return (lost / whole.clamp_min(1e-30)).sqrt().item()


def table(head: tuple[str, ...], lines: list[tuple]) -> str:
    """An HTML table; every cell is escaped."""
    row = "<tr>{}</tr>".format
    cells = [row("".join(f"<td>{html.escape(str(c))}</td>" for c in line)) for line in lines]
    return "<table>" + row("".join(f"<th>{html.escape(h)}</th>" for h in head)) + "".join(cells) + "</table>"


def facts_table(facts, drawn: tuple[str, ...] = ()) -> str:
    """The fields of a frozen dataclass as an HTML table, and those named in `drawn` as bars on one scale."""
    shown = [(f.name.replace("_", " "), tidy(getattr(facts, f.name))) for f in fields(facts)]
    picture = [(name.replace("_", " "), getattr(facts, name), tidy(getattr(facts, name))) for name in drawn]
    return table((type(facts).__name__, ""), shown) + (bars(picture) if picture else "")


def bars(rows: list[tuple[str, float, str]]) -> str:
    """(label, value, what to print) as horizontal bars, the longest being the largest value."""
    longest = max((value for _, value, _ in rows), default=0) or 1
    bar = "<div style='background:#0072b2;height:0.9em;width:{:.0f}px'></div>".format
    lines = [
        f"<tr><td>{html.escape(label)}</td><td>{bar(240 * n / longest)}</td><td>{html.escape(text)}</td></tr>"
        for label, n, text in rows
    ]
    return f"<table>{''.join(lines)}</table>"


def tidy(value) -> str:
    """A number as a reader wants it: thousands grouped, four significant digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
