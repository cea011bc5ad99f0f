"""Numbers as a reader wants them. The end of a name is its unit: `kv_bytes`, `ttft_ms`, `memory_share`."""

from __future__ import annotations

import html
from collections.abc import Mapping

from lightlib.report import tidy

SCALED = {"_bytes": "B", "_flop": "FLOP", "_flop_per_s": "FLOP/s", "_bytes_per_s": "B/s", "_hz": "Hz"}
PLAIN = {"_ms": "ms", "_us": "µs", "_s": "s", "_tokens_per_s": "tokens/s"}
ACRONYMS = {
    "kv": "KV",
    "ttft": "TTFT",
    "tpot": "TPOT",
    "mlp": "MLP",
    "rms": "RMS",
    "csl": "CSL",
    "mse": "MSE",
    "csr": "CSR",
}


def unit_of(name: str) -> str:
    """The ending of `name` that is a unit, or ""; the longest wins."""
    endings = [end for end in (*SCALED, *PLAIN, "_share") if name.endswith(end)]
    return max(endings, key=len, default="")


def label(name: str) -> str:
    """`name` in words, without its unit.

    >>> label("kv_cache_bytes")
    'KV cache'
    """
    words = name.removesuffix(unit_of(name)).replace("_", " ").split()
    return " ".join(ACRONYMS.get(word, word) for word in words)


def say(name: str, value) -> str:
    """`value` with the unit that `name` ends in, and four significant digits.

    >>> say("weights_bytes", 16060522496)
    '16.06 GB'
    """
    unit = unit_of(name)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " to ".join(say(name, part) for part in value)
    if not isinstance(value, (int, float)):
        return str(value)
    if unit == "_share":
        return f"{100 * value:.0f} %"
    if unit in SCALED:
        return scaled(value, SCALED[unit])
    plain = f"{value:,.0f}" if isinstance(value, float) and abs(value) >= 1e4 else tidy(value)
    return f"{plain} {PLAIN[unit]}" if unit else plain


def scaled(value: float, unit: str) -> str:
    """`value` in thousands, millions ... of `unit` (decimal: 1 GB is 10^9 bytes)."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * 0.99995:
            return f"{value / factor:#.4g} {prefix}{unit}"
    return f"{tidy(value)} {unit}"


def shown(result: Mapping) -> dict:
    """What of a result is read: numbers and words; not arrays, tables or nothing."""
    return {name: value for name, value in result.items() if isinstance(value, (int, float, str))}


def table(result: Mapping) -> str:
    """The numbers side by side, each under its own `data-k`, and the sentence beneath."""
    numbers = {name: value for name, value in shown(result).items() if name != "says"}
    cells = "".join(
        f"<span style='white-space:nowrap'>{html.escape(label(name))}&nbsp; "
        f"<b data-k='{html.escape(name)}'>{html.escape(say(name, value))}</b></span>"
        for name, value in numbers.items()
    )
    says = f"<div data-k='says'>{html.escape(result['says'])}</div>" if "says" in result else ""
    return (
        "<div class='light-numbers' role='status' style='line-height:1.6;font-size:14px'>"
        f"<div style='display:flex;flex-wrap:wrap;gap:0 1.4em'>{cells}</div>{says}</div>"
    )
