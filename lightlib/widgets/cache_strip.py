"""Cache strip: a text as it is generated, each token coloured by how many heads still hold it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import ipywidgets as W
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from lightlib.report import tidy
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.numbers import scaled
from lightlib.widgets.style import BLACK, DPI, GREY, VERMILION, WIDTH
from lightlib.widgets.text_screen import HIGH, KEPT, PAPER, Page

LEFT, HEAD = 14, 34  # pixels left of the text and above it
MOST = 1000  # tokens
ALL = "all"


@dataclass(frozen=True)
class Trace:
    """What a policy kept while a text was generated.

    tokens: the text of each, the prompt's `first` ones before those generated.
    held: (steps, tokens) or (steps, layers, tokens), the share of heads that hold a token after each step;
    -1 or nan where it is not yet written.
    """

    tokens: list[str]
    held: Tensor
    first: int

    @property
    def written(self) -> str:
        """The text that was generated."""
        return "".join(self.tokens[self.first :])


class Held(NamedTuple):
    """What the caches hold after one step; `share` of the tokens seen."""

    share: np.ndarray
    oldest: int | None
    newest_lost: int | None

    @property
    def mean(self) -> float:
        """Tokens in the cache, a mean over heads."""
        return float(self.share.sum())


def held_after(trace: Trace, step: int, layer: int | None = None) -> Held:
    """The tokens seen after `step` and the share of heads, of all layers or one, that hold each."""
    row = trace.held[step].float()
    if row.ndim == 2:
        row = row.mean(0) if layer is None else row[layer]
    share = row[row >= 0].numpy()  # nan is not
    kept, lost = np.flatnonzero(share > 0), np.flatnonzero(share == 0)
    return Held(share, int(kept[0]) if len(kept) else None, int(lost[-1]) if len(lost) else None)


def draw(fig: Figure, result: dict) -> None:
    """The key, the text so far, a frame around the newest token."""
    page, held, first = result["page"]
    wide, high = (round(inches * DPI) for inches in fig.get_size_inches())
    image = page.picture(held.share, first)
    fig.figimage(image, LEFT, high - HEAD - len(image), origin="upper")
    left, top, width = page.box(len(held.share) - 1)
    corner = (LEFT + left - 1) / wide, 1 - (HEAD + top + HIGH) / high
    frame = Rectangle(corner, (width + 2) / wide, HIGH / high, fill=False, ec=BLACK, lw=2)
    fig.add_artist(frame)
    x = LEFT
    for share, name in ((1, "in every head's cache"), (0.5, "in half of them"), (0, "in none (struck)")):
        color = PAPER + share * (KEPT - PAPER)
        key = Rectangle((x / wide, 1 - 22 / high), 14 / wide, 14 / high, fc=color, ec=GREY, lw=0.5)
        fig.add_artist(key)
        fig.text((x + 20) / wide, 1 - 15 / high, name, fontsize=10, va="center")
        x += 34 + 7.3 * len(name)
    fig.add_artist(Rectangle((x / wide, 1 - 22 / high), 2 / wide, 14 / high, fc=VERMILION, lw=0))
    fig.text((x + 8) / wide, 1 - 15 / high, "generated from here", fontsize=10, va="center")
    x += 30 + 7.3 * 19
    fig.add_artist(Rectangle((x / wide, 1 - 22 / high), 14 / wide, 14 / high, fill=False, ec=BLACK, lw=2))
    fig.text((x + 20) / wide, 1 - 15 / high, "newest", fontsize=10, va="center")


def judge(policy: str, trace: Trace, held: Held) -> str:
    """How much of the text is left, in how many heads, and where the holes are."""
    n, none, every = len(held.share), int((held.share == 0).sum()), int((held.share >= 1).sum())
    if every == n:
        return f"{policy}: all {n} tokens are in every cache; nothing was evicted yet."
    some = n - none - every
    oldest = (
        "no token is held" if held.oldest is None
        else f"the oldest that is held is number {held.oldest + 1}, {trace.tokens[held.oldest]!r}"
    )  # fmt: skip
    return (
        f"{policy}: of {n} tokens {every} are in every cache, {some} in some and {none} in none, "
        f"{tidy(held.mean)} a head in the mean; {oldest}."
    )


def checked(traces: Mapping[str, Trace]) -> int | None:
    """How many layers the traces tell apart, None if they do not. Raises ValueError for what does not fit."""
    if not traces:
        raise ValueError("cache_strip: give {policy: Trace(tokens, held, first)}")
    for name, trace in traces.items():
        held, tokens = trace.held, len(trace.tokens)
        if held.ndim not in (2, 3) or held.shape[-1] != tokens or not held.numel():
            raise ValueError(
                f"cache_strip: {name} has {tokens} tokens and held {tuple(held.shape)}; "
                f"it must be (steps, {tokens}) or (steps, layers, {tokens})"
            )
        if tokens > MOST:
            raise ValueError(f"cache_strip: {name} has {tokens} tokens; {MOST} can be drawn, give a part")
        if not 0 <= trace.first <= tokens:
            raise ValueError(f"cache_strip: {name} has first={trace.first}; its tokens are {tokens}")
        checked_shares(name, held)
    layers = {trace.held.shape[1] if trace.held.ndim == 3 else None for trace in traces.values()}
    if len(layers) > 1:
        raise ValueError(
            f"cache_strip: every policy needs as many layers; there are {sorted(map(str, layers))}"
        )
    return layers.pop()


def checked_shares(name: str, held: Tensor) -> None:
    written = held >= 0
    if (held > 1).any() or ((held < 0) & (held != -1)).any():
        low, high = held[~held.isnan()].aminmax()
        raise ValueError(
            f"cache_strip: {name} has held from {low:.4g} to {high:.4g}; give 0 to 1, and -1 where unwritten"
        )
    # each step has seen a first part of the tokens, at least one
    if not written[..., 0].all() or (written[..., 1:] & ~written[..., :-1]).any():
        raise ValueError(f"cache_strip: {name} has a step where a token is written before an earlier one")
    if written.ndim == 3 and (written != written[:, :1]).any():
        raise ValueError(f"cache_strip: {name} has a step where layers have seen different tokens")


def cache_strip(traces: Mapping[str, Trace], *, bytes_per_token: float | None = None, **options) -> Explorer:
    """Watch what `traces` {policy: Trace} hold, step by step. bytes_per_token: of the cache, in all layers.

    A trace of (steps, layers, tokens) gets a control for the layer.
    """
    layers = checked(traces)
    pages = {name: Page(trace.tokens) for name, trace in traces.items()}
    traces = {n: Trace(t.tokens, t.held.detach().float().cpu(), t.first) for n, t in traces.items()}
    start = next(iter(traces))

    def last(policy: str) -> int:
        return len(traces[policy].held) - 1

    def within(controls) -> None:
        controls["step"].max = last(controls["policy"].value)

    def compute(policy, step, layer=ALL):
        trace = traces[policy]
        held = held_after(trace, step, None if layer == ALL else layer)
        seen, part = len(held.share), 1 if layer == ALL else 1 / layers
        stored = {} if bytes_per_token is None else {
            "held_bytes": held.mean * bytes_per_token * part,
            "full_cache_bytes": seen * bytes_per_token * part,
        }  # fmt: skip
        return {
            "tokens_seen": seen,
            "tokens_held": held.mean,
            "held_share": held.mean / seen,
            "in_every_cache": int((held.share >= 1).sum()),
            "in_none": int((held.share == 0).sum()),
            **stored,
            "oldest_held": "none"
            if held.oldest is None
            else f"{held.oldest + 1} {trace.tokens[held.oldest]!r}",
            "says": judge(policy, trace, held) + memory(stored),
            "page": (pages[policy], held, trace.first),
        }

    controls = {
        "policy": W.Dropdown(options=list(traces), value=start),
        "step": W.IntSlider(last(start), 0, last(start)),
    }
    if layers:
        controls["layer"] = W.Dropdown(options=[ALL, *range(layers)], value=ALL)
    high = (HEAD + HIGH * max(page.rows for page in pages.values()) + 8) / DPI
    return Explorer(
        compute, draw, name="cache_strip", size=(WIDTH, high), settle=within, **options, **controls
    )  # fmt: skip


def memory(stored: Mapping[str, float]) -> str:
    if not stored:
        return ""
    held, full = stored.values()
    return f" That takes {scaled(held, 'B')} instead of {scaled(full, 'B')}."
