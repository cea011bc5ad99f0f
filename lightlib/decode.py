"""The lean decode path: a static cache and one compiled step, so that fewer bytes are fewer milliseconds."""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, StaticLayer

from lightlib.decoder import find_blocks
from lightlib.one_row import write_as_sums

SHORTEST = 256  # tokens that a static cache holds at least
CACHE = "the cache"  # stands for it among the arguments of a region


def generate(model: nn.Module, ids: Tensor, new: int, compile: bool = True, stop: bool = True) -> Tensor:
    """Greedy decoding: ids (batch, prompt) -> (batch, prompt + new), or fewer once all sequences have ended.

    The tokens are those of `model.generate(ids, max_new_tokens=new, do_sample=False)`: with `stop`, a
    sequence ends at the model's end token and is padded from there on. compile=False is the plain loop over
    the model's own forward; so is what cannot be compiled, with a warning that says why (`lean_path`).
    The first compiled call takes 20 to 30 s for 30 blocks on two cores, about 10 s in later processes. It
    serves every call with as many sequences and a length up to the same power of two.
    Compiled code rounds less often, so bfloat16 logits that tie within a rounding may fall the other way.
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
    """The `new` greedy tokens after `ids` (batch, prompt), each (batch, 1). One lean stream at a time."""
    step = compiled_step(model, len(ids), ids.shape[1] + new) if compile else None
    yield from step.tokens(model, ids, new) if step else eager_tokens(model, ids, new)


def eager_tokens(model: nn.Module, ids: Tensor, new: int) -> Iterator[Tensor]:
    """The reference: the model's own forward with its own growing cache."""
    cache = DynamicCache(config=model.config)
    for _ in range(new):
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)
        yield ids


def check(model: nn.Module, ids: Tensor, new: int) -> None:
    if ids.dim() != 2 or not ids.numel():
        shape = tuple(ids.shape)
        raise ValueError(f"ids have shape {shape}, not (batch, prompt); use ids[None] for one prompt")
    if new < 1:
        raise ValueError(f"new={new}: must be at least 1")
    prompt, limit = ids.shape[1], getattr(model.config, "max_position_embeddings", None)
    if limit and prompt + new > limit:
        raise ValueError(
            f"prompt {prompt} + new {new} tokens exceed the model's context of {limit}; "
            f"take new={limit - prompt} or a shorter prompt"
        )


# which path
@dataclass
class Steps:
    """What was compiled for a model: a step for each (batch, length), or why none can be."""

    parts: list  # the modules and tensors that were compiled
    facts: tuple  # what else the compiled code relies on
    made: dict[tuple[int, int], Step] = field(default_factory=dict)
    failure: str = ""


STEPS: weakref.WeakKeyDictionary[nn.Module, Steps] = weakref.WeakKeyDictionary()


def lean_path(model: nn.Module) -> tuple[str, str]:
    """(path, reason): "lean" where a compiled step decodes this model, or "" and why eager PyTorch does.

    Before the first call this is what can be seen without compiling.
    """
    reason = obstacle(model) or steps_of(model).failure
    return ("", reason) if reason else ("lean", "")


def obstacle(model: nn.Module) -> str:
    """What can be seen to keep the model from the lean path, or ""."""
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
    tensors = [*model.parameters(), *model.buffers()]
    parts = [*[*model.modules()][1:], *tensors]
    places = [(t.stride(), t.data_ptr()) if t.layout is torch.strided else () for t in tensors]
    kinds = [(t.dtype, t.shape) for t in tensors]
    facts = kinds, places, model.config._attn_implementation, model.training, torch.get_num_threads()
    found = STEPS.get(model)
    same = found and found.facts == facts and len(found.parts) == len(parts)
    if not same or any(a is not b for a, b in zip(found.parts, parts, strict=True)):
        found = STEPS[model] = Steps(parts, facts)
    return found


@torch.inference_mode(False)
@torch.no_grad()
def compiled_step(model: nn.Module, batch: int, tokens: int) -> Step | None:
    """The step with room for `tokens`, compiled now if need be; None, with a warning, where that fails."""
    size = batch, max(SHORTEST, 1 << (tokens - 1).bit_length())
    if not lean_path(model)[1] and size not in steps_of(model).made:
        step, failure = None, ""
        try:
            step = Step(model, *size)
        except Exception as error:
            while inner := getattr(error, "inner_exception", None) or error.__cause__:
                error = inner
            failure = f"compiling failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        # asked for again: at their first call, packed layers may lay out their codes in other tensors
        steps = steps_of(model)
        steps.made[size], steps.failure = step, failure
    if reason := lean_path(model)[1]:
        warnings.warn(f"decoding eagerly, since {reason}", stacklevel=2)
        return None
    return steps_of(model).made[size]


# the compiled step
@dataclass
class Slots:
    """A block's keys and values (batch, heads, length, head_dim), written in place from `position` on."""

    keys: Tensor
    values: Tensor
    position: Tensor

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        places = torch.arange(keys.shape[2], device=keys.device) + self.position
        self.keys.index_copy_(2, places, keys)
        self.values.index_copy_(2, places, values)
        return self.keys, self.values


class Layer(StaticLayer):
    """Slots as a layer of a transformers cache. Windowed blocks keep all tokens too: a mask hides the rest.

    transformers' own layer counts its tokens; here one tensor counts for all blocks, so that a compiled block
    changes nothing that another one reads.
    """

    def __init__(self, length: int, position: Tensor):
        super().__init__(length)
        self.position = position

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        return Slots(self.keys, self.values, self.position).update(keys, values)

    def get_seq_length(self) -> Tensor:
        return self.position


class Step:
    """A decode step for `batch` sequences of up to `length` tokens, compiled, with the cache it writes to."""

    def __init__(self, model: nn.Module, batch: int, length: int):
        device = next(model.parameters()).device
        self.position = torch.zeros((), dtype=torch.long, device=device)  # of the token in `ids`
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.cache = Cache(layers=[Layer(length, self.position) for _ in find_blocks(model)])
        # eagerly first: that makes the cache's tensors, and packed layers lay out their codes
        prompt = torch.arange(4 * batch, device=device).view(batch, 4) % model.config.vocab_size
        self.prefill(model, prompt)
        expected = logits_after(model, self.ids, self.position, self.cache)
        self.forward = capture(model, self.ids, self.position, self.cache)
        self.verify(expected)
        self.run = cuda_graph(self.advance) if self.ids.is_cuda else self.advance

    @property
    def cache_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)

    def verify(self, expected: Tensor) -> None:
        """Compilers err too: the compiled step must give the logits that the model gives."""
        error = ((self.forward()[0] - expected).float().norm() / expected.float().norm()).item()
        if not error < torch.finfo(expected.dtype).eps ** 0.5:
            raise RuntimeError(f"the compiled step's logits are off by {error:.2g} of the model's")

    def prefill(self, model: nn.Module, ids: Tensor) -> None:
        self.position.zero_()
        self.ids.copy_(logits_after(model, ids, self.position, self.cache).argmax(-1))
        self.position.fill_(ids.shape[1])

    def advance(self) -> None:
        """Put in the place of `ids` the token after it. The compiled part changes nothing but the cache."""
        self.ids.copy_(self.forward()[1])
        self.position.add_(1)

    def tokens(self, model: nn.Module, ids: Tensor, new: int) -> Iterator[Tensor]:
        """An eager prefill, then one run a token."""
        self.prefill(model, ids)
        yield self.ids.clone()
        for _ in range(new - 1):
            self.run()
            yield self.ids.clone()


def logits_after(model: nn.Module, ids: Tensor, position: Tensor, cache: Cache) -> Tensor:
    """Logits (batch, 1, vocabulary) after `ids` (batch, length), whose first token stands at `position`."""
    places = (position + torch.arange(ids.shape[1], device=ids.device)).expand(len(ids), -1)
    out = model(ids, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1:]


def logits_and_token(model: nn.Module, ids: Tensor, position: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
    logits = logits_after(model, ids, position, cache)
    return logits, logits.argmax(-1)


def capture(model: nn.Module, *inputs) -> Callable[[], tuple[Tensor, Tensor]]:
    """`logits_and_token` compiled for these very tensors: no guard and none of the model's Python runs."""
    held = []

    def backend(graph, examples):
        if inputs[0].device.type == "cpu":
            write_as_sums(graph)
        # these tensors are all that it will ever see, so their sizes need no check at each token
        compiled = torch._inductor.compile(graph, examples, options={"size_asserts": False})

        def first(*tensors):
            held.append(functools.partial(compiled, *tensors))
            return compiled(*tensors)

        return first

    try:
        with regions(model):
            torch.compile(logits_and_token, backend=backend, fullgraph=True, dynamic=False)(model, *inputs)
    finally:
        # dynamo would keep the weights alive and hand this code to the next model
        torch._dynamo.eval_frame.remove_from_cache(logits_and_token)
    return held[0]


@contextlib.contextmanager
def regions(model: nn.Module):
    """While tracing, each block is a region of its own: equal blocks are traced and compiled once."""
    blocks = find_blocks(model).values()
    region = torch.compiler.nested_compile_region(run_block, max_reuse_entries=len(blocks))
    try:
        for i, block in enumerate(blocks):
            block.forward = functools.partial(enter, region, block, i)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def enter(region: Callable, block: nn.Module, i: int, *args, **named):
    """Call the block's region with its part of the cache as tensors: by a whole cache no two are alike."""
    cache = next(value for value in (*args, *named.values()) if isinstance(value, Cache))
    args = [CACHE if value is cache else value for value in args]
    named = {name: CACHE if value is cache else value for name, value in named.items()}
    layer = cache.layers[i]
    return region(block, layer.keys, layer.values, layer.position, args, named)


def run_block(block: nn.Module, keys: Tensor, values: Tensor, position: Tensor, args: list, named: dict):
    cache = Slots(keys, values, position)
    args = [cache if isinstance(value, str) else value for value in args]
    named = {name: cache if isinstance(value, str) else value for name, value in named.items()}
    return type(block).forward(block, *args, **named)


def cuda_graph(run: Callable[[], None]) -> Callable[[], None]:
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
