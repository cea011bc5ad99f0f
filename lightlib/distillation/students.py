"""A student cut from its teacher: some of the blocks, with their weights. Sanh et al. 2019, arXiv:1910.01108.

What was pruned, sliced, factorized or quantized is a student too; those come from the other methods.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightlib.compact import compact_layers
from lightlib.decoder import check_linears, check_table, find_blocks, roles
from lightlib.quality import device_of


@torch.no_grad()
def fewer_layers(teacher: nn.Module, *, keep: int | Sequence[int]) -> nn.Module:
    """A plain model with some of the teacher's blocks, copied, and all that stands around them.

    keep: how many blocks, evenly spaced from the first to the last; or which, by their index. All of them
    give a copy of the teacher. The student is a Hugging Face model of its own, with a config that says how
    many blocks it has. Raises ValueError for indices that are not there, and for a teacher that is no plain
    model: shrink first, compress after.
    """
    kept = chosen(len(find_blocks(teacher)), keep)
    check_plain(teacher)
    student = unfilled(teacher, kept)
    path = roles(teacher).blocks + "."
    for name, part in student.named_modules():
        if name.startswith(path):
            place, _, inside = name.removeprefix(path).partition(".")
            name = f"{path}{kept[int(place)]}" + ("." + inside if inside else "")
        fill(part, teacher.get_submodule(name))
    return student.to(device_of(teacher)).eval()


def spaced(n: int, count: int) -> list[int]:
    """`count` of n indices, evenly, with the first and the last; one alone is the first.

    >>> spaced(6, 3)
    [0, 2, 5]
    """
    return [round(i * (n - 1) / max(count - 1, 1)) for i in range(count)]


def chosen(n: int, keep: int | Sequence[int]) -> list[int]:
    """The indices to keep, rising."""
    if isinstance(keep, int):
        if not 1 <= keep <= n:
            raise ValueError(f"keep={keep}: the teacher has {n} blocks; keep 1 to {n}")
        return spaced(n, keep)
    kept = list(keep)
    if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < n:
        raise ValueError(f"keep={kept}: give rising indices of blocks, from 0 to {n - 1}")
    return kept


def check_plain(teacher: nn.Module) -> None:
    check_linears(teacher, whole=True)
    check_table(teacher)
    packed = compact_layers(teacher)
    if packed or hasattr(teacher, "structure"):
        what = next(iter(packed), "its structure")
        raise ValueError(
            f"this teacher was compressed ({what}); shrink it first and compress the student after"
        )
    if getattr(teacher.config, "scale_attn_by_inverse_layer_idx", False):
        raise ValueError(
            "scale_attn_by_inverse_layer_idx: a block's number scales its attention, so none can take "
            "another's place"
        )


def unfilled(teacher: nn.Module, kept: list[int]) -> nn.Module:
    """What transformers builds from the config with these blocks alone; its weights have no values yet."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(teacher.config)
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(kept)
    if kinds is not None:
        config.layer_types = [kinds[i] for i in kept]
    # weights that nobody draws leave the caller's generators as they are
    with no_init_weights():
        student = AutoModelForCausalLM.from_config(
            config, dtype=teacher.dtype, attn_implementation=teacher.config._attn_implementation
        )
    student.tie_weights()
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def fill(part: nn.Module, source: nn.Module) -> None:
    """Give a module's own parameters the values of `source`'s, in their dtype."""
    for key, weight in part.named_parameters(recurse=False):
        weight.data = as_held(part, key, source).clone(memory_format=torch.contiguous_format)


def as_held(part: nn.Module, key: str, source: nn.Module) -> Tensor:
    """The value of source's parameter `key` as `part` holds it: GPT-2's Conv1D holds a linear's (in, out)."""
    from transformers.pytorch_utils import Conv1D

    value = getattr(source, key).detach()
    turned = key == "weight" and isinstance(part, Conv1D) and not isinstance(source, Conv1D)
    return value.T if turned else value
