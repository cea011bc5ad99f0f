import copy
import gc
import warnings
import weakref

import pytest
import torch
import torch._inductor
import torch.nn.functional as F
from torch import nn

from lightlib import decode
from lightlib.decode import generate, lean_path
from lightlib.decoder import cast, find_blocks
from lightlib.measure import latency, size
from lightlib.one_row import addmm, attention, linear, linear8, mm
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from tests.conftest import VOCABULARY, random_model

LEAN = ("lean", "")


def prompts(batch: int, length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def reference(model, ids, new):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)


@pytest.fixture
def traced(monkeypatch):
    """Steps are traced but run by PyTorch's own kernels: seconds less. The list counts what was compiled."""
    graphs = []
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, *_, **__: graphs.append(graph) or graph)
    return graphs


@pytest.fixture
def plain(llama):
    """A model that never ends its sequences."""
    llama.generation_config.eos_token_id = None
    return llama


# the limits
def test_a_row_times_a_weight_is_linear():
    torch.manual_seed(0)
    for n_out in (8, 7):  # a multiple of the lanes, and not
        x, weight, bias = torch.randn(1, 1, 5), torch.randn(n_out, 5), torch.randn(n_out)
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
        codes, scale = torch.randint(-9, 9, (n_out, 5), dtype=torch.int8), torch.rand(n_out)
        torch.testing.assert_close(linear8(x[0], codes, scale), x[0] @ (codes * scale[:, None]).T)


def test_a_product_with_columns_of_one_row_as_sums_is_that_product():
    torch.manual_seed(0)
    for rows in (1, 3):
        x, weight, y = torch.randn(rows, 5), torch.randn(5, 6), torch.randn(rows, 6)
        torch.testing.assert_close(mm(x, weight), x @ weight)
        torch.testing.assert_close(addmm(y, x, weight), y + x @ weight)


def test_attention_of_one_query_is_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    mask = torch.tensor([1, 1, 0, 1, 1, 0]).bool().expand(2, 1, 1, 6)
    for scale in (None, 0.3):
        expected = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        torch.testing.assert_close(attention(q, k, v, attn_mask=mask, scale=scale), expected)


def test_eager_decoding_is_what_generate_decodes(model):
    for batch, length, new in ((1, 5, 12), (3, 9, 20)):
        ids = prompts(batch, length)
        assert torch.equal(generate(model, ids, new, compile=False), reference(model, ids, new))


def test_the_lean_path_decodes_what_generate_decodes(model, traced):
    # also longer than the windows of 8
    for length, new in ((5, 30), (12, 20), (1, 3)):
        ids = prompts(1, length)
        assert torch.equal(generate(model, ids, new), reference(model, ids, new))
    assert lean_path(model) == LEAN and len(traced) == 1


def test_compiled_code_decodes_what_generate_decodes(plain):
    ids = prompts(1, 6)
    assert torch.equal(generate(plain, ids, 24), reference(plain, ids, 24))
    assert lean_path(plain) == LEAN


@pytest.mark.parametrize("grid", [Int(4, group_size=16), Int(8)], ids=repr)
def test_packed_models_take_the_lean_path_in_float32(plain, traced, grid):
    light = rtn(plain, grid=grid, progress=False).model
    ids = prompts(2, 7)
    assert torch.equal(generate(light, ids, 16), reference(light, ids, 16))
    assert lean_path(light) == LEAN


def wide_llama():
    """Of a shape that ATen's packed matmuls take."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, eos_token_id=None, **shape)
    return LlamaForCausalLM(config).eval()


def assert_greedy(model, tokens, prompt: int):
    """Each new token is the likeliest, or within bfloat16's rounding of it, given all before."""
    logits = model(tokens).logits[:, prompt - 1 : -1].float()
    chosen = logits.gather(-1, tokens[:, prompt:, None])[..., 0]
    rounding = 4 * torch.finfo(torch.bfloat16).eps * logits.abs().amax(-1)
    assert (chosen >= logits.amax(-1) - rounding).all()


@pytest.mark.parametrize("grid", [Int(4, group_size=32), Int(8)], ids=repr)
@torch.no_grad()
def test_packed_codes_are_multiplied_by_compiled_code_in_bfloat16(grid):
    light = cast(rtn(wide_llama(), grid=grid, progress=False, inplace=True).model, torch.bfloat16)
    ids = prompts(1, 6)
    assert_greedy(light, generate(light, ids, 16), 6)
    assert lean_path(light) == LEAN


# where sequences end
def test_sequences_end_where_generate_ends_them(plain, traced):
    ids = prompts(3, 8)
    free = generate(plain, ids, 20)
    # the end tokens are two that come, so that the sequences end at different lengths
    plain.generation_config.eos_token_id = [free[0, 10].item(), free[1, 14].item()]
    expected = reference(plain, ids, 20)
    for compile in (True, False):
        assert torch.equal(generate(plain, ids, 20, compile=compile), expected)
    assert not torch.equal(expected, free[:, : expected.shape[1]])
    assert torch.equal(generate(plain, ids, 20, stop=False), free)


# what is kept between calls
def test_a_second_call_compiles_nothing_and_a_longer_or_broader_one_does(plain, traced):
    generate(plain, prompts(1, 4), 3)
    generate(plain, prompts(1, 20, seed=5), 30)
    assert len(traced) == 1
    generate(plain, prompts(2, 4), 3)
    assert len(traced) == 2
    plain.config.max_position_embeddings = 1024
    generate(plain, prompts(1, 4), 300, compile=False)
    generate(plain, prompts(1, 250), 7)
    assert len(traced) == 3


def test_equal_blocks_are_compiled_once(traced):
    model = random_model("llama")
    generate(model, prompts(1, 4), 3)
    assert len([name for name, _ in traced[0].named_children() if name.startswith("subgraph")]) == 1


def test_another_weight_another_layer_another_type_are_noticed(plain, traced):
    ids = prompts(1, 6)
    generate(plain, ids, 3)
    for change in (
        lambda: plain.lm_head.weight.data.neg_(),  # in place: the compiled step reads the same tensor
        lambda: setattr(plain.lm_head, "weight", nn.Parameter(plain.lm_head.weight.roll(1, 0))),
        lambda: rtn(plain, grid=Int(3, group_size=16), progress=False, inplace=True),
        lambda: plain.to(torch.float64),
    ):
        change()
        assert torch.equal(generate(plain, ids, 8), reference(plain, ids, 8))
    assert len(traced) == 4 and lean_path(plain) == LEAN


def test_two_models_keep_apart(plain, traced):
    other = copy.deepcopy(plain)
    other.lm_head.weight.data.neg_()
    ids = prompts(1, 6)
    for model in (plain, other, plain):
        assert torch.equal(generate(model, ids, 8), reference(model, ids, 8))


def test_the_model_is_left_as_it_was_and_goes_when_it_is_dropped(plain, traced):
    state = {name: value.clone() for name, value in plain.state_dict().items()}
    own = {name: set(vars(part)) for name, part in plain.named_modules()}
    generate(plain, prompts(1, 6), 4)
    assert {name: set(vars(part)) for name, part in plain.named_modules()} == own
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    model = random_model("llama")
    generate(model, prompts(1, 6), 4)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_inference_mode_leaves_nothing_that_later_calls_cannot_use(plain, traced):
    with torch.inference_mode():
        first = generate(plain, prompts(1, 6), 4)
    assert torch.equal(generate(plain, prompts(1, 6), 4), first)


# what is not compiled
def refused(model, words: str):
    ids = prompts(1, 6)
    with pytest.warns(UserWarning, match=f"decoding eagerly, since .*{words}"):
        assert torch.equal(generate(model, ids, 8), reference(model, ids, 8))
    path, reason = lean_path(model)
    assert path == "" and words in reason


def test_a_failure_to_compile_is_named_and_not_tried_again(plain, monkeypatch):
    tried = []

    def fail(*_, **__):
        tried.append(1)
        raise OSError("no space left")

    monkeypatch.setattr(torch._inductor, "compile", fail)
    refused(plain, "compiling failed: OSError: no space left")
    refused(plain, "no space left")
    assert len(tried) == 1
    assert not any("forward" in vars(block) for block in find_blocks(plain).values())


def test_compiled_code_that_gives_other_logits_is_not_used(plain, monkeypatch):
    def wrong(graph, *_, **__):
        return lambda *tensors: [value * 1.01 for value in graph(*tensors)]

    monkeypatch.setattr(torch._inductor, "compile", wrong)
    refused(plain, "logits are off by 0.01")


def test_layers_with_hooks_run_eagerly(plain, traced):
    hook = plain.lm_head.register_forward_hook(lambda *_: None)
    refused(plain, "lm_head carries hooks")
    hook.remove()
    assert lean_path(plain) == LEAN and not traced


def test_a_decoder_that_is_not_known_runs_eagerly(plain, traced):
    plain.config.model_type = "another"
    refused(plain, "'another' is not a decoder that lightlib knows")


def test_the_eager_path_says_nothing(plain):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(plain, prompts(1, 6), 2, compile=False)


@pytest.mark.parametrize(
    ("ids", "new", "words"),
    [
        (torch.ones(5).long(), 3, r"shape \(5,\), not \(batch, prompt\); use ids\[None\]"),
        (torch.ones(1, 0).long(), 3, r"shape \(1, 0\)"),
        (torch.ones(1, 5).long(), 0, "new=0: must be at least 1"),
        (
            torch.ones(1, 60).long(),
            8,
            "prompt 60 .* new 8 tokens exceed the model's context of 64; take new=4",
        ),
    ],
)
def test_what_cannot_be_decoded_is_refused(plain, ids, new, words):
    with pytest.raises(ValueError, match=words):
        generate(plain, ids, new)


# how long it takes
def test_latency_measures_the_path_it_names(plain, traced):
    eager, lean = latency(plain, 8, 4, repeats=1), latency(plain, 8, 4, repeats=1, lean=True)
    assert (eager.path, lean.path) == ("eager", "lean") and len(traced) == 1
    assert lean.total_ms == lean.ttft_ms + 4 * lean.tpot_ms
    cache = decode.compiled_step(plain, 1, 13).cache_bytes
    # 2 blocks, keys and values, 2 heads of 8, 256 tokens of 4 bytes
    assert cache == 2 * 2 * 2 * 8 * decode.SHORTEST * 4
    assert lean.peak_bytes > size(plain).resident_bytes + cache
    plain.lm_head.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="lm_head carries hooks"):
        path = latency(plain, 8, 4, repeats=1, lean=True).path
    assert path == "eager, since lm_head carries hooks, which a compiled step would not run"


@pytest.mark.model
@torch.no_grad()
def test_the_real_model_decodes_the_same_on_the_lean_path(smollm):
    model, tokenizer = smollm
    ids = tokenizer("The history of the printing press begins", return_tensors="pt").input_ids
    assert torch.equal(generate(model, ids, 24), reference(model, ids, 24))
    light = cast(rtn(model, grid=Int(4, group_size=64), progress=False).model, torch.bfloat16)
    assert_greedy(light, generate(light, ids, 24), ids.shape[1])
    assert lean_path(model) == lean_path(light) == LEAN


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_graph_decodes_what_generate_decodes(family):
    model = random_model(family).cuda()
    for batch, length, new in ((1, 5, 30), (2, 12, 20), (1, 3, 9)):
        ids = prompts(batch, length).cuda()
        assert torch.equal(generate(model, ids, new), reference(model, ids, new))
    assert lean_path(model) == LEAN
