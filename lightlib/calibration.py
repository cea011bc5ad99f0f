"""The walk over a model's blocks, written once. The only file that hooks a model to watch it."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightlib.compact import CompactLinear, weight_of
from lightlib.decoder import Roles, check_linears, find_blocks, linear_shapes, linears, roles, stages
from lightlib.low_rank import CorrectedLinear, LowRankLinear, weight_bits
from lightlib.machine import matmul_rate
from lightlib.report import LayerReport, relative_error
from lightlib.statistic import AbsMax, Gram, Samples, SquaredNorm, together

__all__ = [
    "AbsMax",
    "Block",
    "Gram",
    "Samples",
    "SquaredNorm",
    "reading_attention",
    "starting_at",
    "stream_blocks",
    "time_linears",
    "together",
]


class AllSeen(Exception):
    """Raised inside a block's forward once every input asked for was seen: what follows is not needed."""


@dataclass
class Block:
    """One decoder block in the walk, with the inputs that reach it.

    `stages`: its linears in the order they run; those in one stage read the same input.
    """

    name: str
    module: nn.Module
    roles: Roles
    inputs: list[Tensor]  # a hidden state (batch, length, d_model) for each batch
    arguments: list[tuple[tuple, dict]]  # what else the model hands this block, for each batch
    rows: list[LayerReport] = field(default_factory=list)
    settled: dict[str, list] = field(default_factory=dict)  # what a part gave, for each batch
    room: int = 2**30  # bytes that `settled` may take; beyond it, parts are run again
    opened: dict[str, int] = field(default_factory=dict)  # bits that a layer took before `open`

    @property
    def linears(self) -> dict[str, nn.Linear | CompactLinear]:
        return linears(self.module)

    @property
    def dense(self) -> dict[str, nn.Linear]:
        """Those of its linears that no method has changed yet."""
        return {name: part for name, part in self.linears.items() if isinstance(part, nn.Linear)}

    @property
    def stages(self) -> list[tuple[str, ...]]:
        return stages(self.module, self.roles)

    @torch.no_grad()
    def open(self) -> dict[str, Tensor]:
        """Make pruned layers dense, to be packed anew; {linear: mask (out, in) of the weights it stored}."""
        masks = {}
        for name, part in self.linears.items():
            mask = part.mask() if isinstance(part, CompactLinear) else None
            if mask is not None:
                masks[name], self.opened[name] = mask, weight_bits(part)
                linear = nn.Linear(part.in_features, part.out_features, device="meta")
                values = next(part.parameters())
                linear.weight = nn.Parameter(part.dense(values.dtype), requires_grad=False)
                linear.bias = part.bias
                self.module.set_submodule(name, linear)
        return masks

    @torch.no_grad()
    def run(self) -> list[Tensor]:
        """The block's outputs as it is now."""
        with self._handing_back_what_is_settled() as batch:
            outputs = []
            for batch[0], x in enumerate(self.inputs):
                args, named = self.arguments[batch[0]]
                with suppress(AllSeen):
                    outputs.append(self.module(x, *args, **named))
        return outputs

    def collect(
        self, statistic: Callable[[int, torch.device], object], of: tuple[str, ...] | None = None
    ) -> dict:
        """{linear: statistic of its inputs} from a run over all batches; {} where there are none.

        Linears of one stage share one statistic. The run ends at the last input that is asked for.
        """
        if not self.inputs:
            return {}
        wanted = [[n for n in stage if of is None or n in of] for stage in self.stages]
        wanted, found, parts = [names for names in wanted if names], {}, self.linears
        hooks = []
        for names in wanted:
            one = statistic(parts[names[0]].in_features, self.inputs[0].device)
            found |= dict.fromkeys(names, one)
            hook = self._observer(one, last=names is wanted[-1])
            hooks.append(parts[names[0]].register_forward_pre_hook(hook))
        try:
            self.run()
        finally:
            for hook in hooks:
                hook.remove()
        return found

    @staticmethod
    def _observer(statistic, last: bool):
        def observe(_, args):
            statistic.add(args[0].detach().flatten(0, -2))
            if last:
                raise AllSeen

        return observe

    def settle(self, names: tuple[str, ...]) -> None:
        """These linears stay as they are from here on: later runs take their outputs from memory.

        Where all linears of a part (the attention, say) are settled, the part itself is.
        """
        self.settled |= {name: [] for name in names}
        for whole in {name.rpartition(".")[0] for name in names} - {""}:
            inside = {f"{whole}.{name}" for name in linears(self.module.get_submodule(whole))}
            if inside <= self.settled.keys():
                self.settled = {n: kept for n, kept in self.settled.items() if n not in inside} | {whole: []}

    @contextmanager
    def _handing_back_what_is_settled(self) -> Iterator[list[int]]:
        """While it lasts, settled parts give what they gave for batch [i] before."""
        batch = [0]

        def remembering(forward, kept):
            def run(*args, **named):
                if batch[0] < len(kept):
                    return kept[batch[0]]
                output = forward(*args, **named)
                if batch[0] == len(kept) and self._held() + held_bytes(output) <= self.room:
                    kept.append(output)
                return output

            return run

        parts = {name: self.module.get_submodule(name) for name in self.settled}
        try:
            for name, part in parts.items():
                part.forward = remembering(part.forward, self.settled[name])
            yield batch
        finally:
            for part in parts.values():
                vars(part).pop("forward", None)

    def _held(self) -> int:
        return sum(held_bytes(output) for kept in self.settled.values() for output in kept)

    def replace(
        self,
        method: str,
        name: str,
        new: CompactLinear | LowRankLinear | CorrectedLinear,
        gram: Tensor | None = None,
        notes: str = "",
        inputs: Tensor | None = None,
    ):
        """Put `new` where the linear `name` was and note what it costs.

        The error is that of its weights, or of its outputs over inputs with `gram`, or on `inputs` (tokens,
        in) where the new layer rounds its inputs too.
        """
        old = self.module.get_submodule(name)
        before, after = weight_of(old), new.dense()
        self.rows.append(
            LayerReport(
                method,
                f"{self.name}.{name}",
                (new.out_features, new.in_features),
                self.opened.get(name) or weight_bits(old),
                weight_bits(new),
                relative_error(before, after.to(before.device), gram)
                if inputs is None
                else output_error(before, old.bias, new, inputs),
                notes or ("error of the weights alone" if gram is None and inputs is None else ""),
            )
        )
        self.module.set_submodule(name, new.to(before.device))


def output_error(before: Tensor, bias: Tensor | None, new: nn.Module, inputs: Tensor) -> float:
    """||Y - Y'|| / ||Y|| on `inputs` (tokens, in), with what the new layer computes, without biases."""
    Y, shift = inputs @ before.T, 0 if bias is None else bias.float()
    return ((new.to(inputs.device)(inputs) - shift - Y).norm() / Y.norm().clamp_min(1e-30)).item()


def held_bytes(output) -> int:
    """Bytes of the tensors in what a module returned."""
    parts = output if isinstance(output, (tuple, list)) else (output,)
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))


@torch.no_grad()
def stream_blocks(
    model: nn.Module, batches: list[Tensor] | None = None, *, device=None, progress=True, title="blocks"
) -> Iterator[Block]:
    """Walk over the blocks; what a caller changes in one is what feeds the next.

    Each block gets the arguments that the model itself gives it (masks, positions, sliding windows). With
    `device`, only the block at hand is moved there. Without batches the blocks come without inputs.
    """
    check_linears(model)
    blocks = find_blocks(model)
    if batches and progress:
        title = f"{title}, {forecast(blocks, batches, device or next(model.parameters()).device)}"
    hidden, arguments = record(model, blocks, batches) if batches else ([], {name: [] for name in blocks})
    for name, module in tqdm(blocks.items(), desc=title, unit="block", disable=not progress):
        home = next(module.parameters(), next(module.buffers(), torch.empty(0))).device
        there = device or home
        entering = move(hidden, there), move(arguments.pop(name), there)
        block = Block(name, module.to(there), roles(model), *entering)
        yield block
        # nothing comes after the last block, so nothing needs its outputs
        hidden = block.run() if arguments else []
        module.to(home)


def forecast(blocks: dict[str, nn.Module], batches: list[Tensor], device) -> str:
    """What a walk with two passes over each block will take: "about 0.31 GB beside the model and 12 s"."""
    shapes = [linear_shapes(block) for block in blocks.values()]
    weights = sum(n_out * n_in for block in shapes for n_out, n_in in block.values())
    widest = max((n_in for block in shapes for _, n_in in block.values()), default=0)
    tokens, width = sum(ids.numel() for ids in batches), min(n for _, n in shapes[0].values())
    held = 4 * (2 * tokens * width + len(shapes[0]) * widest**2)  # states in and out, one statistic a layer
    seconds = 2 * 2 * weights * tokens / matmul_rate(str(device)) / 1e9
    return f"about {held / 1e9:.2g} GB beside the model and {max(seconds, 1):.0f} s"


def record(model: nn.Module, blocks: dict[str, nn.Module], batches: list[Tensor]):
    """For each batch the hidden state that enters the first block, and the arguments of each block.

    While recording, a block hands its input on unchanged, so this costs an embedding and a mask, no matmul.
    """
    hidden, arguments = [], {name: [] for name in blocks}
    first = next(iter(blocks))

    def stand_in(name):
        def forward(x, *args, **named):
            if name == first:
                hidden.append(x)
            arguments[name].append((args, named))
            return x

        return forward

    place = next(model.get_input_embeddings().parameters()).device
    try:
        for name, block in blocks.items():
            block.forward = stand_in(name)
        for ids in batches:
            model.base_model(ids.to(place), use_cache=False)
    finally:
        for block in blocks.values():
            vars(block).pop("forward", None)
    return hidden, arguments


@contextmanager
def starting_at(model: nn.Module, block: Block) -> Iterator[None]:
    """While it lasts, the model begins at `block`, with the inputs that reached it in the walk.

    Call the model with the walk's batches, all of them and in their order.
    """
    blocks = find_blocks(model)
    before = list(blocks)[: list(blocks).index(block.name)]
    inputs = itertools.cycle(block.inputs)

    def enter(_, *args, forward=block.module.forward, **named):
        return forward(next(inputs), *args, **named)

    try:
        for name in before:
            blocks[name].forward = lambda x, *_, **__: x
        block.module.forward = enter
        yield
    finally:
        for name in (*before, block.name):
            vars(blocks[name]).pop("forward", None)


@contextmanager
def reading_attention(model: nn.Module, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While it lasts, see(i, x) gets what the attention of block i reads (B, T, d_model), before it runs."""
    first = roles(model).attention_in[0]

    def observer(i):
        return lambda _, args: see(i, args[0])

    parts = [block.get_submodule(first) for block in find_blocks(model).values()]
    hooks = [part.register_forward_pre_hook(observer(i)) for i, part in enumerate(parts)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def time_linears(model: nn.Module, ids: Tensor, steps: int) -> tuple[dict[str, float], float]:
    """Median milliseconds of each linear layer in a decode step after the prompt `ids`, and of the step."""
    from lightlib.cost import generate

    parts = {name: model.get_submodule(name) for name in linear_shapes(model)}
    begun, times = {}, {name: [] for name in parts}

    def now() -> float:
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)
        return time.perf_counter()

    def start(name):
        return lambda *_: begun.update({name: now()})

    def stop(name):
        return lambda *_: times[name].append(now() - begun[name])

    hooks = [part.register_forward_pre_hook(start(name)) for name, part in parts.items()]
    hooks += [part.register_forward_hook(stop(name)) for name, part in parts.items()]
    try:
        whole = generate(model, ids, steps)
    finally:
        for hook in hooks:
            hook.remove()
    median = {name: statistics.median(found[1:]) * 1e3 for name, found in times.items()}
    return median, statistics.median(whole[1:]) * 1e3


def move(value, device):
    """`value` with every tensor in it on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: move(part, device) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(move(part, device) for part in value)
    return value
