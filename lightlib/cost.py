"""What a model costs: bytes, FLOPs, and time per token on this device."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightlib.compact import CompactLinear, compact_layers
from lightlib.decoder import attention_width, find_blocks, linear_shapes, roles
from lightlib.quality import device_of
from lightlib.report import bars, facts_table, table, tidy


@dataclass(frozen=True)
class Size:
    """`stored_bytes`: what a file holds; `resident_bytes`: what memory holds. Shared tensors count once."""

    parameters: int
    stored_bytes: int
    resident_bytes: int

    def _repr_html_(self) -> str:
        return facts_table(self, ("stored_bytes", "resident_bytes"))


def size(model: nn.Module) -> Size:
    """Weights as the dense model would count them, bytes in a file, bytes in memory now."""
    packed = compact_layers(model)
    parameters = sum(part.in_features * part.out_features for part in packed.values())
    stored_bits = sum(part.stored_bits() for part in packed.values())
    seen = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.rpartition(".")[0] in packed:
            parameters += tensor.numel() if name.endswith(".bias") else 0
        elif tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            stored_bits += tensor.numel() * tensor.element_size() * 8
            parameters += tensor.numel() if isinstance(tensor, nn.Parameter) else 0
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return Size(parameters, stored_bits // 8, sum(storages.values()))


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, a multiply and an add being two, for one token of a batch of one."""

    prefill_per_token: int
    decode_per_token: int
    context: int

    def _repr_html_(self) -> str:
        return facts_table(self, ("prefill_per_token", "decode_per_token"))


def flops(model: nn.Module, context: int = 256) -> Flops:
    """FLOPs a token: 2 x in x out for every linear layer, and 4 x heads x head_dim x context for attention.

    A layer held in factors takes those of its cheapest order, which may be another one for a whole prompt.

    Prefill of `context` tokens multiplies the whole square of scores, as kernels do that skip nothing; the
    head is counted for the last token only. Elementwise work and lookups count nothing.
    """
    blocks, names = find_blocks(model).values(), roles(model)

    def in_blocks(tokens: int) -> int:
        return sum(
            layer_flops(block.get_submodule(name), shape, tokens)
            for block in blocks
            for name, shape in linear_shapes(block).items()
        )

    head = model.get_output_embeddings()
    head_flops = 2 * math.prod(getattr(head, "products", (head.out_features, head.in_features)))
    attention = 4 * context * sum(attention_width(block, names) for block in blocks)
    prefill = in_blocks(context) // context + attention + head_flops // context
    return Flops(prefill, in_blocks(1) + attention + head_flops, context)


def layer_flops(layer: nn.Module, shape: tuple[int, int], tokens: int) -> int:
    """FLOPs of a layer of this shape (out, in) for so many tokens."""
    return layer.flops_for(tokens) if isinstance(layer, CompactLinear) else 2 * tokens * math.prod(shape)


@dataclass(frozen=True)
class Latency:
    """Greedy decoding: medians over repeats; `*_spread_ms` is the range between the quartiles.

    ttft: time to the first token (the prompt's prefill). tpot: time per output token after it.
    total_ms = ttft_ms + tpot_ms x new. tokens_per_s counts the new tokens of the whole batch.
    peak_bytes: resident weights, cache and the largest set of activations.
    path: "eager", "lean", or "eager, since" and why the lean path could not be taken.
    """

    ttft_ms: float
    ttft_spread_ms: float
    tpot_ms: float
    tpot_spread_ms: float
    total_ms: float
    tokens_per_s: float
    peak_bytes: int
    prompt: int
    new: int
    batch: int
    device: str
    dtype: str
    path: str = "eager"

    def _repr_html_(self) -> str:
        return facts_table(self, ("ttft_ms", "tpot_ms", "total_ms"))


def latency(
    model: nn.Module, prompt: int = 256, new: int = 64, batch: int = 1, repeats: int = 3, lean: bool = False
) -> Latency:
    """Time a prefill of `prompt` tokens and `new` decode steps through the model's own forward.

    With `lean`, the steps run compiled (lightlib.decode), where that is possible; what it takes to compile is
    not counted. The prompt is fixed and arbitrary. One run warms up. Raises ValueError where prompt + new
    exceeds the context.
    """
    from lightlib.decode import compiled_step, lean_path, stream

    limit = getattr(model.config, "max_position_embeddings", None)
    if min(prompt, new, batch, repeats) < 1:
        raise ValueError(
            f"prompt={prompt}, new={new}, batch={batch}, repeats={repeats}: all must be at least 1"
        )
    if limit and prompt + new > limit:
        raise ValueError(f"prompt {prompt} + new {new} tokens exceed the model's context of {limit}")
    device = device_of(model)
    ids = torch.arange(batch * prompt, device=device).view(batch, prompt) % min(model.config.vocab_size, 1000)
    step = compiled_step(model, batch, prompt + new + 1) if lean else None

    def run(steps: int) -> list[float]:
        return clock(stream(model, ids, new + 1, compile=lean), steps + 1)

    run(min(2, new))
    runs = [run(new) for _ in range(repeats)]
    first = [run[0] for run in runs]
    steps = [step for run in runs for step in run[1:]]
    ttft, tpot = (statistics.median(times) * 1e3 for times in (first, steps))
    return Latency(
        ttft, spread(first) * 1e3, tpot, spread(steps) * 1e3,
        total_ms=ttft + tpot * new,
        tokens_per_s=batch * new / (ttft + tpot * new) * 1e3,
        peak_bytes=peak_bytes(model, lambda: run(1), step.cache_bytes if step else 0),
        prompt=prompt, new=new, batch=batch,
        device=device_name(device), dtype=str(model.dtype).removeprefix("torch."),
        path="lean" if step else f"eager, since {lean_path(model)[1]}" if lean else "eager",
    )  # fmt: skip


@dataclass(frozen=True)
class Throughput:
    """`Latency` at each batch size. Decoding a batch reads the weights once for all its sequences."""

    runs: tuple[Latency, ...]

    def __iter__(self):
        return iter(self.runs)

    def _repr_html_(self) -> str:
        lines = [(r.batch, tidy(r.ttft_ms), tidy(r.tpot_ms), tidy(r.tokens_per_s)) for r in self.runs]
        picture = [
            (f"batch {r.batch}", r.tokens_per_s, f"{tidy(r.tokens_per_s)} tokens/s") for r in self.runs
        ]
        return table(("batch", "ttft ms", "tpot ms", "tokens/s"), lines) + bars(picture)


def throughput(
    model: nn.Module, batches: tuple[int, ...] = (1, 2, 4, 8), prompt: int = 64, new: int = 16
) -> Throughput:
    """`latency` at each batch size, prefill included in the tokens a second."""
    return Throughput(tuple(latency(model, prompt, new, batch, repeats=1) for batch in batches))


def generate(model: nn.Module, ids: Tensor, new: int) -> list[float]:
    """Seconds of the prefill, then of each of `new` greedy steps, with the model's own forward and cache."""
    from lightlib.decode import stream

    return clock(stream(model, ids, new + 1, compile=False), new + 1)


def clock(tokens: Iterator[Tensor], count: int) -> list[float]:
    """Seconds that each of the first `count` tokens takes to come."""
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        token = next(tokens)
        if token.is_cuda:
            torch.cuda.synchronize(token.device)
        times.append(time.perf_counter() - begin)
    return times


def spread(times: list[float]) -> float:
    """Range between the quartiles; of one time, zero."""
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return high - low


@torch.no_grad()
def peak_bytes(model: nn.Module, work: Callable[[], object], kept: int = 0) -> int:
    """The most bytes that tensors hold during `work`, the model's own and those `kept` beside it included."""
    device = device_of(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would write two lines to stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
        work()
    held = peak = 0
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return size(model).resident_bytes + kept + peak


def device_name(device: torch.device) -> str:
    """What the device is called, with the threads in use on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
