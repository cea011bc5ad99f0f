"""A model as plain Hugging Face files: every layer dense, for whatever reads Hugging Face models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lightlib.compact import CompactLinear, compact_layers
from lightlib.decoder import linear_shapes
from lightlib.persist import whole_or_nothing
from lightlib.zoo import quiet


def to_huggingface(model: nn.Module, folder: str | Path, tokenizer=None) -> Path:
    """Write the model with every compact layer decoded to the model's dtype, and the tokenizer if given.

    Plain transformers loads it with equal logits; it is as large as the dense model. What a layer does to its
    inputs (8-bit activations) is no part of its weight and is not written. Nothing is left behind if writing
    fails.
    Raises ValueError for a layer whose shape the model's config does not give (one pruned by itself).
    """

    def dense(name: str, layer: CompactLinear) -> dict[str, Tensor]:
        bias = {} if layer.bias is None else {"bias": layer.bias}
        return {"weight": layer.dense(model.dtype), **bias}

    return write(plain_model(model, dense), folder, tokenizer)


@torch.no_grad()
def plain_model(
    model: nn.Module, tensors_of: Callable[[str, CompactLinear], dict[str, Tensor]], conv1d: bool = True
) -> nn.Module:
    """What plain transformers builds from the config, holding the model's tensors; it shares the dense ones.

    A compact layer is represented by the tensors that `tensors_of(name, layer)` names. `conv1d=False` refuses
    models (GPT-2) whose plain form keeps such layers in a Conv1D, with its weight (in, out).
    """
    plain, compact = skeleton(model), compact_layers(model)
    check_shapes(model, plain)
    transposed = conv1d_names(plain) - conv1d_names(model)
    tensors = {name: t for name, t in model.state_dict().items() if name.rpartition(".")[0] not in compact}
    for name, layer in compact.items():
        if name in transposed and not conv1d:
            raise ValueError(
                f"{name}: plain {model.config.model_type!r} keeps it in a Conv1D, which readers of packed "
                "weights leave aside; write the model dense with to_huggingface, or packed with lightlib.save"
            )
        parts = tensors_of(name, layer)
        if "weight" not in parts:
            holder = nn.ParameterDict({key: nn.Parameter(t, False) for key, t in parts.items()})
            plain.set_submodule(name, holder)
        tensors |= {f"{name}.{key}": t for key, t in parts.items()}
    for name in transposed:
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].T.contiguous()
    try:
        plain.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ValueError(f"plain transformers cannot hold this model: {reason}; use lightlib.save") from error
    plain.tie_weights()
    return plain


def skeleton(model: nn.Module) -> nn.Module:
    """The plain model of the same config, without weights."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    # a model that was read from a quantized file remembers it there, and what we write is no longer that file
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.generation_config = model.generation_config
    return plain


def check_shapes(model: nn.Module, plain: nn.Module) -> None:
    """Raise ValueError unless every linear layer is as large as the config says, as in `plain`."""
    ours, theirs = linear_shapes(model), linear_shapes(plain)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{name} is {ours.get(name)} (out, in), and the config says {theirs.get(name)}, so only "
                "lightlib can load it: use lightlib.save"
            )


def conv1d_names(model: nn.Module) -> set[str]:
    """The layers that transformers stores as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return {name for name, part in model.named_modules() if isinstance(part, Conv1D)}


def write(plain: nn.Module, folder: str | Path, tokenizer) -> Path:
    """`plain` and the tokenizer as transformers writes them, in `folder`; all files or none."""
    folder = Path(folder).expanduser()
    n_bytes = sum(t.numel() * t.element_size() for t in plain.parameters())
    with quiet(), whole_or_nothing(folder, n_bytes) as draft:
        plain.save_pretrained(draft, max_shard_size="50GB")
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
    return folder
