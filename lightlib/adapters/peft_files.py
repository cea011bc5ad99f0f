"""Adapters as peft's files: an adapter that one of the two has trained, the other loads.

Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lightlib.adapters.lora import block_linears, lora_layers, wrap
from lightlib.decoder import use_linear_everywhere
from lightlib.export.huggingface import conv1d_names, skeleton
from lightlib.persist import whole_or_nothing


def save_adapter(model: nn.Module, folder: str | Path, base_name: str = "") -> Path:
    """Write the updates into `folder` for `peft.PeftModel.from_pretrained(base, folder)` and `load_adapter`.

    base_name: where the base model comes from, a note for the reader. Raises ValueError where there are no
    updates.
    """
    folder, layers = Path(folder).expanduser(), lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA layers to write; add_lora or load_adapter adds them")
    rank, alpha = (Counter(getattr(layer, key) for layer in layers.values()) for key in ("rank", "alpha"))
    (rank, _), (alpha, _) = rank.most_common(1)[0], alpha.most_common(1)[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name or None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {name: layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _target_modules(model, layers),
        # GPT-2 as transformers has it keeps its weights as (in, out)
        "fan_in_fan_out": not conv1d_names(skeleton(model)).isdisjoint(layers),
        "inference_mode": True,
    }
    tensors = {
        f"{PREFIX}{name}.lora_{key}.weight": getattr(layer, key).detach().cpu().contiguous()
        for name, layer in layers.items()
        for key in "AB"
    }
    with whole_or_nothing(folder, sum(t.nbytes for t in tensors.values())) as draft:
        save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
        (draft / CONFIG).write_text(json.dumps(config, indent=2))
    return folder


def load_adapter(model: nn.Module, folder: str | Path) -> list[str]:
    """Put the updates that peft or `save_adapter` wrote beside the layers; returns their names. In place.

    Raises ValueError, and changes nothing, for files that are missing or damaged, for what is not plain LoRA
    on the blocks' linear layers, and for tensors that do not fit the model.
    """
    folder = Path(folder).expanduser()
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no adapter that can be read ({error})") from error
    _check_plain(config, str(folder))
    use_linear_everywhere(model)
    shapes = block_linears(model)
    names = [name for name in shapes if f"{PREFIX}{name}.lora_A.weight" in tensors]
    layers, wanted = {}, {}
    for name in names:
        n_out, n_in = shapes[name]
        rank = for_layer(config.get("rank_pattern"), name, config["r"])
        alpha = for_layer(config.get("alpha_pattern"), name, config["lora_alpha"])
        # rslora divides by the square root of the rank
        layers[name] = rank, alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
        wanted[f"{PREFIX}{name}.lora_A.weight"] = rank, n_in
        wanted[f"{PREFIX}{name}.lora_B.weight"] = n_out, rank
    given = {key: tuple(t.shape) for key, t in tensors.items()}
    for key in sorted(given.keys() | wanted.keys()):
        if given.get(key) != wanted.get(key):
            raise ValueError(f"{folder}: {key} is {given.get(key)}, the model wants {wanted.get(key)}")
    if not names:
        raise ValueError(f"{folder} holds no updates")
    wrap(model, layers)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            layer.A.copy_(tensors[f"{PREFIX}{name}.lora_A.weight"])
            layer.B.copy_(tensors[f"{PREFIX}{name}.lora_B.weight"])
    return names


CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# kinds of LoRA that are more, or other, than B A beside a weight
MORE = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save",
    "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens",
    "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
# ways to begin that leave the base's weight as it is; others (PiSSA, OLoRA, LoftQ ...) change it
BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


def for_layer(patterns: dict | None, name: str, default: float) -> float:
    """The value for the layer `name`: of the first of peft's patterns that its name ends in."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, default)


def _check_plain(config: dict, where: str) -> None:
    """Raise ValueError for settings of peft's that are not plain LoRA."""
    wrong = [key for key in MORE if config.get(key)]
    wrong += [
        key for key, plain in (("peft_type", "LORA"), ("bias", "none")) if config.get(key, plain) != plain
    ]
    wrong += ["init_lora_weights"] if config.get("init_lora_weights") not in BEGINNINGS else []
    if wrong:
        said = ", ".join(f"{key}={config[key]!r}" for key in wrong)
        raise ValueError(
            f"{where}: {said} is not plain LoRA; merge it into the base with peft, and load that"
        )


def _target_modules(model: nn.Module, layers: Collection[str]) -> list[str]:
    """The layers' last name parts, which every reader knows, or, where others share them, whole names."""
    ends = {name.rpartition(".")[2] for name in layers}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends if meant == set(layers) else layers)
