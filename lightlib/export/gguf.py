"""A model as one GGUF file, for llama.cpp and what is built on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
)
from torch import Tensor, nn

from lightlib.compact import CompactLinear
from lightlib.decoder import head_dim
from lightlib.export.gguf_blocks import blocks, halves_to_pairs, plain
from lightlib.export.gguf_tokenizer import WAY_OUT, add_tokenizer
from lightlib.export.huggingface import check_shapes, skeleton
from lightlib.persist import whole_or_nothing

# what llama.cpp calls a family; a Mistral without a sliding window computes as a Llama
ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}


def to_gguf(model: nn.Module, tokenizer, path: str | Path) -> Path:
    """Write model and tokenizer into the file `path`, each quantized layer in GGUF's blocks of 32 inputs.

    Exact: symmetric grids (2 to 4 bits as Q4_0, 5 to 8 as Q8_0) and float_zero grids of 2 to 4 bits (Q4_1),
    in groups that 32 divides, per channel or per tensor. Integer zero points of 2 to 4 bits become the 16-bit
    minimum of Q4_1, which moves a weight by less than 1/100 of a step. Dense matrices keep their dtype (a
    float32 embedding can be most of the file: see decoder.cast). llama.cpp itself rounds the inputs of packed
    layers to 8 bits, so its logits are not exactly ours. Nothing is left behind if writing fails.
    Raises ValueError for other grids, layers, families and tokenizers, and for what this GGUF cannot say.
    """
    path = Path(path).expanduser().absolute()
    check(model)
    tensors = dict(named_blocks(model))
    writer = GGUFWriter(None, MODEL_ARCH_NAMES[ARCHITECTURES[model.config.model_type]])
    add_shape(writer, model, tensors)
    add_tokenizer(writer, tokenizer, model.config.vocab_size)
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data.contiguous().numpy(), raw_dtype=kind)
    with whole_or_nothing(path.parent, sum(data.nbytes for _, data in tensors.values())) as draft:
        try:
            writer.write_header_to_file(draft / path.name)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return path


def check(model: nn.Module) -> None:
    """Raise ValueError for what llama.cpp would compute otherwise than transformers does."""
    config = model.config
    family = config.model_type
    if family not in ARCHITECTURES:
        raise ValueError(f"to_gguf writes {', '.join(ARCHITECTURES)}, not {family!r}; {WAY_OUT}")
    found = {
        "rope_type": config.rope_parameters["rope_type"] != "default" and config.rope_parameters["rope_type"],
        "sliding_window": getattr(config, "sliding_window", None),
        "attention_bias": family != "qwen2" and getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "hidden_act": config.hidden_act != "silu" and config.hidden_act,
    }
    for key, value in found.items():
        if value:
            raise ValueError(f"to_gguf cannot say {key}={value} of this {family!r} model; {WAY_OUT}")
    check_shapes(model, skeleton(model))


def named_blocks(model: nn.Module) -> Iterator[tuple[str, tuple[GGMLQuantizationType, Tensor]]]:
    """Every tensor by its name in a GGUF: (kind, bytes). A tied head is the embedding, and not repeated."""
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    for name, (kind, data) in _tensors(model):
        key = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if key is None:
            raise ValueError(f"{name} has no name in a GGUF of {config.model_type!r}; {WAY_OUT}")
        if architecture == MODEL_ARCH.LLAMA:
            for part, n_heads in heads.items():
                data = halves_to_pairs(data, n_heads) if part in key else data
        yield key, (kind, data)


def _tensors(model: nn.Module) -> Iterator[tuple[str, tuple[GGMLQuantizationType, Tensor]]]:
    dense = dict(model.named_parameters())
    for name, part in model.named_modules():
        if isinstance(part, CompactLinear):
            yield f"{name}.weight", blocks(name, part)
        for key, parameter in part.named_parameters(recurse=False, prefix=name):
            if key in dense:
                yield key, plain(parameter)


def add_shape(writer: GGUFWriter, model: nn.Module, tensors: dict) -> None:
    """The keys that describe the model; the kind of file is that of most matrices."""
    kind = Counter(kind.name for kind, data in tensors.values() if data.dim() == 2).most_common(1)[0][0]
    config, width = model.config, head_dim(model)
    writer.add_type("model")
    writer.add_name(Path(config.name_or_path).name or "lightlib")
    writer.add_file_type(LlamaFileType.ALL_F32 if kind == "F32" else LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
