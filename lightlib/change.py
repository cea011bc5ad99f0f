"""The model that a method changes: a copy, or the caller's own, safe from work that is broken off."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightlib.decoder import find_blocks, use_linear_everywhere


@contextmanager
def changing(model: nn.Module, inplace: bool) -> Iterator[nn.Module]:
    """The model to change: a copy, or the caller's own, put back as it was if the work is broken off.

    Gradients are off inside; a method that trains turns them on where it does.
    """
    find_blocks(model)  # refuse an unknown architecture before the copy
    with torch.no_grad():
        if inplace:
            yield from _restoring(model)
        else:
            yield use_linear_everywhere(copy.deepcopy(model))


def remember(model: nn.Module, function: str, settings: dict) -> None:
    """Note for `save` and `load` which "module:function", with these settings (plain JSON values), gives a
    plain model the structure that this one has now."""
    model.structure = [*getattr(model, "structure", []), [function, settings]]


def _restoring(model: nn.Module) -> Iterator[nn.Module]:
    before = dict(model.named_modules())
    parameters = {name: dict(part.named_parameters(recurse=False)) for name, part in before.items()}
    attributes = {name: public(part) for name, part in before.items()}
    tied = model.config.tie_word_embeddings
    try:
        yield use_linear_everywhere(model)
    except BaseException:
        now = dict(model.named_modules())
        for name, part in before.items():
            if now.get(name) is not part:
                model.set_submodule(name, part)
                now = dict(model.named_modules())
            for kind, value in parameters[name].items():
                setattr(part, kind, value)
            for key in public(part).keys() - attributes[name].keys():
                delattr(part, key)
            vars(part).update(attributes[name])
        model.config.tie_word_embeddings = tied
        raise


def public(part: nn.Module) -> dict[str, object]:
    """What a module knows beside its parameters and parts: numbers of heads, its config."""
    return {key: value for key, value in vars(part).items() if not key.startswith("_")}
