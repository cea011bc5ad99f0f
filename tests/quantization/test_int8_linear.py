import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lightlib.quantization.int8_linear import Int8Linear, int_mm, to_int8

torch.manual_seed(0)
W, X = torch.randn(24, 64), torch.randn(10, 64)


def by_hand(x, w, over):
    """The product that 8-bit integers stand for, in floating point."""
    (qx, sx), (qw, sw) = to_int8(x, over), to_int8(w, 1, lambda s: s.half().float())
    return (qx.float() * sx) @ (qw.float() * sw).T


@pytest.mark.parametrize(("activations", "over"), [("token", 1), ("tensor", (0, 1))])
def test_the_integer_product_is_the_product_of_what_the_integers_stand_for(activations, over):
    assert_close(Int8Linear(W, activations=activations)(X), by_hand(X, W, over), rtol=1e-5, atol=1e-4)


def test_integers_are_multiplied_exactly():
    a, b = torch.randint(-127, 128, (3, 4096)), torch.randint(-127, 128, (4096, 8))
    assert torch.equal(int_mm(a.to(torch.int8), b.to(torch.int8)), (a @ b).int())


def test_inputs_and_weights_of_whole_numbers_come_out_exactly():
    w, x = torch.randint(-127, 128, (8, 32)).float(), torch.randint(-127, 128, (4, 32)).float()
    w[:, 0], x[:, 0] = 127, -127
    assert torch.equal(Int8Linear(w)(x), x @ w.T)


def test_with_all_columns_apart_nothing_is_rounded_to_8_bits():
    layer = Int8Linear(W.half().float(), columns=torch.arange(64))
    assert_close(layer(X), X @ W.half().float().T)
    layer = Int8Linear(W.half().float(), threshold=0.0)
    assert_close(layer(X), X @ layer.dense().T)


def test_an_outlier_costs_the_other_inputs_of_its_token_their_bits_unless_it_goes_apart():
    x = X.clone()
    x[3, 5] = 1000.0
    exact = x @ W.T

    def error(**settings):
        return ((Int8Linear(W, **settings)(x) - exact)[3].norm() / (X @ W.T)[3].norm()).item()

    apart, found, none = error(columns=torch.tensor([5])), error(threshold=6.0), error()
    assert apart < 0.05 and none > 1
    # its weight is 8 bits wide, so the product with 1000 errs; all other inputs keep their bits
    assert apart < found < none
    assert (Int8Linear(W)(x) - exact)[:3].norm() < 0.02 * exact[:3].norm()  # other tokens do not notice


def test_known_columns_and_those_found_in_a_call_go_apart_together():
    x = X.clone()
    x[0, 40], x[1, 7] = 50.0, 60.0
    layer = Int8Linear(W, columns=torch.tensor([40]), threshold=20.0)
    rest = x.index_fill(1, torch.tensor([7, 40]), 0.0)
    exact = (
        by_hand(rest, W.index_fill(1, torch.tensor([40]), 0.0), 1)
        + x[:, [7, 40]] @ layer.dense()[:, [7, 40]].T
    )
    assert_close(layer(x), exact, rtol=1e-4, atol=1e-3)


def test_a_static_scale_clips_what_goes_beyond_it():
    layer = Int8Linear(torch.eye(8), activations="static", static_scale=1.0 / 127)
    x = torch.tensor([[0.5, -1.0, 3.0, 0, 0, 0, 0, 0]])
    assert_close(layer(x), torch.tensor([[0.5, -1.0, 1.0, 0, 0, 0, 0, 0]]), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("settings", [{}, {"activations": "tensor"}, {"per_tensor": True}])
def test_zeros_give_the_bias(settings):
    bias = torch.randn(24)
    assert_close(Int8Linear(W, bias, **settings)(torch.zeros(2, 64)), bias.expand(2, -1))
    assert_close(Int8Linear(torch.zeros(24, 64), bias, **settings)(X), bias.expand(10, -1))


def test_bits_are_a_byte_a_weight_and_two_more_in_a_column_apart():
    assert Int8Linear(W).stored_bits() == 8 * 24 * 64 + 16 * 24
    with_columns = Int8Linear(W, columns=torch.tensor([1, 2, 3]))
    assert with_columns.stored_bits() == 8 * 24 * 64 + 16 * 24 + 3 * (16 * 24 + 32)


def test_bfloat16_inputs_give_bfloat16_outputs_near_the_exact_ones():
    y = Int8Linear(W)(X.bfloat16())
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), F.linear(X, W), rtol=0.05, atol=0.3)


def test_cuda_is_asked_only_for_sizes_its_product_takes():
    assert Int8Linear(W).fast_path(torch.bfloat16, torch.device("cuda"))[0] == "aten::_int_mm"
    path, reason = Int8Linear(W[:, :60]).fast_path(torch.bfloat16, torch.device("cuda"))
    assert path == "" and "multiples of 8" in reason


def test_an_unknown_way_to_round_inputs_is_refused():
    with pytest.raises(ValueError, match="'row': choose one of token, tensor, static"):
        Int8Linear(W, activations="row")
