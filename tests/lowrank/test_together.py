"""Tensor networks and compact embeddings beside the rest of the library: costs, training, refusals."""

import pytest
import torch
from torch import nn

from lightlib.adapters.recover import recover
from lightlib.cost import flops
from lightlib.decoder import linears
from lightlib.lowrank.compress_embedding import compress_embedding
from lightlib.lowrank.shared_tucker import tucker_across_layers
from lightlib.lowrank.tensor_layers import FactoredLinear, TTLinear
from lightlib.lowrank.tensor_methods import cp, tensor_train, tucker
from lightlib.lowrank.work import cheapest
from lightlib.quality import perplexity
from lightlib.slicing.slicegpt import slicegpt
from lightlib.structured.llm_pruner import llm_pruner
from tests.conftest import random_model


def test_flops_are_those_of_each_layers_cheapest_order(llama):
    light = tensor_train(llama, fraction=0.8, progress=False).model
    less = 0
    for part in linears(light).values():
        if isinstance(part, TTLinear):
            order = cheapest(part.flops, 1)
            less += 2 * part.in_features * part.out_features - part.flops[order].of(1)
    assert less != 0
    assert flops(llama).decode_per_token - flops(light).decode_per_token == less


def test_a_long_prompt_may_take_another_order_than_a_token(llama):
    light = tensor_train(llama, fraction=0.3, progress=False).model
    parts = [part for part in linears(light).values() if isinstance(part, FactoredLinear)]
    many = [part.flops_for(1000) for part in parts]
    assert all(a <= 1000 * part.flops_for(1) for a, part in zip(many, parts, strict=True))
    assert any(a < 1000 * part.flops_for(1) for a, part in zip(many, parts, strict=True))


def test_a_head_of_low_rank_takes_fewer_flops_by_two_thin_products():
    model = random_model("llama", tied=True)
    light = compress_embedding(model, rank=4, progress=False).model
    saved = 2 * (96 * 32 - 4 * (96 + 32))
    assert flops(model).decode_per_token - flops(light).decode_per_token == saved


@pytest.mark.parametrize("method", [tensor_train, tucker, cp, tucker_across_layers])
def test_factors_learn_in_recovery(method, llama, calib):
    light = method(llama, fraction=0.5, progress=False).model
    better = recover(light, calib, steps=10, lr=1e-2, progress=False).model
    blocks = [m.model.layers for m in (light, better)]
    before, after = (dict(block.named_parameters()) for block in blocks)
    moved = {name for name in before if before[name].dim() > 1 and not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if before[name].dim() > 1}
    assert perplexity(better, calib) < perplexity(light, calib)


def test_what_takes_a_whole_table_says_so(llama, calib):
    light = compress_embedding(llama, rank=4, progress=False).model
    with pytest.raises(ValueError, match="embed_tokens is a Lookup, and this method takes a whole table"):
        slicegpt(light, calib, progress=False)
    with pytest.raises(ValueError, match="embed_tokens is a Lookup"):
        llm_pruner(light, calib, kinds=("channels",), progress=False)
    assert isinstance(llama.get_input_embeddings(), nn.Embedding)


def test_what_takes_whole_matrices_refuses_shared_ones(llama, calib):
    light = tucker_across_layers(llama, progress=False).model
    with pytest.raises(ValueError, match="q_proj is a SharedLinear, and this method takes whole matrices"):
        slicegpt(light, calib, progress=False)
