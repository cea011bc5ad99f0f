import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightlib import load, save
from lightlib.decoder import find_blocks, use_linear_everywhere
from lightlib.distillation.students import fewer_layers, spaced
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from tests.conftest import CONFIGS, random_model

IDS = torch.arange(24).view(2, 12) * 3 % 96


def deep(family, n=5):
    """A tiny random model of n blocks; of two kinds of attention, each its own."""
    config = CONFIGS[family]()
    config.num_hidden_layers = n
    if getattr(config, "layer_types", None):
        kinds = set(config.layer_types)
        full, other = "full_attention", (kinds - {"full_attention"} or {"full_attention"}).pop()
        config.layer_types = [full if i % 2 and len(kinds) > 1 else other for i in range(n)]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def test_all_blocks_give_a_copy_of_the_teacher(model):
    student = fewer_layers(model, keep=2)
    assert torch.equal(logits(student), logits(model))
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert list(student.state_dict()) == list(model.state_dict())


def test_the_student_is_its_teacher_with_the_other_blocks_passed_over(family):
    teacher = deep(family)
    student, kept = fewer_layers(teacher, keep=[0, 2, 3]), [0, 2, 3]
    passed = copy.deepcopy(teacher)
    stack = list(find_blocks(passed).values())
    for i in {0, 1, 2, 3, 4} - set(kept):
        stack[i].forward = lambda x, *args, **named: x
    assert len(find_blocks(student)) == student.config.num_hidden_layers == 3
    torch.testing.assert_close(logits(student), logits(passed), atol=2e-5, rtol=1e-4)
    kinds = getattr(teacher.config, "layer_types", None)
    assert kinds is None or student.config.layer_types == [kinds[i] for i in kept]
    indices = [p.layer_idx for p in student.modules() if hasattr(p, "layer_idx")]
    assert not indices or (indices == sorted(indices) and indices[-1] == 2)


def test_it_saves_loads_and_writes_tokens_like_any_other(family, tmp_path):
    student = fewer_layers(deep(family), keep=2)
    student.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    save(student, tmp_path / "ours")
    for other in (again, load(tmp_path / "ours")):
        torch.testing.assert_close(logits(other), logits(student), atol=1e-6, rtol=1e-6)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, fresh = (student.generate(IDS, use_cache=cache, **settings) for cache in (True, False))
    assert torch.equal(cached, fresh)


def test_the_teacher_its_type_and_the_random_state_stay_as_they_were():
    teacher = random_model("gemma2", torch.bfloat16)
    before, state = copy.deepcopy(teacher.state_dict()), torch.get_rng_state()
    student = fewer_layers(teacher, keep=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert teacher.config.num_hidden_layers == 2 and len(teacher.config.layer_types) == 2
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    shared = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert shared == student.config.tie_word_embeddings


def test_a_gpt2_whose_layers_were_made_linear_has_a_plain_student():
    teacher = deep("gpt2")
    student = fewer_layers(use_linear_everywhere(copy.deepcopy(teacher)), keep=3)
    plain = fewer_layers(teacher, keep=3)
    assert type(student.transformer.h[0].attn.c_attn) is type(plain.transformer.h[0].attn.c_attn)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), plain.parameters(), strict=True))


def test_blocks_are_evenly_spaced_with_the_first_and_the_last():
    assert [spaced(6, k) for k in (1, 2, 3, 6)] == [[0], [0, 5], [0, 2, 5], [0, 1, 2, 3, 4, 5]]
    assert all(len(set(spaced(n, k))) == k for n in range(1, 33) for k in range(1, n + 1))


@pytest.mark.parametrize("keep", [0, 3, [], [1, 0], [0, 0], [0, 2], [-1, 0]])
def test_blocks_that_are_not_there_are_refused(llama, keep):
    with pytest.raises(ValueError, match="keep="):
        fewer_layers(llama, keep=keep)


def test_a_compressed_teacher_is_refused(llama):
    light = rtn(llama, grid=Int(8), progress=False).model
    with pytest.raises(ValueError, match=r"was compressed \(model.layers.0.self_attn.q_proj\); shrink it"):
        fewer_layers(light, keep=1)
    gpt2 = random_model("gpt2")
    gpt2.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
        fewer_layers(gpt2, keep=1)
