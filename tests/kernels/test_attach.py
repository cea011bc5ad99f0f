"""Modules on the kernels: the same weights, the same bytes, the same outputs, saved and loaded."""

import pytest
import torch

from lightlib import load, save
from lightlib.compact import compact_layers
from lightlib.cost import size
from lightlib.decoder import cast
from lightlib.kernels.attach import SparseKernelLinear, attach
from lightlib.kernels.sparse_matmul import op
from lightlib.kernels.sparse_matmul.csl import encode
from lightlib.recipe import compress
from lightlib.sparsity.magnitude import magnitude
from lightlib.sparsity.wrp import wrp


def half_pruned(model, sparsity):
    return magnitude(cast(model, torch.bfloat16), sparsity=sparsity, progress=False).model


@pytest.mark.parametrize(("sparsity", "layout"), [(0.5, "bitmap"), (0.8, "csl"), ("2:4", "bitmap")])
def test_attached_layers_hold_and_compute_the_same(model, calib, tmp_path, sparsity, layout):
    light = half_pruned(model, sparsity)
    fast, report = attach(light)
    layers = compact_layers(fast)
    assert {type(part) for part in layers.values()} == {SparseKernelLinear}
    assert {part.layout for part in layers.values()} == {layout} == {row.notes for row in report}
    for name, part in layers.items():
        before = light.get_submodule(name)
        assert torch.equal(part.dense(torch.bfloat16), before.dense(torch.bfloat16))
        assert part.stored_bits() == sum(t.numel() * t.element_size() * 8 for t in part.stored().values())
    assert sum(row.error for row in report) == 0
    with torch.no_grad():
        torch.testing.assert_close(fast(calib[0]).logits, light(calib[0]).logits, rtol=2e-2, atol=2e-2)
        again = load(save(fast, tmp_path / "light"))
        assert torch.equal(again(calib[0]).logits, fast(calib[0]).logits)
    assert size(again).stored_bytes == size(fast).stored_bytes


def test_two_parts_become_one_and_others_stay_as_they_are(llama, calib):
    full = magnitude(llama, progress=False).model  # float32: no kernel reads it
    assert len(attach(full).reports) == len(compress(llama, [attach]).reports) == 0
    light, _ = wrp(cast(llama, torch.bfloat16), calib, progress=False)
    report = attach(light).reports
    assert len(report) == 14 and {row.notes for row in report} == {"bitmap"}


def test_inputs_of_another_type_and_inputs_that_learn_take_the_dense_way(llama):
    layer = next(iter(compact_layers(attach(half_pruned(llama, 0.8)).model).values()))
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), x @ layer.dense().T)
    x = x.bfloat16().requires_grad_(True)
    layer(x).float().sum().backward()
    torch.testing.assert_close(x.grad.float(), layer.dense().sum(0).expand(3, 32), rtol=2e-2, atol=2e-2)


def test_a_layer_says_what_multiplies_it(llama, monkeypatch):
    layer = next(iter(compact_layers(attach(half_pruned(llama, 0.8)).model).values()))
    cuda = torch.device("cuda")
    assert "run on CUDA devices" in layer.fast_path(torch.bfloat16, torch.device("cpu"))[1]
    monkeypatch.setattr(op, "missing", lambda: "")
    assert layer.fast_path(torch.bfloat16, cuda) == ("lightlib::csl_matmul", "")
    assert "not torch.float32" in layer.fast_path(torch.float32, cuda)[1]
    monkeypatch.setattr(op, "missing", lambda: "NVRTC was not found")
    assert layer.fast_path(torch.bfloat16, cuda) == ("", "NVRTC was not found")


def test_the_operation_is_traced_and_its_flops_are_counted():
    W, x = torch.randn(64, 32).bfloat16(), torch.randn(4, 32).bfloat16()
    packed = encode(W)
    args = packed.words, packed.offsets, x, 64, 4
    torch.library.opcheck(torch.ops.lightlib.csl_matmul, args)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        y = op.csl_matmul(*args)
    assert counter.get_total_flops() == 2 * 4 * 64 * 32
    torch.testing.assert_close(y, x @ W.T)
