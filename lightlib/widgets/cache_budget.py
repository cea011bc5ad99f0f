"""Cache budget: how long a text equal bytes hold, and what a smaller cache is worth where memory is short.

H2O (Zhang et al. 2023, arXiv:2306.14048) reports up to 29 times the throughput of systems that run few
sequences at once, 3 times that of FlexGen (Sheng et al. 2023, arXiv:2303.06865), which runs many.
All speeds here are bounds: links, memory and cores at work at the same time, and no room for activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import ipywidgets as W
from matplotlib.figure import Figure

from lightlib.report import tidy
from lightlib.widgets.anatomy import MODELS, Shape, flop_per_token, kv_cache_bytes, parameters
from lightlib.widgets.devices import GPUS, Device
from lightlib.widgets.explorer import Explorer
from lightlib.widgets.head_sharing import CONTEXTS, named
from lightlib.widgets.numbers import say, scaled
from lightlib.widgets.style import BLUE, GREEN, GREY, ORANGE, PALE, SKY, bar_rows, panels

GROUP, RESIDUAL = 32, 128  # numbers that share a scale and a zero point; newest tokens that stay in 16 bits
SHAPES = {
    # config.json of facebook/opt-*. No gate, biases everywhere: counted as GPT-2 but for 0.02 % of positions
    "OPT-30B": Shape(48, 7168, 56, 56, 128, 28672, 50272, True, "GPT-2"),
    "OPT-6.7B": Shape(32, 4096, 32, 32, 128, 16384, 50272, True, "GPT-2"),
    **MODELS,
}
# NVIDIA T4 data sheet: 16 GB at 300 GB/s, 65 TFLOPS in 16 bits
DEVICES = {"T4": Device("T4", 16, 300, 65_000), **GPUS}
# GB/s that copies reach, an assumption: about three quarters of the peaks 15.75, 31.5 and 63
LINKS = {"PCIe 3.0 x16": 12, "PCIe 4.0 x16": 24, "PCIe 5.0 x16": 48}
BUDGETS = ("beside the weights", *(2**k for k in range(8)))  # GB
BATCHES = (1, 2, 4, 8, 16, 32, 64, 96, 144, 256, 512, 1024)
KEEP = (5, 10, 20, 30, 50, 80, 100)  # %


@dataclass(frozen=True)
class Scheme:
    """How a cache is stored: bytes of a token, of each of the `residual` newest; share of tokens kept."""

    name: str
    token_bytes: float
    residual: int = 0
    residual_bytes: float = 0.0
    kept: float = 1.0

    def bytes_of(self, tokens: float) -> float:
        """Of a text of so many tokens."""
        stored, plain = tokens * self.kept, min(tokens * self.kept, self.residual)
        return plain * self.residual_bytes + (stored - plain) * self.token_bytes

    def tokens_in(self, budget: float) -> float:
        """The longest text whose cache takes `budget` bytes: the inverse of `bytes_of`."""
        first = self.residual * self.residual_bytes
        if budget <= first:
            return budget / self.residual_bytes / self.kept
        return (self.residual + (budget - first) / self.token_bytes) / self.kept


def schemes(shape: Shape, keep: float) -> list[Scheme]:
    """16 bits; 8, 4 and 2 with scales and a residual window; a share of the tokens; fewer KV heads."""
    full = kv_cache_bytes(shape, 1)
    rounded = [Scheme(f"int{bits}", full * (bits + 32 / GROUP) / 16, RESIDUAL, full) for bits in (8, 4, 2)]
    fewer = max(1, shape.kv_heads // 4)
    shared = [Scheme(named(shape.heads, fewer), full * fewer / shape.kv_heads)] * (fewer < shape.kv_heads)
    return [
        Scheme("full, 16 bits", full),
        *rounded,
        Scheme(f"evict to {100 * keep:.3g} %", full, kept=keep),
        *shared,
    ]


@dataclass(frozen=True)
class Memory:
    """Where the weights lie, and what is left on the GPU for the cache."""

    weights_bytes: float
    resident: bool  # all weights on the GPU; else they come over the link, layer by layer
    room_bytes: float


def memory(shape: Shape, device: Device) -> Memory:
    """Weights in 16 bits; where they do not fit, the GPU holds two layers, one at work and one arriving."""
    weights, size = 2.0 * sum(parameters(shape).values()), 1e9 * device.memory_gb
    resident = weights < size
    held = weights if resident else 2 * 2 * sum(shape.block_weights.values()) / shape.layers
    return Memory(weights, resident, max(size - held, 0))


@dataclass(frozen=True)
class Plan:
    """A system: sequences at once, the share of tokens that it keeps, whether the cache is off the GPU."""

    name: str
    batch: int
    kept: float
    away: bool
    color: str


def seconds(plan: Plan, shape: Shape, context: int, device: Device, link: float) -> dict[str, float]:
    """Least time of a decode step by what could bind it; the longest counts, all the others hidden behind it.

    link: GB/s between the GPU and the memory beside it.
    """
    where, tokens = memory(shape, device), plan.kept * context
    cache = kv_cache_bytes(shape, 1, plan.batch) * tokens
    flop = plan.batch * flop_per_token(shape, max(1, round(tokens)))[1]
    sent = (0 if where.resident else where.weights_bytes) + cache * plan.away
    return {
        "link": sent / link / 1e9,
        "memory": (where.weights_bytes + cache) / device.gb_per_s / 1e9,
        "compute": flop / device.gflop_per_s / 1e9,
    }


def largest_batch(shape: Shape, context: int, kept: float, device: Device) -> int:
    """Sequences whose caches fit beside the weights."""
    return int(memory(shape, device).room_bytes // (kv_cache_bytes(shape, 1) * kept * context))


def plans(shape: Shape, context: int, batch: int, few: int, keep: float, device: Device) -> list[Plan]:
    """Few sequences; all that fit; `batch` with the cache off the GPU; the last two with less kept."""
    whole, part = (largest_batch(shape, context, share, device) for share in (1, keep))
    less = f"{100 * keep:.3g} %"
    return [
        Plan("full, few sequences", min(few, whole), 1, False, GREY),
        Plan("full, all that fit", whole, 1, False, SKY),
        Plan("full, over the link", batch, 1, True, BLUE),
        Plan(f"{less}, over the link", batch, keep, True, ORANGE),
        Plan(f"{less}, all that fit", part, keep, False, GREEN),
    ]


def draw(fig: Figure, result: dict) -> None:
    """How long a text each scheme holds; how many tokens a second each plan makes at best."""
    left, right = panels(fig, (1, 1.15), (1.1, 1.6), right=0.1, top=0.42, bottom=0.35)
    held = result["held"]
    colors = [SKY, BLUE, BLUE, BLUE, GREEN, ORANGE][: len(held)]
    texts = [f"{tokens:,.0f}" for tokens in held.values()]
    bar_rows(left, list(held), list(held.values()), texts, colors, room=1.6)
    left.set_title(f"tokens of a text in {result['title'][0]}", fontsize=10, x=-0.4)

    made = result["made"]
    values = [rate for _, rate, _ in made]
    texts = [
        f"{say('fastest_tokens_per_s', rate).split()[0]} ({bound})" if rate else "none fits"
        for _, rate, bound in made
    ]
    names = [f"{plan.name}\nbatch {plan.batch:,}" for plan, _, _ in made]
    colors = [plan.color if rate else PALE for plan, rate, _ in made]
    bar_rows(right, names, values, texts, colors, bold=values.index(max(values)), room=2.0)
    right.set_title("tokens/s at best, and what bounds them", fontsize=10, x=-0.5)


def judge(made: list, where: Memory, link: str, device: str) -> str:
    """What each step has to wait for, and how much of the gain is batch and how much eviction."""
    few, slow, _ = made[0]
    weights, full = scaled(where.weights_bytes, "B"), max(rate for _, rate, _ in made[:3])
    best = max(rate for plan, rate, _ in made[3:])
    begin = (
        f"The weights, {weights}, fit into the memory ({device})"
        if where.resident
        else f"The weights, {weights}, do not fit ({device}): they come over {link} in every step, however "
        f"many sequences wait for them"
    )
    travel = f"against a whole cache that travels it gains {tidy(best / made[2][1])} times"
    if not slow:
        return f"{begin}. Beside them not one whole cache fits; where less is kept, {travel}. All are bounds."
    return (
        f"{begin}. With less kept the best plan makes {tidy(best / slow)} times the tokens of a batch of "
        f"{few.batch}: more sequences alone give {tidy(full / slow)}, eviction {tidy(best / full)} more; "
        f"{travel}. All are bounds."
    )


def cache_budget(model: str = "OPT-30B", device: str = "T4", **options) -> Explorer:
    """Explore `schemes` at equal bytes and the speed of `plans`, all by the roofline and a link.

    >>> cache_budget().result["kv_per_token_bytes"]
    1376256.0
    """
    for name, known in ((model, SHAPES), (device, DEVICES)):
        if name not in known:
            raise ValueError(f"cache_budget: no {name!r}; choose one of {', '.join(known)}")

    def compute(model, device, context, batch, few, keep, link, budget):
        shape, gpu, kept = SHAPES[model], DEVICES[device], keep / 100
        where = memory(shape, gpu)
        given = where.room_bytes if budget == BUDGETS[0] else 1e9 * budget
        made = []
        for plan in plans(shape, context, batch, few, kept, gpu):
            times = seconds(plan, shape, context, gpu, LINKS[link])
            bound = max(times, key=times.get)
            made.append((plan, plan.batch / times[bound], bound))
        return {
            "weights_bytes": where.weights_bytes,
            "weights_on_the_gpu": where.resident,
            "kv_per_token_bytes": kv_cache_bytes(shape, 1),
            "room_for_the_cache_bytes": where.room_bytes,
            "full_that_fit": made[1][0].batch,
            "evicted_that_fit": made[4][0].batch,
            "few_full_tokens_per_s": made[0][1],
            "link_full_tokens_per_s": made[2][1],
            "link_evicted_tokens_per_s": made[3][1],
            "says": judge(made, where, link, device),
            "made": made,
            "held": {s.name: s.tokens_in(given) for s in schemes(shape, kept)},
            "title": [f"{scaled(given, 'B')}" + (" (what is left)" if budget == BUDGETS[0] else "")],
        }

    presets = {
        f"{model} on {where}": {
            "model": model,
            "device": gpu,
            "context": context,
            "batch": batch,
            "link": link,
        }
        for model, where, gpu, context, batch, link in (
            # FlexGen's own batch of OPT-30B on this card; Accelerate ran 8 sequences, DeepSpeed 4
            ("OPT-30B", "a T4", "T4", 1024, 144, "PCIe 3.0 x16"),
            ("OPT-6.7B", "a T4", "T4", 1024, 64, "PCIe 3.0 x16"),
            ("Llama-2-7B", "an A100", "A100 80GB", 4096, 64, "PCIe 4.0 x16"),
        )
    }
    return Explorer(
        compute, draw, name="cache_budget", size=(8.6, 3.7), presets=presets, **options,
        model=W.Dropdown(options=list(SHAPES), value=model),
        device=W.Dropdown(options=list(DEVICES), value=device),
        context=W.SelectionSlider(options=CONTEXTS, value=1024),
        batch=W.SelectionSlider(options=BATCHES, value=144, description="large batch"),
        few=W.SelectionSlider(options=BATCHES, value=4, description="small batch"),
        keep=W.SelectionSlider(options=KEEP, value=20, description="tokens kept (%)"),
        link=W.Dropdown(options=list(LINKS)),
        budget=W.Dropdown(options=[(b if isinstance(b, str) else f"{b} GB", b) for b in BUDGETS]),
    )  # fmt: skip
