import pytest
import torch

from lightlib.decoder import linears
from lightlib.quantization.grid import Int
from lightlib.quantization.linear import QuantLinear
from lightlib.quantization.rtn import rtn, rtn_weight
from lightlib.report import relative_error
from tests.conftest import inputs_of


def test_weights_on_the_grid_come_back_bit_for_bit():
    W = torch.randint(-7, 8, (8, 16)).float()
    W[:, 0] = 7
    assert torch.equal(rtn_weight(W, Int(4, symmetric=True)).dense(), W)


def test_eight_bits_change_the_logits_hardly_two_bits_a_lot(llama, calib):
    with torch.no_grad():
        logits = llama(calib[0]).logits
        change = [
            (rtn(llama, grid=Int(b), progress=False).model(calib[0]).logits - logits).norm() / logits.norm()
            for b in (8, 4, 2)
        ]
    assert change[0] < 0.02 < change[1] < change[2]


def test_the_reported_error_is_that_of_the_layers_output(llama, calib):
    light, report = rtn(llama, calib, grid=Int(3, group_size=16), progress=False)
    q = llama.model.layers[0].self_attn.q_proj
    X, W = inputs_of(q, llama, calib), q.weight.detach()
    lost = light.model.layers[0].self_attn.q_proj.dense() - W
    assert report.rows[0].error == pytest.approx(((X @ lost.T).norm() / (X @ W.T).norm()).item(), rel=1e-4)
    assert rtn(llama, grid=Int(3, group_size=16), progress=False).reports.rows[0].error == pytest.approx(
        relative_error(W, W + lost), rel=1e-5
    )


def test_the_head_and_the_embedding_stay_dense(llama):
    light, report = rtn(llama, grid=Int(4), progress=False)
    assert not any("lm_head" in row.name for row in report)
    assert isinstance(light.lm_head, torch.nn.Linear)
    assert all(isinstance(part, QuantLinear) for n, part in linears(light).items() if n != "lm_head")


def test_a_group_that_does_not_divide_changes_nothing(llama):
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: in_features 32 .* group_size 24"
    ):
        rtn(llama, grid=Int(4, group_size=24), inplace=True, progress=False)
    assert not any(isinstance(part, QuantLinear) for part in llama.modules())
