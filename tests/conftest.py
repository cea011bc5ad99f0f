"""Tiny random models of every family, and where the real one is."""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.gemma.configuration_gemma import GemmaConfig
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt_neox.configuration_gpt_neox import GPTNeoXConfig
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.opt.configuration_opt import OPTConfig
from transformers.models.phi.configuration_phi import PhiConfig
from transformers.models.phi3.configuration_phi3 import Phi3Config
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

os.environ.setdefault("HF_HUB_OFFLINE", "1")
VOCABULARY = 96
IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    **IDS,
)
MHA = {**SHAPE, "num_key_value_heads": 4}
SLIDING = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8),
    "phi": lambda: PhiConfig(**MHA),
    "phi3": lambda: Phi3Config(**SHAPE),
    "gemma": lambda: GemmaConfig(**SHAPE, head_dim=8),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=8, **SLIDING),
    "gemma3_text": lambda: Gemma3TextConfig(**SHAPE, head_dim=8, **SLIDING),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, **IDS,
    ),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **IDS),
    "gpt_neox": lambda: GPTNeoXConfig(**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}),
}  # fmt: skip


def random_model(family: str, dtype: torch.dtype = torch.float32, tied: bool | None = None):
    """tied: whether the head shares the embedding's weight, by default as the config has it."""
    config = CONFIGS[family]()
    if tied is not None:
        config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    # biases start at zero and norms at one; other values show whether they are carried along
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data += 0.1 * torch.randn_like(weight)
    return model.to(dtype)


@torch.no_grad()
def inputs_of(layer, model, batches) -> torch.Tensor:
    """What reaches `layer` when the dense model runs over the batches: (tokens, in)."""
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    for ids in batches:
        model(ids)
    hook.remove()
    return torch.cat(seen)


def data_script(name: str):
    """The script data/`name`.py as a module."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


@pytest.fixture(params=CONFIGS)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return random_model(family)


@pytest.fixture
def llama():
    return random_model("llama")


@pytest.fixture
def calib():
    """Two batches of different length and size: (2, 24) and (1, 17)."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, shape, generator=generator) for shape in ((2, 24), (1, 17))]


@pytest.fixture(scope="session")
def smollm():
    """The real model in float32; fetched once, then cached."""
    from lightlib.zoo import load_model

    return load_model(progress=False)
