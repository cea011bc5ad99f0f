"""The lean decode path: a static cache and one compiled step, so that fewer bytes become fewer milliseconds."""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightlib.decoder import find_blocks

SHORTEST = 256  # tokens that a static cache holds at least
LANES = 4  # rows of a weight that one pass over the input multiplies


def generate(model: nn.Module, ids: Tensor, new: int, compile: bool = True, stop: bool = True) -> Tensor:
    """Greedy decoding: ids (batch, prompt) -> (batch, prompt + new), or fewer where all sequences have ended.

    The tokens are those of `model.generate(ids, max_new_tokens=new, do_sample=False)`: with `stop`, a sequence
    ends at the model's end token and is padded from there. With compile=False this is the plain loop over
    the model's own forward. The first compiled call takes about 20 s for 30 blocks on two cores and 10 s in
    later processes; calls with as many sequences, and up to the next power of two in length, reuse it.
    In bfloat16 compiled code rounds less often, so tokens whose logits tie within a rounding may differ.
    `ids` hold no padding. Raises ValueError for ids of another shape, new < 1, or a context exceeded.
    """
    check(model, ids, new)
    settings = model.generation_config
    ends = torch.tensor(settings.eos_token_id if stop and settings.eos_token_id is not None else [])
    ends = ends.to(ids).flatten()
    ended = torch.zeros_like(ids[:, :1], dtype=torch.bool)
    for token in stream(model, ids, new, compile):
        if len(ends):
            token = token.where(~ended, ends[0] if settings.pad_token_id is None else settings.pad_token_id)
            ended |= torch.isin(token, ends)
        ids = torch.cat([ids, token], 1)
        if len(ends) and ended.all():
            break
    return ids


@torch.inference_mode(False)
@torch.no_grad()
def stream(model: nn.Module, ids: Tensor, new: int, compile: bool = True) -> Iterator[Tensor]:
    """The `new` greedy tokens after `ids` (batch, prompt), each (batch, 1), as they come; one stream at a time."""
    step = compiled_step(model, len(ids), ids.shape[1] + new) if compile else None
    yield from step.tokens(model, ids, new) if step else eager_tokens(model, ids, new)


def eager_tokens(model: nn.Module, ids: Tensor, new: int) -> Iterator[Tensor]:
    """The reference: the model's own forward with its own growing cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for _ in range(new):
        ids = next_token(model, ids, cache)
        yield ids


def next_token(model: nn.Module, ids: Tensor, cache) -> Tensor:
    """The likeliest token (batch, 1) after `ids` (batch, length) and what the cache holds."""
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1:].argmax(-1)


def check(model: nn.Module, ids: Tensor, new: int) -> None:
    if ids.dim() != 2 or not ids.numel():
        raise ValueError(
            f"ids has shape {tuple(ids.shape)}, not (batch, prompt); use ids[None] for one prompt"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if new < 1:
        raise ValueError(f"new={new}: must be at least 1")
    if limit and ids.shape[1] + new > limit:
        raise ValueError(
            f"prompt {ids.shape[1]} + new {new} tokens exceed the model's context of {limit}; "
            f"take new={max(limit - ids.shape[1], 0)} or a shorter prompt"
        )


# which path
@dataclass
class Steps:
    """What was compiled for a model: a step for each (batch, length), or why none could be."""

    facts: tuple
    made: dict[tuple[int, int], Step] = field(default_factory=dict)
    failure: str = ""


STEPS: weakref.WeakKeyDictionary[nn.Module, Steps] = weakref.WeakKeyDictionary()


def lean_path(model: nn.Module) -> tuple[str, str]:
    """(path, reason): "lean" where a compiled step decodes this model, or "" and why eager PyTorch does."""
    reason = obstacle(model) or steps_of(model).failure
    return ("", reason) if reason else ("lean", "")


def obstacle(model: nn.Module) -> str:
    """What can be seen, before compiling, to keep the model from the lean path."""
    try:
        find_blocks(model)
    except ValueError as error:
        return str(error)
    devices = {str(tensor.device) for tensor in [*model.parameters(), *model.buffers()]}
    if len(devices) > 1 or devices.pop().partition(":")[0] not in ("cpu", "cuda"):
        return "its tensors do not lie on one CPU or CUDA device"
    for name, part in model.named_modules():
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            return f"{name or type(model).__name__} carries hooks, which a compiled step would not run"
    return ""


def steps_of(model: nn.Module) -> Steps:
    """The model's compiled steps; none, once its layers or tensors are others than those compiled."""
    parts, tensors = [*model.modules()][1:], [*model.parameters(), *model.buffers()]
    facts = (
        [(t.dtype, t.shape, t.stride(), t.data_ptr()) for t in tensors],
        model.config._attn_implementation,
        model.training,
        torch.get_num_threads(),
    )
    found = STEPS.get(model)
    same = (
        found
        and found.facts[2:] == facts
        and is_each(found.facts[0], parts)
        and is_each(found.facts[1], tensors)
    )
    if not same:
        found = STEPS[model] = Steps((parts, tensors, *facts))
    return found


def is_each(these: list, those: list) -> bool:
    return len(these) == len(those) and all(a is b for a, b in zip(these, those, strict=True))


def compiled_step(model: nn.Module, batch: int, tokens: int) -> Step | None:
    """The step with room for `tokens`, compiled now if need be; None, with a warning, where that fails."""
    length = max(SHORTEST, 1 << (tokens - 1).bit_length())
    reason, steps = obstacle(model), steps_of(model)
    if not reason and not steps.failure and (batch, length) not in steps.made:
        try:
            step = Step(model, batch, length)
            # laying out packed codes gave the model other tensors
            steps = steps_of(model)
            steps.made[batch, length] = step
        except Exception as error:
            while error.__cause__:
                error = error.__cause__
            steps = steps_of(model)
            steps.failure = f"compiling failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    if reason := reason or steps.failure:
        warnings.warn(f"decoding eagerly, since {reason}", stacklevel=4)
        return None
    return steps.made[batch, length]


# the compiled step
class Step:
    """One decode step for `batch` sequences of up to `length` tokens, compiled, with the cache it writes to."""

    def __init__(self, model: nn.Module, batch: int, length: int):
        from transformers.cache_utils import Cache, StaticLayer

        # windowed layers keep all tokens too: the model's own mask hides what lies outside the window
        self.cache = Cache(layers=[StaticLayer(length) for _ in find_blocks(model)])
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=next(model.parameters()).device)
        # an eager step first: it makes the cache's tensors, and packed layers lay out their codes
        next_token(model, self.ids, self.cache)
        run = capture(model, self.ids, self.cache)
        self.run = cuda_graph(run) if self.ids.is_cuda else run

    def tokens(self, model: nn.Module, ids: Tensor, new: int) -> Iterator[Tensor]:
        """Prefill in eager mode, then one run a token."""
        self.cache.reset()
        self.ids.copy_(next_token(model, ids, self.cache))
        yield self.ids.clone()
        for _ in range(new - 1):
            self.run()
            yield self.ids.clone()


def advance(model: nn.Module, ids: Tensor, cache) -> None:
    """Put in the place of `ids` (batch, 1) the token after it."""
    with OneToken():
        ids.copy_(next_token(model, ids, cache))


def capture(model: nn.Module, ids: Tensor, cache) -> Callable[[], object]:
    """`advance`, compiled, on these very tensors: no Python of the model's and no guard runs at a token."""
    held = []

    def backend(graph, examples):
        # else the norm before a product would be computed anew for each row of the weight
        compiled = torch._inductor.compile(graph, examples, {"realize_cpu_opcount_threshold": 1})

        def first(*tensors):
            held.append(functools.partial(compiled, *tensors))
            return compiled(*tensors)

        return first

    try:
        with regions(model):
            torch.compile(advance, backend=backend, fullgraph=True, dynamic=False)(model, ids, cache)
    finally:
        # dynamo would keep the weights alive, and hand this code to the next model
        torch._dynamo.eval_frame.remove_from_cache(advance)
    return held[0]


@contextlib.contextmanager
def regions(model: nn.Module):
    """While tracing, each block is a region of its own: equal blocks are compiled once."""
    region = torch.compiler.nested_compile_region(run_block)
    blocks = find_blocks(model).values()
    try:
        for block in blocks:
            block.forward = functools.partial(region, block)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def run_block(block: nn.Module, *args, **named):
    with OneToken():
        return type(block).forward(block, *args, **named)


def cuda_graph(run: Callable[[], object]) -> Callable[[], None]:
    """`run` as a CUDA graph: one launch for all its kernels. Its tensors must stay where they are."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class OneToken(TorchFunctionMode):
    """On a CPU, write products with a single row as sums, which compile into loops at memory speed.

    A library's matmul is called for each layer and reads a bfloat16 weight at half the speed of memory;
    a sum fuses with what comes before and after it, so that a block becomes one function.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].device.type == "cpu":
            if function is F.linear and args[0].numel() == args[0].shape[-1]:
                return row_linear(*args, **kwargs)
            if function is torch._weight_int8pack_mm and len(args[0]) == 1:
                return row_times(args[0], args[1], args[2])
            if function is F.scaled_dot_product_attention and args[0].shape[2] == 1:
                return one_query(*args, **kwargs)
        return function(*args, **kwargs)


def row_linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) of one row times W (out, in), plus bias: (..., out)."""
    y = row_times(x.reshape(1, -1), W)
    return (y if bias is None else y + bias).view(*x.shape[:-1], -1)


def row_times(x: Tensor, W: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """x (1, in) times W (out, in), each output times its scale: (1, out), summed in float32."""
    # lanes of equal shape fuse into one loop: four rows are read at once for each value of x
    lanes = W.chunk(LANES) if len(W) % LANES == 0 else [W]
    y = torch.cat([(x * lane).sum(-1, dtype=torch.float32) for lane in lanes])
    return (y * scale).to(x.dtype)[None]


def one_query(
    q: Tensor, k: Tensor, v: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **named
):
    """Attention of one query q (batch, heads, 1, d) over k, v (batch, heads, keys, d), in float32."""
    if attn_mask is None or attn_mask.dtype != torch.bool or named:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, **named
        )
    scores = (q * k).sum(-1, dtype=torch.float32) * (scale or q.shape[-1] ** -0.5)  # (batch, heads, keys)
    weights = scores.where(attn_mask[:, :, 0], -torch.inf).softmax(-1)
    return (weights[..., None] * v).sum(2, dtype=torch.float32).to(q.dtype)[:, :, None]
