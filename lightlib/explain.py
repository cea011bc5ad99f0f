"""Why is it not smaller, why is it not faster: where bytes and time go, real or simulated, layer by layer."""

from __future__ import annotations

import html
import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from lightlib.calibration import time_linears
from lightlib.compact import CompactLinear
from lightlib.cost import Size, generate, layer_flops, size
from lightlib.decoder import find_blocks, linear_shapes
from lightlib.low_rank import COMPOSITE, weight_bits
from lightlib.machine import Roofline, roofline
from lightlib.quality import device_of
from lightlib.report import bars, table, tidy


@dataclass(frozen=True)
class LayerFacts:
    """One linear layer at decode. `floor_ms`: the least time its bytes and FLOPs allow on this device."""

    name: str
    kind: str
    stored_bytes: int
    dense_bytes: int
    speed: str  # "dense", "real" or "simulated"
    path: str  # the operation that multiplies, or why none takes packed weights
    measured_ms: float
    floor_ms: float
    bound: str  # "memory", "compute" or "overhead"

    @property
    def of_roofline(self) -> float:
        """The share of the speed that its bytes and FLOPs allow here."""
        return self.floor_ms / self.measured_ms


@dataclass(frozen=True)
class Explanation:
    """`sentence` says it all; `layers` holds the facts. All times are of one decode step of one sequence."""

    sentence: str
    layers: tuple[LayerFacts, ...]
    tpot_ms: float
    linears_ms: float
    floor_ms: float  # the linear layers at the measured roofline
    size: Size
    roofline: Roofline

    @property
    def rest_ms(self) -> float:
        """Attention, norms, cache and Python: everything but the linear layers."""
        return max(self.tpot_ms - self.linears_ms, 0.0)

    def __repr__(self) -> str:
        return self.sentence

    def _repr_html_(self) -> str:
        parts = bars(
            [
                ("one output token, measured", self.tpot_ms, f"{self.tpot_ms:.1f} ms"),
                ("of which linear layers", self.linears_ms, f"{self.linears_ms:.1f} ms"),
                ("all else: attention, norms, dispatch", self.rest_ms, f"{self.rest_ms:.1f} ms"),
                ("what their bytes and FLOPs allow", self.floor_ms, f"{self.floor_ms:.1f} ms"),
            ]
        )
        kinds: dict[tuple, list[LayerFacts]] = {}
        for layer in self.layers:
            kinds.setdefault((layer.kind, layer.speed, layer.path, layer.bound), []).append(layer)
        head = (
            "layers",
            "kind",
            "speed",
            "path",
            "bound by",
            "stored MB",
            "dense MB",
            "ms a token",
            "floor ms",
            "of roofline",
        )
        keys = ("stored_bytes", "dense_bytes", "measured_ms", "floor_ms")
        lines = []
        for (kind, speed, path, bound), layers in kinds.items():
            stored, dense, ms, floor = (sum(getattr(x, key) for x in layers) for key in keys)
            numbers = map(tidy, (stored / 1e6, dense / 1e6, ms, floor))
            lines.append((len(layers), kind, speed, path, bound, *numbers, f"{floor / ms:.0%}"))
        return f"<p>{html.escape(self.sentence)}</p>{parts}{table(head, lines)}"


def explain(model: nn.Module, context: int = 64, steps: int = 8) -> Explanation:
    """Measure one decode step after a prompt of `context` tokens and say what holds this model back here."""
    find_blocks(model)
    device, dtype = device_of(model), model.dtype
    roof = roofline(device, dtype)
    ids = torch.arange(context, device=device)[None] % model.config.vocab_size
    generate(model, ids, 2)  # warm up
    times, tpot = time_linears(model, ids, steps)
    layers = tuple(
        _facts(model, name, shape, times[name], roof, device) for name, shape in linear_shapes(model).items()
    )
    weights = size(model)
    linears_ms = sum(layer.measured_ms for layer in layers)
    floor = sum(layer.floor_ms for layer in layers)
    sentence = (
        f"{_smaller(model, layers, weights)}; {_speed(layers)}; {_limit(layers, tpot, linears_ms, floor)}."
    )
    return Explanation(sentence, layers, tpot, linears_ms, floor, weights, roof)


def _facts(
    model, name: str, shape: tuple[int, int], measured_ms: float, roof: Roofline, device
) -> LayerFacts:
    part, dtype, weights = model.get_submodule(name), model.dtype, math.prod(shape)
    dense = weights * dtype.itemsize
    if isinstance(part, CompactLinear):
        path, reason = part.fast_path(dtype, device)
        stored, speed, path = part.stored_bits() // 8, "real" if path else "simulated", path or reason
    else:
        stored, speed, path = weight_bits(part) // 8, "dense", "aten::linear"
    memory, compute = roof.floor_ms(stored, 0), roof.floor_ms(0, layer_flops(part, shape, 1))
    floor = max(memory, compute)
    # three times its floor: neither bytes nor products explain the time
    bound = "overhead" if measured_ms > 3 * floor else "memory" if memory >= compute else "compute"
    return LayerFacts(name, type(part).__name__, stored, dense, speed, path, measured_ms, floor, bound)


def _smaller(model: nn.Module, layers: tuple[LayerFacts, ...], weights: Size) -> str:
    packed = sum(layer.stored_bytes for layer in layers if layer.speed != "dense")
    dtype, name = model.dtype, str(model.dtype).removeprefix("torch.")
    if not packed:
        factored = [part for part in model.modules() if isinstance(part, COMPOSITE)]
        whole = sum(part.in_features * part.out_features * dtype.itemsize for part in factored)
        saved = whole - sum(part.stored_bits() // 8 for part in factored)
        if saved > 0:
            return (
                f"Smaller, really: {weights.stored_bytes / 1e6:.4g} MB where whole matrices take "
                f"{(weights.stored_bytes + saved) / 1e6:.4g}, all of it {name}"
            )
        return f"Not smaller: nothing is packed, all {weights.stored_bytes / 1e6:.4g} MB are {name}"
    outside, dense_bytes = weights.stored_bytes - packed, weights.parameters * dtype.itemsize
    return (
        f"Smaller, really: {weights.stored_bytes / 1e6:.4g} MB where {name} takes {dense_bytes / 1e6:.4g}, "
        f"{outside / 1e6:.4g} of them dense (embedding, head, norms)"
    )


def _speed(layers: tuple[LayerFacts, ...]) -> str:
    packed = [layer for layer in layers if layer.speed != "dense"]
    simulated = [layer.path for layer in packed if layer.speed == "simulated"]
    if simulated:
        reason = Counter(simulated).most_common(1)[0][0]
        return f"its speed is simulated in {len(simulated)} of {len(packed)} packed layers, since {reason}"
    if packed:
        share = sum(layer.floor_ms for layer in packed) / sum(layer.measured_ms for layer in packed)
        return (
            f"its speed is real: {packed[0].path} multiplies the packed weights of all {len(packed)} layers, "
            f"at {share:.0%} of their roofline"
        )
    return "its speed is that of the dense model"


def _limit(layers: tuple[LayerFacts, ...], tpot: float, linears_ms: float, floor: float) -> str:
    facts = (
        f"a token takes {tpot:.3g} ms, {linears_ms:.3g} of them in linear layers, where its bytes and FLOPs "
        f"allow {floor:.3g}"
    )
    if tpot > 2 * linears_ms:
        return (
            f"{facts}: most of it is dispatch overhead outside them, which fewer bytes do not shorten and "
            "a compiled step does (lightlib.decode)"
        )
    spent = Counter()
    for layer in layers:
        spent[layer.bound] += layer.measured_ms
    held = {
        "memory": "moving weights is the limit, which fewer bytes shorten",
        "compute": "arithmetic is the limit, which fewer bytes do not shorten",
        "overhead": "most take over three times that, so overhead inside them is the limit, not bytes",
    }
    return f"{facts}: {held[spent.most_common(1)[0][0]]}"
