"""Save and load: what comes back is bit-equal, or it is an error."""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightlib.compact import CompactLinear, compact_layers
from lightlib.decoder import find_blocks, use_linear_everywhere
from lightlib.fetch import make_room

WEIGHTS = "lightlib.safetensors"


def save(model: nn.Module, folder: str | Path, tokenizer=None) -> Path:
    """Write the model, and the tokenizer if given, into `folder`; `load` reads it back bit-equal.

    A model with compact layers gets the model type "lightlib", which plain transformers refuses by name. A
    model of plain layers is written as a plain Hugging Face model. Nothing is left behind if writing fails.
    """
    folder = Path(folder).expanduser()
    tensors = stored_tensors(model)
    with whole_or_nothing(folder, sum(t.numel() * t.element_size() for t in tensors.values())) as draft:
        if compact_layers(model) or hasattr(model, "structure"):
            save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
            (draft / "config.json").write_text(json.dumps(_config(model), indent=2))
            if model.can_generate():
                model.generation_config.save_pretrained(draft)
        else:
            model.save_pretrained(draft, max_shard_size="50GB")
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
    return folder


@contextlib.contextmanager
def whole_or_nothing(folder: Path, n_bytes: int) -> Iterator[Path]:
    """An empty folder with room for `n_bytes`; its files move into `folder` when all are written, or none."""
    make_room(folder.parent, n_bytes)
    # a folder that is there may be another disk than its parent, and files move within one disk only
    place = folder if folder.is_dir() else folder.parent
    draft = Path(tempfile.mkdtemp(dir=place, prefix=f".{folder.name}-"))
    try:
        yield draft
        folder.mkdir(exist_ok=True)
        for file in draft.iterdir():
            file.replace(folder / file.name)
    except OSError as error:
        raise OSError(f"{folder} could not be written ({error}); nothing was left half-written") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load(folder: str | Path, *, device: str | torch.device = "cpu") -> nn.Module:
    """The model that `save` wrote, in evaluation mode. Raises ValueError for missing or left-over tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json, so no model")
    written = json.loads((folder / "config.json").read_text())
    if written["model_type"] != "lightlib":
        from lightlib.zoo import load_plain

        return load_plain(folder, "auto", torch.device(device))
    base = dict(written["base"])
    config = AutoConfig.for_model(base.pop("model_type"), **base)
    with torch.device("meta"):
        model = use_linear_everywhere(AutoModelForCausalLM.from_config(config))
        structure = written.get("structure", [])
        for function, settings in structure:
            _ours(function)(model, **settings)
        if structure:
            model.structure = structure
    for name, row in written["layers"].items():
        model.set_submodule(name, _layer(row))
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder / WEIGHTS} is damaged or missing ({error}); save the model again"
        ) from error
    _fill(model, tensors, str(folder))
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(device).eval()


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a file of this model holds, by name; a tensor with two names is held once.

    Buffers that transformers recomputes (rotary frequencies) are held too: then nothing is left to chance.
    """
    packed = compact_layers(model)
    tensors = {f"{name}.{key}": t for name, layer in packed.items() for key, t in layer.stored().items()}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.rpartition(".")[0] not in packed:
            tensors[name] = tensor.detach()
    return {name: t.cpu().contiguous() for name, t in tensors.items()}


def _config(model: nn.Module) -> dict:
    find_blocks(model)
    return {
        "model_type": "lightlib",
        "architectures": ["LightlibForCausalLM"],
        "base": {**model.config.to_dict(), "model_type": model.config.model_type},
        "structure": getattr(model, "structure", []),
        "layers": {name: _describe(layer) for name, layer in compact_layers(model).items()},
    }


def _describe(layer: CompactLinear) -> dict:
    return {
        "class": f"{type(layer).__module__}:{type(layer).__name__}",
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": None if layer.bias is None else str(layer.bias.dtype).removeprefix("torch."),
        "settings": layer.settings(),
    }


def _ours(place: str):
    """What "module:name" stands for, in lightlib alone."""
    module, _, name = place.partition(":")
    if not module.startswith("lightlib."):
        raise ValueError(f"{place} is not of lightlib; it is not imported")
    return getattr(importlib.import_module(module), name)


def _layer(row: dict) -> CompactLinear:
    bias = (
        None if row["bias"] is None else torch.zeros(row["out_features"], dtype=getattr(torch, row["bias"]))
    )
    return _ours(row["class"]).empty(row["in_features"], row["out_features"], bias, **row["settings"])


def _fill(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Give every parameter and buffer its tensor; all must be there and fit, and none be left over."""
    wanted = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(
            f"{where}: {len(missing)} tensors are missing {missing[:3]}, {len(extra)} left over {extra[:3]}"
        )
    for name, old in wanted.items():
        if old.shape != tensors[name].shape:
            raise ValueError(
                f"{where}: {name} is {tuple(tensors[name].shape)}, the structure says {tuple(old.shape)}"
            )
        owner, _, key = name.rpartition(".")
        owner = model.get_submodule(owner)
        new = tensors[name]
        setattr(owner, key, nn.Parameter(new, new.is_floating_point()) if key in owner._parameters else new)
    model.tie_weights()
