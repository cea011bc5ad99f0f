import pytest
import torch

from lightlib import load, save
from lightlib.cost import size
from lightlib.sparsity.layouts import encode, layout_bits, smallest
from lightlib.sparsity.linear import SparseLinear, csr_gain
from lightlib.sparsity.magnitude import magnitude
from lightlib.sparsity.masks import mask_of


def some_weight(shape=(24, 40), dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("shape", [(24, 40), (3, 5), (1, 1)])
@pytest.mark.parametrize("layout", ["bitmap", "csr"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.999])
def test_any_mask_comes_back_from_any_layout_bit_by_bit(shape, layout, sparsity):
    W = some_weight(shape)
    mask = mask_of(W.abs(), sparsity, "layer")
    stored = encode(W, mask, layout)
    assert torch.equal(stored.dense(), W * mask) and torch.equal(stored.mask(), mask)
    assert stored.kept == mask.sum()
    assert stored.stored_bits() == layout_bits(layout, shape, stored.kept, 32)


@pytest.mark.parametrize("layout", ["2:4", "1:4", "4:8", "3:5", "1:2", "7:20"])
def test_regular_masks_come_back_from_their_pattern(layout):
    W = some_weight(dtype=torch.bfloat16)
    mask = mask_of(W.float().abs(), layout)
    stored = encode(W, mask, layout)
    assert torch.equal(stored.dense(torch.bfloat16), W * mask) and torch.equal(stored.mask(), mask)
    assert stored.stored_bits() == layout_bits(layout, (24, 40), stored.kept, 16)


def test_a_value_that_is_zero_is_a_value():
    W, mask = torch.zeros(4, 8), torch.zeros(4, 8, dtype=torch.bool)
    mask[1, ::2] = True
    for layout in ("bitmap", "csr"):
        assert torch.equal(encode(W, mask, layout).mask(), mask)


def test_two_of_four_in_16_bits_takes_9_of_16_parts_of_the_dense_weight():
    assert layout_bits("2:4", (64, 64), 64 * 32, 16) == 64 * 64 * 16 * 0.5625


def test_a_mask_that_breaks_the_pattern_is_refused():
    W = some_weight()
    with pytest.raises(ValueError, match="the mask is not 2:4"):
        encode(W, mask_of(W.abs(), 0.5), "2:4")
    with pytest.raises(ValueError, match="the mask is not 2:3"):
        encode(W, mask_of(W.abs(), 0.5), "2:3")


def test_the_smallest_layout_is_csr_only_where_little_is_left():
    # 32 bits an index against one bit a weight: they meet where one weight in 32 stays
    W = some_weight((64, 256))
    assert smallest(mask_of(W.abs(), 0.90, "layer"), 16) == "bitmap"
    assert smallest(mask_of(W.abs(), 0.99, "layer"), 16) == "csr"


def test_a_layer_multiplies_what_it_stores_and_its_values_learn_within_the_mask():
    W, bias = some_weight(), torch.randn(24)
    mask = mask_of(W.abs(), 0.7)
    layer = SparseLinear(encode(W, mask, "bitmap"), bias)
    x = torch.randn(3, 5, 40)
    torch.testing.assert_close(layer(x), x @ (W * mask).T + bias)
    layer.values0.requires_grad_(True)
    layer(x).square().sum().backward()
    dense = (W * mask).requires_grad_(True)
    (x @ dense.T + bias).square().sum().backward()
    torch.testing.assert_close(layer.values0.grad, dense.grad[mask])


def test_values_follow_the_models_type_and_what_places_them_does_not():
    W = some_weight()
    layer = SparseLinear(encode(W, mask_of(W.abs(), 0.99), "csr")).to(torch.bfloat16)
    assert layer.values0.dtype == torch.bfloat16 and layer.columns0.dtype == torch.int32
    assert layer.stored_bits() == layout_bits("csr", (24, 40), layer.values0.numel(), 16)


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.7, 0.8, 0.9, 0.99, "2:4"])
def test_the_bytes_on_disk_and_in_memory_are_those_of_the_formula(llama, tmp_path, sparsity):
    light, report = magnitude(llama, sparsity=sparsity, progress=False)
    formula = sum(
        min(
            layout_bits(x, r.shape, kept, 32)
            for x in ([sparsity] if sparsity == "2:4" else ["bitmap", "csr"])
        )
        for r in report
        if (kept := light.get_submodule(r.name).values0.numel())
    )
    assert sum(r.bits_after for r in report) == formula
    rest = size(llama).stored_bytes - sum(r.bits_before for r in report) // 8
    assert size(light).stored_bytes == size(light).resident_bytes == rest + formula // 8
    file = save(light, tmp_path / "light") / "lightlib.safetensors"
    assert size(light).stored_bytes <= file.stat().st_size < size(light).stored_bytes + 12_000  # the header
    again = load(tmp_path / "light")
    name = report.rows[0].name
    assert torch.equal(again.get_submodule(name).dense(), light.get_submodule(name).dense())


def test_a_csr_layer_multiplies_its_values_themselves_and_says_when_that_pays(monkeypatch):
    W, bias = some_weight((64, 96)), torch.randn(64)
    mask = mask_of(W.abs(), 0.97, "layer")
    layer = SparseLinear(encode(W, mask, "csr"), bias)
    x = torch.randn(2, 3, 96)
    expected = x @ (W * mask).T + bias
    with monkeypatch.context() as broken:
        broken.setattr(SparseLinear, "dense", None)  # nothing is decoded
        torch.testing.assert_close(layer(x), expected)
    x.requires_grad_(True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, (W * mask).sum(0).expand_as(x))
    many = torch.randn(500, 96)
    torch.testing.assert_close(layer(many), many @ (W * mask).T + bias)
    cpu = torch.device("cpu")
    monkeypatch.setattr("lightlib.sparsity.linear.csr_gain", lambda *_: 2.0)
    assert layer.fast_path(torch.float32, cpu) == ("aten::_sparse_csr_mm", "")
    monkeypatch.setattr("lightlib.sparsity.linear.csr_gain", lambda *_: 0.5)
    path, reason = layer.fast_path(torch.float32, cpu)
    assert not path and reason == "at 97% zeros a CSR product takes 2.0 times a dense one for a token"
    assert "csr in bfloat16" in layer.fast_path(torch.bfloat16, cpu)[1]


@pytest.mark.alone
def test_the_fewer_values_stay_the_more_csr_gains():
    assert csr_gain(1024, 1024, 0.002, 1) > 2 * csr_gain(1024, 1024, 0.9, 1)
