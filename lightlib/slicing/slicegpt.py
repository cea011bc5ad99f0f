"""SliceGPT: turn the stream into the basis of its principal directions, and cut the last ones off.

Ashkboos et al. 2024, arXiv:2401.15024. What is left is dense and smaller: rows and columns of every weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightlib.calibration import stream_blocks
from lightlib.change import changing, remember
from lightlib.decoder import ends_as_wide, roles
from lightlib.report import Compressed, LayerReport, Report
from lightlib.slicing.principal import gram_of, kept_width, nearest_basis, principal_directions, shares_of
from lightlib.slicing.stream import (
    Place,
    low_rank_pays,
    open_stream,
    places,
    share_basis,
    turn,
    use_low_rank,
)

ROTATIONS, SIGNALS, SHORTCUTS = ("sublayer", "block"), ("raw", "normed"), ("low_rank", "full")


def slicegpt(
    model: nn.Module,
    batches: list[Tensor],
    *,
    slice_fraction: float | Sequence[float] = 0.25,
    explained_variance: float | None = None,
    round_to: int = 8,
    rotations: str = "sublayer",
    signal: str = "raw",
    shortcuts: str = "low_rank",
    slice_head: bool = False,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """Slice the stream of `model` to the principal directions that it shows on `batches`.

    slice_fraction: the share of directions that go at every place, or a list with one for each place.
    explained_variance: keep as many at each place as hold this share of |X|^2 instead. round_to: widths are
    multiples of it. rotations: "sublayer", in front of attention and of MLP, as in the paper; "block" uses
    one for both, which saves every second shortcut. signal: "raw" takes the principal directions of the
    stream, as the authors' code does, "normed" those of what leaves the norm, as the paper says. shortcuts:
    "low_rank" turns each place's basis as near to the one before as its directions allow, so that the
    shortcut is I - B B^T, equal to the "full" matrix of the paper and smaller; it is used where it takes less
    products, below a third. slice_head: the head reads a sliced stream too; otherwise its input stays whole
    (with GPT-2, the embedding's output then stays whole as well). The head gets a weight of its own, and
    residuals pass through shortcuts; the report counts both, and says what each place keeps.
    Raises ValueError for settings that do not fit.
    """
    if not batches:
        raise ValueError("slicegpt needs batches: it takes the principal directions of what they make")
    choices = (
        ("rotations", rotations, ROTATIONS),
        ("signal", signal, SIGNALS),
        ("shortcuts", shortcuts, SHORTCUTS),
    )
    for name, value, known in choices:
        if value not in known:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(known)}")
    with changing(model, inplace) as light:
        before = bits_by_module(light)
        stream = places(open_stream(light))
        fractions = fraction_of_each(slice_fraction, len(stream), slice_head)
        low_rank = shortcuts == "low_rank"
        cut = Cut(light, stream, fractions, explained_variance, round_to, signal == "normed", low_rank)
        if ends_as_wide(light) and not slice_head:
            cut.fixed[0] = light.config.hidden_size
        for block in stream_blocks(light, batches, progress=progress, title="slicegpt"):
            sliced, both = block.module, rotations == "block" and not block.module.parallel

            def attended(sliced=sliced, block=block):
                given = zip(block.inputs, block.arguments, strict=True)
                return [sliced.attend(x, *args, **named) for x, (args, named) in given]

            Q = cut(block.inputs + attended(), 2) if both else cut(block.inputs)
            block.inputs = [(x.double() @ Q).to(x.dtype) for x in block.inputs]
            if both:
                share_basis(sliced)
            elif not sliced.parallel:
                cut(attended())
        if slice_head:
            cut.fixed |= {len(stream) - 1: cut.widths[0]} if ends_as_wide(light) else {}
            cut(block.run())
        else:
            cut.leave_whole()
        settings = {"widths": cut.widths, "shared": rotations == "block", "low_rank": low_rank}
        remember(light, RESTRUCTURE, settings)
        report = cut.report(before)
    return Compressed(light, report)


def spectra(
    model: nn.Module, batches: list[Tensor], *, signal: str = "raw", progress: bool = True
) -> dict[str, Tensor]:
    """{place: the shares (d,) of |X|^2 along its principal directions, falling}; nothing is cut.

    A place is named after the norm that it lies in front of.
    """
    found, names = {}, roles(model)
    with changing(model, False) as light:
        open_stream(light)
        for block in stream_blocks(light, batches, progress=progress, title="spectra"):
            found[f"{block.name}.{names.attention_norm}"] = shares_of(block.inputs, signal == "normed")
            if not block.module.parallel:
                given = zip(block.inputs, block.arguments, strict=True)
                attended = [block.module.attend(x, *args, **named) for x, (args, named) in given]
                found[f"{block.name}.{names.mlp_norm}"] = shares_of(attended, signal == "normed")
        found[names.final_norm] = shares_of(block.run(), signal == "normed")
    return found


RESTRUCTURE = "lightlib.slicing.stream:restructure"


@dataclass
class Cut:
    """Cuts one place of the stream after the other, and remembers what it kept."""

    model: nn.Module
    stream: list[Place]
    fractions: list[float]
    variance: float | None
    round_to: int
    normed: bool
    low_rank: bool
    basis: Tensor | None = None  # (width, kept) of the last place that was cut
    widths: list[int] = field(default_factory=list)
    held: list[float] = field(default_factory=list)  # the share of |X|^2 that is kept at each place
    fixed: dict[int, int] = field(default_factory=dict)  # widths that are not free, by place

    def __call__(self, signals: list[Tensor], count: int = 1) -> Tensor:
        """Turn and cut the next `count` places to the principal directions of `signals` (..., width).

        Returns these directions (width, kept), float64.
        """
        Q, shares = principal_directions(gram_of(signals, self.normed))
        at = len(self.widths)
        kept = self.fixed.get(at) or kept_width(shares, self.fractions[at], self.round_to, self.variance)
        return self.put(Q[:, :kept], shares[:kept].sum().item(), count)

    def leave_whole(self) -> None:
        """Cut nothing at the last place; where shortcuts are low-rank, its basis is chosen to need none."""
        self.put(torch.eye(self.model.config.hidden_size, dtype=torch.float64), 1.0)

    def put(self, Q: Tensor, held: float, count: int = 1) -> Tensor:
        """Bring the next `count` places into the span of Q (width, kept); returns the basis that they got."""
        at, (width, kept), B = len(self.widths), Q.shape, None
        if self.low_rank and self.basis is not None and low_rank_pays(width, self.basis.shape[1], kept):
            Q, B = nearest_basis(self.basis, Q)
        for place in self.stream[at : at + count]:
            turn(self.model, place, Q)
            self.widths.append(kept)
            self.held.append(held)
        if B is not None:
            use_low_rank(self.model, self.stream[at], B, kept)
        self.basis = Q
        return Q

    def report(self, before: dict[str, int]) -> Report:
        """A row for each module that was cut or came to be; error: what of |X| is lost at its place."""
        width, rows, after = self.model.config.hidden_size, {}, bits_by_module(self.model)
        for place, kept, held in zip(self.stream, self.widths, self.held, strict=True):
            notes = f"{kept} of {width} directions, {held:.2%} of |X|^2"
            for name in (*place.writers, *place.readers):
                if name in after:
                    shape = tuple(self.model.get_submodule(name).weight.shape)
                    error = math.sqrt(max(0.0, 1 - held))
                    rows[name] = LayerReport(
                        "slicegpt", name, shape, before.get(name, 0), after[name], error, notes
                    )
        return Report(tuple(rows.values()))


def fraction_of_each(fraction: float | Sequence[float], count: int, slice_head: bool) -> list[float]:
    """One fraction for each of `count` places; raises ValueError for what lies outside of 0 to 1."""
    found = [float(fraction)] * count if isinstance(fraction, (int, float)) else list(fraction)
    wanted = count if slice_head else count - 1
    if len(found) < wanted or not all(0 <= f < 1 for f in found):
        raise ValueError(
            f"slice_fraction={fraction}: give a number from 0 to below 1, or one for each of {wanted} places"
        )
    return found


def bits_by_module(model: nn.Module) -> dict[str, int]:
    """{module: bits of its own weights}; those that two share are counted at the first."""
    seen, found = set(), {}
    for name, part in model.named_modules():
        own = [p for p in part.parameters(recurse=False) if p.data_ptr() not in seen or p.is_meta]
        seen |= {p.data_ptr() for p in own}
        if own:
            found[name] = sum(p.numel() * p.element_size() * 8 for p in own)
    return found
