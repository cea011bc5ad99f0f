"""Models side by side under the common protocol: the before-and-after table of every lesson."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lightlib.compact import compact_layers
from lightlib.cost import latency, size
from lightlib.quality import device_of, divergence, perplexity
from lightlib.report import bars, table, tidy


@dataclass(frozen=True)
class Row:
    """One model under the protocol; `speed` says whether packed weights are multiplied as they are."""

    name: str
    dtype: str
    stored_mb: float
    resident_mb: float
    perplexity: float
    kl: float  # nats a token from the first model
    ttft_ms: float
    tpot_ms: float
    tokens_per_s: float
    peak_mb: float
    speed: str  # "dense", "real", "simulated", or "real in k of n"


@dataclass(frozen=True)
class Comparison:
    """Rows in the order the models were given; the first is the reference."""

    rows: tuple[Row, ...]

    def __getitem__(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def ratio(self, key: str, name: str) -> float:
        """Before / after of one column: `ratio("tpot_ms", "int4")` is 2 when int4 is twice as fast."""
        return getattr(self.rows[0], key) / getattr(self[name], key)

    def _repr_html_(self) -> str:
        head = tuple(key.replace("_", " ") for key in Row.__dataclass_fields__)
        lines = [tuple(tidy(getattr(row, key)) for key in Row.__dataclass_fields__) for row in self.rows]
        pictures = [
            f"<h4>{title}</h4>" + bars([(r.name, getattr(r, key), tidy(getattr(r, key))) for r in self.rows])
            for key, title in (
                ("stored_mb", "MB in a file"),
                ("perplexity", "perplexity"),
                ("tpot_ms", "ms a token"),
            )
        ]
        return table(head, lines) + "".join(pictures)

    def __repr__(self) -> str:
        keys = ("stored_mb", "perplexity", "kl", "ttft_ms", "tpot_ms", "speed")
        wide = max(len(row.name) for row in self.rows) + 2
        lines = ["".ljust(wide) + "".join(key.rjust(14) for key in keys)]
        lines += [
            r.name.ljust(wide) + "".join(tidy(getattr(r, key)).rjust(14) for key in keys) for r in self.rows
        ]
        return "\n".join(lines)


def compare(
    models: dict[str, nn.Module], tests: list[Tensor], *, prompt: int = 128, new: int = 32, batch: int = 1
) -> Comparison:
    """Measure each model: `perplexity`, `divergence` from the first, `size` and `latency`."""
    if not models:
        raise ValueError("no models: give {name: model}, the reference first")
    reference = next(iter(models.values()))
    return Comparison(tuple(_row(n, m, reference, tests, prompt, new, batch) for n, m in models.items()))


def _row(name, model, reference, tests, prompt, new, batch) -> Row:
    if model is reference:
        quality, kl = perplexity(model, tests), 0.0
    else:
        against = divergence(model, reference, tests)
        quality, kl = against.perplexity, against.mean_kl
    time = latency(model, prompt, new, batch)
    weights = size(model)
    return Row(
        name, time.dtype, weights.stored_bytes / 1e6, weights.resident_bytes / 1e6, quality, kl,
        time.ttft_ms, time.tpot_ms, time.tokens_per_s, time.peak_bytes / 1e6, speed(model),
    )  # fmt: skip


def speed(model: nn.Module) -> str:
    """Whether packed layers are multiplied as they are ("real") or decoded first ("simulated") at decode."""
    dtype, device = model.dtype, device_of(model)
    packed = compact_layers(model).values()
    real = sum(bool(part.fast_path(dtype, device)[0]) for part in packed)
    if not packed:
        return "dense"
    return {len(packed): "real", 0: "simulated"}.get(real, f"real in {real} of {len(packed)}")
