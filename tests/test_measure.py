import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightlib.calibration import time_linears
from lightlib.cost import generate, peak_bytes
from lightlib.decoder import cast
from lightlib.machine import Roofline, seconds
from lightlib.measure import (
    compare,
    divergence,
    explain,
    flops,
    latency,
    perplexity,
    roofline,
    size,
    throughput,
)
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from tests.conftest import VOCABULARY, random_model


def uniform(model):
    model.get_output_embeddings().weight.data.zero_()
    return model


def test_a_uniform_model_has_the_vocabularys_size_as_perplexity(llama, calib):
    assert perplexity(uniform(llama), calib) == pytest.approx(VOCABULARY, rel=1e-5)


def test_perplexity_counts_every_predicted_token_once(llama, calib):
    logp = [llama(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]) for ids in calib]
    total = -sum(part.sum() for part in logp) / sum(part.numel() for part in logp)
    assert perplexity(llama, calib) == pytest.approx(math.exp(total.item()), rel=1e-5)


def test_perplexity_does_not_depend_on_how_windows_are_batched(llama, calib):
    one_by_one = [row[None] for row in calib[0]]
    assert perplexity(llama, [calib[0]]) == pytest.approx(perplexity(llama, one_by_one), rel=1e-6)


def test_a_model_does_not_diverge_from_itself_and_does_from_another(llama, calib):
    same = divergence(llama, llama, calib)
    assert (same.mean_kl, same.top1_agreement, same.tokens) == (0.0, 1.0, 2 * 23 + 16)
    assert same.perplexity == pytest.approx(perplexity(llama, calib), rel=1e-5)
    near = divergence(rtn(llama, grid=Int(4), progress=False).model, llama, calib)
    far = divergence(rtn(llama, grid=Int(2), progress=False).model, llama, calib)
    assert 0 < near.mean_kl < far.mean_kl and far.top1_agreement < near.top1_agreement <= 1


def test_divergence_is_the_mean_kl_from_the_reference(llama, calib):
    other = uniform(copy.deepcopy(llama))
    p = llama(calib[0]).logits[:, :-1].softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean().item()
    assert divergence(other, llama, calib[:1]).mean_kl == pytest.approx(
        math.log(VOCABULARY) - entropy, rel=1e-4
    )


@pytest.mark.parametrize(
    ("batches", "words"), [([], "no batches"), ([torch.ones(1, 1).long()], "length >= 2")]
)
def test_nothing_to_predict_is_refused(llama, batches, words):
    with pytest.raises(ValueError, match=words):
        perplexity(llama, batches)


def test_a_model_without_numbers_is_refused(llama, calib):
    with pytest.raises(ValueError, match="meta device"):
        perplexity(llama.to("meta"), calib)


def test_size_counts_shared_weights_once():
    model = random_model("gemma")
    counted = size(model)
    assert counted.parameters == model.num_parameters()
    buffers = sum(b.nbytes for b in model.buffers())
    assert counted.stored_bytes == counted.resident_bytes == 4 * counted.parameters + buffers


def test_facts_are_shown_as_a_table_with_bars(llama):
    shown = size(llama)._repr_html_()
    assert f"{size(llama).stored_bytes:,}" in shown and shown.count("<div") == 2


def test_size_of_a_quantized_model_shrinks_in_file_and_in_memory(llama):
    light = rtn(llama, grid=Int(4, group_size=16), progress=False).model
    before, after = size(llama), size(light)
    assert after.parameters == before.parameters
    assert after.stored_bytes < before.stored_bytes / 2 and after.resident_bytes == after.stored_bytes


def test_flops_agree_with_torchs_counter(model):
    model.set_attn_implementation("eager")
    T = 24
    counted = flops(model, context=T)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(1, T).long(), logits_to_keep=1)
    # attention over rotary positions multiplies a few frequencies too
    assert counted.prefill_per_token * T == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_decode_costs_the_head_on_every_token(llama):
    counted = flops(llama, context=10)
    head = 2 * 32 * VOCABULARY
    assert counted.decode_per_token - counted.prefill_per_token == head - head // 10


def test_latency_adds_up(llama):
    taken = latency(llama, prompt=8, new=4, batch=2, repeats=2)
    assert taken.total_ms == taken.ttft_ms + 4 * taken.tpot_ms
    assert taken.tokens_per_s == pytest.approx(2 * 4 / taken.total_ms * 1e3)
    assert taken.ttft_ms > 0 and taken.tpot_ms > 0 and taken.tpot_spread_ms >= 0
    assert taken.peak_bytes > size(llama).resident_bytes
    assert (taken.prompt, taken.new, taken.batch, taken.dtype) == (8, 4, 2, "float32")
    assert latency(llama, prompt=8, new=1).tpot_ms > 0


def test_the_timed_loop_decodes_what_generate_decodes(llama):
    prompt = torch.tensor([[5, 6, 7]])
    seen = []
    hook = llama.lm_head.register_forward_hook(lambda _, __, out: seen.append(out[0, -1].argmax().item()))
    generate(llama, prompt, 6)
    hook.remove()
    llama.generation_config.eos_token_id = None
    whole = llama.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=7, do_sample=False)
    assert seen == whole[0, 3:].tolist()


@pytest.mark.parametrize(
    ("knobs", "words"),
    [({"prompt": 60, "new": 8}, "exceed the model's context of 64"), ({"new": 0}, "at least 1")],
)
def test_latency_of_what_cannot_run_is_refused(llama, knobs, words):
    with pytest.raises(ValueError, match=words):
        latency(llama, **knobs)


def test_throughput_goes_through_the_batch_sizes(llama):
    served = throughput(llama, (1, 4), prompt=8, new=2)
    found = list(served)
    assert served._repr_html_().count("<tr>") == 3 + 2
    assert [x.batch for x in found] == [1, 4] and all(x.tokens_per_s > 0 for x in found)


def test_peak_memory_sees_the_largest_moment(llama):
    def work():
        a = torch.ones(1000, 1000)
        del a
        torch.ones(500, 1000)

    assert peak_bytes(llama, work) - size(llama).resident_bytes == pytest.approx(4e6, rel=0.01)


def test_the_roofline_is_measured_once_and_bounds():
    roof = roofline()
    assert roof is roofline()
    assert min(roof.copy_gb_per_s, roof.read_gb_per_s, roof.matmul_gflop_per_s, roof.dispatch_us) > 0
    chosen = Roofline(10.0, 20.0, 100.0, 1.0, "cpu", "float32")
    assert chosen.balance == 5.0
    assert chosen.floor_ms(20e9, 0) == pytest.approx(1000)
    assert chosen.floor_ms(20e9, 300e9) == pytest.approx(3000)


def test_seconds_is_a_median():
    assert seconds(lambda: sum(range(1000))) < 0.1


def test_every_linear_is_timed_and_no_hook_stays(llama):
    times, step = time_linears(llama, torch.ones(1, 4).long(), 3)
    assert step > max(times.values())
    assert len(times) == 2 * 7 + 1 and all(ms > 0 for ms in times.values())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in llama.modules())


def test_explain_tells_dense_simulated_and_real_apart():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
        )
    ).eval()
    light = rtn(model, grid=Int(4, group_size=32), progress=False).model
    dense, simulated = explain(model, 8, 2), explain(light, 8, 2)
    assert dense.sentence.startswith("Not smaller: nothing is packed")
    assert {x.speed for x in dense.layers} == {"dense"}
    assert (
        "speed is simulated in 7 of 7 packed layers, since the packed matmuls take bfloat16"
        in simulated.sentence
    )
    real = explain(cast(light, torch.bfloat16), 8, 2)
    assert "speed is real: aten::_weight_int4pack_mm_for_cpu multiplies" in real.sentence
    assert [x.speed for x in real.layers] == ["real"] * 7 + ["dense"]
    packed = [x for x in real.layers if x.speed == "real"]
    assert all(x.of_roofline == x.floor_ms / x.measured_ms for x in packed)
    share = sum(x.floor_ms for x in packed) / sum(x.measured_ms for x in packed)
    assert f"of all 7 layers, at {share:.0%} of their roofline" in real.sentence
    assert sum(x.stored_bytes for x in real.layers if x.speed == "real") == sum(
        part.stored_bits() // 8 for part in light.modules() if hasattr(part, "stored_bits")
    )
    for told in (dense, simulated, real):
        assert {x.bound for x in told.layers} <= {"memory", "compute", "overhead"}
        assert told.linears_ms == pytest.approx(sum(x.measured_ms for x in told.layers))
        assert told.sentence.count(". ") == 0 and told.sentence.endswith(".")
        assert "<table>" in told._repr_html_()


def test_compare_puts_the_first_model_first(llama, calib):
    light = rtn(llama, grid=Int(4, group_size=16), progress=False).model
    table = compare({"dense": llama, "int4": light}, calib, prompt=8, new=2)
    assert [row.name for row in table.rows] == ["dense", "int4"]
    assert table["dense"].kl == 0 and table["dense"].speed == "dense"
    assert table["int4"].kl > 0 and table["int4"].speed == "simulated"
    assert table.ratio("stored_mb", "int4") == table["dense"].stored_mb / table["int4"].stored_mb > 1
    assert table["dense"].perplexity == perplexity(llama, calib)
    assert table._repr_html_().count("<tr>") > 3 and "int4" in repr(table)
    with pytest.raises(ValueError, match="no models"):
        compare({}, calib)


def test_explain_refuses_what_is_no_decoder():
    with pytest.raises(ValueError, match="is not a decoder"):
        explain(nn.Linear(2, 2))


def test_a_walk_with_data_says_beforehand_what_it_will_take(llama, calib, capsys):
    rtn(llama, calib, grid=Int(4))
    shown = capsys.readouterr().err
    assert "GB beside the model and 1 s" in shown
    rtn(llama, calib, grid=Int(4), progress=False)
    assert capsys.readouterr().err == ""
