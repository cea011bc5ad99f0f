"""Modules on the kernels: the same weights, the same bytes, the same outputs, saved and loaded."""

import json

import pytest
import torch

from lightlib import load, save
from lightlib.compact import compact_layers
from lightlib.cost import size
from lightlib.decoder import cast
from lightlib.kernels import results, triton_driver
from lightlib.kernels.attach import IntKernelLinear, SparseKernelLinear, attach
from lightlib.kernels.sparse_matmul import op
from lightlib.kernels.sparse_matmul.dispatch import choose
from lightlib.kernels.w4_matmul import op as int_op
from lightlib.quantization.gptq import gptq
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from lightlib.recipe import compress
from lightlib.sparsity.magnitude import magnitude
from lightlib.sparsity.wanda import wanda
from lightlib.sparsity.wrp import wrp
from tests.conftest import data_script


def half_pruned(model, sparsity):
    return magnitude(cast(model, torch.bfloat16), sparsity=sparsity, progress=False).model


# pruned layers
@pytest.mark.parametrize(
    ("sparsity", "knobs", "layout"),
    [
        (0.5, {}, "bitmap"), (0.8, {}, "csl"), ("2:4", {}, "bitmap"), (0.5, {"tokens": 1}, "ell"),
        (0.7, {"layout": "compact"}, "compact"),
    ],
)  # fmt: skip
def test_attached_layers_hold_and_compute_the_same(model, calib, tmp_path, sparsity, knobs, layout):
    light = half_pruned(model, sparsity)
    fast, report = attach(light, **knobs)
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


def test_masks_of_wanda_come_through_every_layout(llama, calib):
    light, _ = wanda(cast(llama, torch.bfloat16), calib, sparsity=0.6, progress=False)
    for layout in ("csl", "compact", "bitmap", "ell"):
        fast = attach(light, layout=layout).model
        for name, part in compact_layers(fast).items():
            assert torch.equal(part.mask(), light.get_submodule(name).mask())


def test_two_parts_become_one_and_others_stay_as_they_are(llama, calib):
    full = magnitude(llama, progress=False).model  # float32: no kernel reads it
    assert len(attach(full).reports) == len(compress(llama, [attach]).reports) == 0
    light, _ = wrp(cast(llama, torch.bfloat16), calib, progress=False)
    report = attach(light).reports
    assert len(report) == 14 and {row.notes for row in report} == {"bitmap"}


def test_a_layout_that_there_is_not_is_refused(llama):
    with pytest.raises(ValueError, match="layout='coo': choose one of csl, compact, bitmap, ell"):
        attach(llama, layout="coo")


def test_inputs_of_another_type_and_inputs_that_learn_take_the_dense_way(llama):
    sparse = half_pruned(llama, 0.8)
    four = rtn(cast(llama, torch.bfloat16), grid=Int(4), progress=False).model
    for light in (sparse, four):
        layer = next(iter(compact_layers(attach(light).model).values()))
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
    assert layer.fast_path(torch.bfloat16, cuda) == ("lightlib::sparse_matmul (csl, cuda)", "")
    assert "not torch.float32" in layer.fast_path(torch.float32, cuda)[1]
    monkeypatch.setattr(op, "missing", lambda: "NVRTC was not found")
    assert layer.fast_path(torch.bfloat16, cuda) == ("", "NVRTC was not found")


# what multiplies, and which layout
def test_kernels_give_way_to_triton_and_triton_to_torch(monkeypatch):
    ways = [("bitmap", 1), ("csl", 64), ("csl", 128), ("compact", 200), ("ell", 2), ("ell", 3)]
    monkeypatch.setattr(op, "missing", lambda: "")
    monkeypatch.setattr(triton_driver, "missing", lambda: "")
    assert [op.way(*w) for w in ways] == ["cuda", "cuda", "expand", "expand", "triton", "expand"]
    monkeypatch.setattr(op, "missing", lambda: "no NVRTC")
    assert [op.way(*w) for w in ways] == ["triton", "expand", "expand", "expand", "triton", "expand"]
    monkeypatch.setattr(triton_driver, "missing", lambda: "no Triton")
    assert {op.way(*w) for w in ways} == {"torch"}


def test_the_operation_is_traced_and_its_flops_are_counted():
    W, x = torch.randn(64, 32).bfloat16(), torch.randn(4, 32).bfloat16()
    from lightlib.kernels.sparse_matmul.layouts import LAYOUTS, encode, knob_of, tensors_of

    for layout in LAYOUTS:
        held = encode(layout, W)
        args = layout, list(tensors_of(held).values()), x, 64, knob_of(held)
        torch.library.opcheck(torch.ops.lightlib.sparse_matmul, args)
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            y = op.multiply(held, x)
        assert counter.get_total_flops() == 2 * 4 * 64 * 32
        torch.testing.assert_close(y, x @ W.T)


def test_what_was_measured_decides_and_the_nearest_point_counts(tmp_path):
    def row(layout, tokens, sparsity, times, n_out=4096):
        place = {"n_out": n_out, "n_in": 4096, "tokens": tokens, "sparsity": sparsity}
        return {"layout": layout, **place, "times_cublas": times}

    rows = [
        row("cuBLAS", 16, 0.7, 1.0), row("csl", 16, 0.7, 0.8), row("bitmap", 16, 0.7, 0.9),
        row("csl", 16, 0.5, 0.5), row("bitmap", 16, 0.5, 1.2), row("ell", 1, 0.7, 2.0),
        row("csl", 1, 0.7, 1.9), row("csl", 16, 0.5, 1.5, n_out=22016),
        row("bitmap", 16, 0.5, 1.1, n_out=22016),
    ]  # fmt: skip
    device = "NVIDIA Some GPU"
    results.file_for(device, tmp_path).write_text(json.dumps({"device": device, "rows": rows}))
    chosen = [
        choose((4096, 4096), 0.68, 16, device, tmp_path), choose((4096, 4096), 0.5, 16, device, tmp_path),
        choose((20000, 4096), 0.5, 16, device, tmp_path), choose((4096, 4096), 0.7, 1, device, tmp_path),
        choose((4096, 4096), 0.7, 3, device, tmp_path),
    ]  # fmt: skip
    assert [(c.layout, c.times_cublas) for c in chosen] == [
        ("bitmap", 0.9), ("bitmap", 1.2), ("csl", 1.5), ("ell", 2.0), ("csl", 1.9)
    ]  # fmt: skip
    assert results.devices(tmp_path) == [device]
    assert choose((4096, 4096), 0.5, 16, "another", tmp_path).times_cublas is None


# rounded layers
@pytest.mark.parametrize(
    "grid", [Int(4, 32), Int(8), Int(3, 32, symmetric=True), Int(2), Int(4, 32, float_zero=True)]
)
def test_rounded_layers_hold_and_compute_the_same(llama, calib, tmp_path, grid):
    light = rtn(cast(llama, torch.bfloat16), grid=grid, progress=False).model
    fast, report = attach(light)
    layers = compact_layers(fast)
    assert {type(part) for part in layers.values()} == {IntKernelLinear}
    assert {row.notes for row in report} == {f"{grid.bits} bits"}
    for name, part in layers.items():
        assert torch.equal(part.dense(), light.get_submodule(name).dense())
    with torch.no_grad():
        torch.testing.assert_close(fast(calib[0]).logits, light(calib[0]).logits, rtol=2e-2, atol=2e-2)
        again = load(save(fast, tmp_path / "light"))
        assert torch.equal(again(calib[0]).logits, fast(calib[0]).logits)


def test_columns_in_the_order_of_gptq_stay_in_it(llama, calib):
    light = gptq(cast(llama, torch.bfloat16), calib, grid=Int(4, 32), act_order=True, progress=False).model
    fast = attach(light).model
    assert any(part.order is not None for part in compact_layers(fast).values())
    for name, part in compact_layers(fast).items():
        before, x = light.get_submodule(name), torch.randn(3, part.in_features).bfloat16()
        assert torch.equal(part.dense(), before.dense())
        torch.testing.assert_close(part(x).float(), x.float() @ before.dense().T, rtol=2e-2, atol=2e-2)


def test_grids_that_the_kernel_does_not_read_stay_as_they_are(llama):
    for grid in (Int(6, 32), Int(4, 16)):
        light = rtn(llama, grid=grid, progress=False).model
        assert len(attach(light).reports) == 0


def test_a_rounded_layer_says_what_multiplies_it(llama, monkeypatch):
    light = rtn(cast(llama, torch.bfloat16), grid=Int(4), progress=False).model
    layer = next(iter(compact_layers(attach(light).model).values()))
    assert "runs on CUDA devices" in layer.fast_path(torch.bfloat16, torch.device("cpu"))[1]
    monkeypatch.setattr(int_op, "missing", lambda: "")
    assert layer.fast_path(torch.bfloat16, "cuda") == ("lightlib::int_matmul (4 bits)", "")
    assert "16-bit inputs" in layer.fast_path(torch.float32, "cuda")[1]


# a whole model
def test_a_whole_model_is_measured_as_it_will_be_on_a_gpu():
    made = data_script("bench_decode")
    assert len(made.points()) == 12 and {p["batch"] for p in made.points()} == {1, 16}
    row = made.measure("small", "cpu", {"method": "magnitude", "sparsity": 0.7, "batch": 3}, new=2)
    assert row["layers"] == "csl" and row["tpot_ms"] > 0 and row["path"] == "lean"
    assert (
        row["stored_bytes"] < made.measure("small", "cpu", {"method": "dense", "batch": 1}, 2)["stored_bytes"]
    )
