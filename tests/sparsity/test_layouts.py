import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from lightlib import load, save
from lightlib.compact import compact_layers
from lightlib.cost import size
from lightlib.decoder import cast
from lightlib.sparsity.csr_speed import csr_gain, csr_pays_from
from lightlib.sparsity.layouts import encode, layout_bits, smallest
from lightlib.sparsity.linear import SparseLinear
from lightlib.sparsity.magnitude import magnitude
from lightlib.sparsity.masks import mask_of
from lightlib.sparsity.semi_structured import hardware_places, semi_structured
from lightlib.sparsity.store import relayout
from lightlib.sparsity.wrp import wrp


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


def test_a_csr_layer_multiplies_its_values_themselves(monkeypatch):
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


def test_a_layer_says_what_multiplies_it_and_from_where_on_that_pays(monkeypatch):
    W, cpu = some_weight((64, 96)), torch.device("cpu")
    mask = mask_of(W.abs(), 0.97, "layer")
    csr, bitmap = (SparseLinear(encode(W, mask, layout)) for layout in ("csr", "bitmap"))
    monkeypatch.setattr("lightlib.sparsity.linear.csr_gain", lambda *_: 2.0)
    assert csr.fast_path(torch.float32, cpu) == ("aten::_sparse_csr_mm", "")
    assert "as CSR, 2.0 times as fast as dense, one does" in bitmap.fast_path(torch.float32, cpu)[1]
    monkeypatch.setattr("lightlib.sparsity.linear.csr_gain", lambda *_: 0.5)
    monkeypatch.setattr("lightlib.sparsity.csr_speed.csr_gain", lambda *key: 0.1 / key[2])
    slower = "at 97% zeros a CSR product takes 2.0 times a dense one for a token, and pays from 91% zeros on"
    assert csr.fast_path(torch.float32, cpu) == ("", slower)
    assert bitmap.fast_path(torch.float32, cpu) == (
        "",
        f"no product here reads bitmap in float32, and {slower}",
    )
    assert csr.fast_path(torch.bfloat16, cpu) == ("", "no product here reads csr in bfloat16")


def test_the_break_even_is_where_the_gain_crosses_one(monkeypatch):
    csr_pays_from.cache_clear()
    for even in (0.1, 0.37, 0.9):
        monkeypatch.setattr("lightlib.sparsity.csr_speed.csr_gain", lambda *key, even=even: even / key[2])
        assert csr_pays_from(64, 64, round(100 * even)) == pytest.approx(1 - even, abs=1 / 64)


@pytest.mark.parametrize("layout", ["bitmap", "csr", "smallest", "fastest"])
def test_another_layout_holds_the_same_weights(llama, calib, layout):
    light, _ = wrp(llama, calib, progress=False)
    again, report = relayout(light, layout=layout)
    for row in report:
        before, after = light.get_submodule(row.name), again.get_submodule(row.name)
        assert torch.equal(before.dense(), after.dense()) and torch.equal(before.mask(), after.mask())
        assert row.error == 0 and row.bits_before == sum(part.stored_bits() for part in before.parts())
        assert layout == "fastest" or len(after.layouts) == 1


def test_the_fastest_layout_is_csr_where_its_product_is_and_the_same_elsewhere(llama, monkeypatch):
    light, _ = magnitude(llama, sparsity=0.9, progress=False)
    for gain, layouts in ((1.5, ("csr",)), (0.7, ("bitmap",))):
        monkeypatch.setattr("lightlib.sparsity.store.csr_gain", lambda *_, gain=gain: gain)
        made = relayout(light).model
        assert {part.layouts for part in compact_layers(made).values()} == {layouts}
        half = relayout(cast(light, torch.bfloat16)).model
        assert {part.layouts for part in compact_layers(half).values()} == {("bitmap",)}


def test_a_pattern_is_a_layout_only_for_masks_that_have_it(llama):
    light, _ = magnitude(llama, sparsity="2:4", progress=False)
    assert torch.equal(
        relayout(relayout(light, layout="csr").model, layout="2:4").model.model.layers[0].mlp.up_proj.dense(),
        light.model.layers[0].mlp.up_proj.dense(),
    )
    with pytest.raises(ValueError, match="the mask is not 1:4"):
        relayout(light, layout="1:4")
    with pytest.raises(ValueError, match="layout='coo': give bitmap, csr"):
        relayout(light, layout="coo")


@pytest.mark.parametrize("shape", [(32, 64), (96, 128), (576, 1536)])
def test_tensor_cores_read_our_places_once_their_words_are_in_order(shape):
    W = some_weight(shape, torch.bfloat16)
    stored = encode(W, mask_of(W.float().abs(), "2:4"), "2:4")
    values, words = sparse_semi_structured_from_dense_cutlass(stored.dense(torch.bfloat16))
    places = hardware_places(stored)
    assert torch.equal(places, words) and torch.equal(values.flatten(), stored.tensors["values"])
    tensor = semi_structured(stored, places)
    assert torch.equal(tensor.to_dense(), stored.dense(torch.bfloat16))
    assert tensor.packed.data_ptr() == stored.tensors["values"].data_ptr()  # no second copy


def test_what_tensor_cores_cannot_multiply_is_said(monkeypatch):
    W, cuda = some_weight((64, 64)), torch.device("cuda")
    layer = SparseLinear(encode(W, mask_of(W.abs(), "2:4"), "2:4"))
    assert layer.fast_path(torch.bfloat16, cuda) == ("torch.sparse.SparseSemiStructuredTensor", "")
    assert "takes float16 and bfloat16, not float32" in layer.fast_path(torch.float32, cuda)[1]
    odd = SparseLinear(encode(W[:40], mask_of(W[:40].abs(), "2:4"), "2:4"))
    assert "takes multiples of 32 x 64, not 40 x 64" in odd.fast_path(torch.bfloat16, cuda)[1]


def test_the_places_that_a_device_reads_are_no_part_of_the_model():
    W = some_weight((64, 64))
    layer = SparseLinear(encode(W, mask_of(W.abs(), "2:4"), "2:4"))
    stored = layer.stored_bits()
    layer.places = hardware_places(layer.parts()[0])
    assert layer.stored_bits() == stored and "places" not in layer.state_dict()
    assert layer.to(torch.bfloat16).places is None


@pytest.mark.alone
def test_the_fewer_values_stay_the_more_csr_gains():
    assert csr_gain(1024, 1024, 0.002, 1) > 2 * csr_gain(1024, 1024, 0.9, 1)
