"""One view on any Hugging Face decoder. The only file that knows what architectures call their parts."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightlib.compact import CompactLinear
from lightlib.low_rank import COMPOSITE, Correction
from lightlib.shortcut import Shortcut


@dataclass(frozen=True)
class Roles:
    """The names of a family's parts: from the model for the first three, from a block for the others.

    positions: learned embeddings of positions, added to the stream. attention_post, mlp_post: norms of what a
    branch gives, before it is added. value, up: the linear whose last rows make the attention's values, and
    the MLP's hidden state before the last layer; None where they are interleaved. gated: the MLP multiplies
    `up` by a gate, and applies no activation to it. norm_offset: a norm multiplies by its weight plus this.
    """

    blocks: str
    embedding: str
    final_norm: str
    attention_norm: str
    mlp_norm: str  # the attention norm once more, where both branches read one norm
    attention_in: tuple[str, ...]
    attention_out: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    value: str | None = "self_attn.v_proj"
    up: str = "mlp.up_proj"
    gated: bool = True
    norm_offset: float = 0.0
    positions: tuple[str, ...] = ()
    attention_post: str | None = None
    mlp_post: str | None = None

    @property
    def attention(self) -> tuple[str, ...]:
        return (*self.attention_in, self.attention_out)

    @property
    def mlp(self) -> tuple[str, ...]:
        return (*self.mlp_in, self.mlp_out)

    @property
    def stages(self) -> list[tuple[str, ...]]:
        """A block's linears in the order they run; those in one stage read the same input."""
        return [self.attention_in, (self.attention_out,), self.mlp_in, (self.mlp_out,)]


LLAMA = Roles(
    blocks="model.layers",
    embedding="model.embed_tokens",
    final_norm="model.norm",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    attention_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.o_proj",
    mlp_in=("mlp.gate_proj", "mlp.up_proj"),
    mlp_out="mlp.down_proj",
)
GEMMA = replace(LLAMA, norm_offset=1.0)
GEMMA2 = replace(
    GEMMA,
    mlp_norm="pre_feedforward_layernorm",
    attention_post="post_attention_layernorm",
    mlp_post="post_feedforward_layernorm",
)

FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "phi3": replace(
        LLAMA,
        attention_in=("self_attn.qkv_proj",),
        mlp_in=("mlp.gate_up_proj",),
        value="self_attn.qkv_proj",
        up="mlp.gate_up_proj",
    ),
    "phi": replace(
        LLAMA,
        final_norm="model.final_layernorm",
        mlp_norm="input_layernorm",
        attention_out="self_attn.dense",
        mlp_in=("mlp.fc1",),
        mlp_out="mlp.fc2",
        up="mlp.fc1",
        gated=False,
    ),
    "opt": replace(
        LLAMA,
        blocks="model.decoder.layers",
        embedding="model.decoder.embed_tokens",
        final_norm="model.decoder.final_layer_norm",
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        attention_out="self_attn.out_proj",
        mlp_in=("fc1",),
        mlp_out="fc2",
        up="fc1",
        gated=False,
        positions=("model.decoder.embed_positions",),
    ),
    "gpt2": Roles(
        blocks="transformer.h",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        attention_in=("attn.c_attn",),
        attention_out="attn.c_proj",
        mlp_in=("mlp.c_fc",),
        mlp_out="mlp.c_proj",
        value="attn.c_attn",
        up="mlp.c_fc",
        gated=False,
        positions=("transformer.wpe",),
    ),
    "gpt_neox": Roles(
        blocks="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        attention_in=("attention.query_key_value",),
        attention_out="attention.dense",
        mlp_in=("mlp.dense_h_to_4h",),
        mlp_out="mlp.dense_4h_to_h",
        value=None,
        up="mlp.dense_h_to_4h",
        gated=False,
    ),
}


# what configs call the number of neurons in an MLP
MLP_SIZES = ("intermediate_size", "ffn_dim", "n_inner")


def roles(model: nn.Module) -> Roles:
    """The roles of the model's family. Raises ValueError for a family that lightlib does not know."""
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", type(model).__name__)
    if getattr(config, "is_encoder_decoder", False) or family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{family!r} is not a decoder that lightlib knows; it compresses {known}")
    if not hasattr(model, "lm_head"):
        raise ValueError(
            f"{type(model).__name__} has no language model head; load it with AutoModelForCausalLM"
        )
    return FAMILIES[family]


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder blocks, first to last, by their name in the model."""
    path = roles(model).blocks
    return {f"{path}.{i}": block for i, block in enumerate(model.get_submodule(path))}


def norm_readers(names: Roles) -> dict[str, tuple[str, ...]]:
    """{norm: the linears that read it}, by their names in a block."""
    readers = {names.attention_norm: names.attention_in}
    readers[names.mlp_norm] = readers.get(names.mlp_norm, ()) + names.mlp_in
    return readers


def stream_norms(model: nn.Module) -> list[str]:
    """The norms as wide as the stream, by their names in the model; the final one comes last."""
    names = roles(model)
    inside = (names.attention_norm, names.attention_post, names.mlp_norm, names.mlp_post)
    inside = [name for name in dict.fromkeys(inside) if name]
    return [*(f"{block}.{name}" for block in find_blocks(model) for name in inside), names.final_norm]


def is_parallel(model: nn.Module) -> bool:
    """Whether attention and MLP of a block read the same input."""
    names = roles(model)
    return names.mlp_norm == names.attention_norm or getattr(model.config, "use_parallel_residual", False)


def head_dim(model: nn.Module) -> int:
    """The width of one attention head."""
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_width(block: nn.Module, names: Roles) -> int:
    """The width of all query heads of a block: what its attention gives the layer that ends it."""
    shape = linear_shapes(block).get(names.attention_out)
    return shape[1] if shape else block.get_submodule(names.attention_out).in_features


def set_head_counts(model: nn.Module, block: nn.Module, heads: int) -> None:
    """Tell a block's attention that it has `heads` key-value heads, where its code asks. In place."""
    names, size = roles(model), head_dim(model)
    attention = block.get_submodule(names.attention_out.rpartition(".")[0])
    queries = block.get_submodule(names.attention_out).in_features // size
    if hasattr(attention, "num_heads"):
        attention.num_heads = queries
    if hasattr(attention, "num_key_value_heads"):
        attention.num_key_value_heads = heads
    if hasattr(attention, "num_key_value_groups"):
        attention.num_key_value_groups = queries // heads
    if hasattr(attention, "split_size"):
        attention.split_size = queries * size
    # Phi-3 asks the config, which all blocks share
    if model.config.model_type == "phi3" and attention.config.num_attention_heads != queries:
        attention.config = copy.copy(attention.config)
        attention.config.head_dim, attention.config.num_attention_heads = size, queries


def check_sharing(model: nn.Module) -> None:
    """Raise ValueError where the family's attention has no way to let query heads share keys and values."""
    names = roles(model)
    attention = next(iter(find_blocks(model).values())).get_submodule(names.attention_out.rpartition(".")[0])
    if not hasattr(attention, "num_key_value_groups"):
        raise ValueError(
            f"{model.config.model_type!r}: its attention in transformers has one key and one value head for "
            "each query head, so none can be shared; take heads out instead (llm_pruner, fisher_masks)"
        )


def turning_channels(model: nn.Module, block: nn.Module) -> int | None:
    """How many channels of a head, from its first, RoPE turns: channel i together with i + half of them.

    None where a norm stands between the projection and the turn, as in Qwen3 and Gemma-3.
    """
    attention = block.get_submodule(roles(model).attention_out.rpartition(".")[0])
    if any(hasattr(attention, name) for name in ("k_norm", "k_layernorm")):
        return None
    return 2 * len(model.base_model.rotary_emb.inv_freq)


def ends_as_wide(model: nn.Module) -> bool:
    """Whether the family's code takes the stream to leave the last block as wide as it entered the first."""
    return model.config.model_type == "gpt2"


def feed_forward(block: nn.Module, names: Roles, x: Tensor) -> Tensor:
    """What a block's MLP makes of x (..., d_model)."""
    whole = names.mlp_out.rpartition(".")[0]
    if whole:
        return block.get_submodule(whole)(x)
    # OPT keeps the layers of its MLP in the block itself
    hidden = block.activation_fn(block.get_submodule(*names.mlp_in)(x))
    return block.get_submodule(names.mlp_out)(hidden)


def linears(module: nn.Module) -> dict[str, nn.Linear | CompactLinear]:
    """The linear layers in `module`, dense or compact, by their name in it. Weights are (out, in)."""
    return {
        name: part for name, part in module.named_modules() if isinstance(part, (nn.Linear, CompactLinear))
    }


def stages(block: nn.Module, names: Roles) -> list[tuple[str, ...]]:
    """A block's linears in the order they run; those in one stage read the same input.

    Of a layer made of several, the first reads what the layer reads; each other one is a stage of its own.
    """
    found = []
    for stage in names.stages:
        first, later = [], []
        for name in stage:
            part = block.get_submodule(name)
            if isinstance(part, COMPOSITE):
                begin, *rest = ([f"{name}.{inner}" for inner in inside] for inside in part.stages)
                first, later = first + begin, later + [tuple(inside) for inside in rest]
            else:
                first.append(name)
        found += [tuple(first), *later]
    return found


def check_linears(model: nn.Module, whole: bool = False) -> None:
    """Raise ValueError where a linear layer of the blocks is wrapped in something else, as LoRA does.

    With `whole`, also where a layer is made of several, as those of low rank are.
    """
    for block, module in find_blocks(model).items():
        present = linear_shapes(module)
        for name in itertools.chain(*roles(model).stages):
            part = module.get_submodule(name)
            composite = isinstance(part, COMPOSITE)
            if composite and whole:
                raise ValueError(
                    f"{block}.{name} is a {type(part).__name__}, and this method takes whole matrices; "
                    "apply it before layers are factorized"
                )
            if name not in present and not composite:
                kind = type(part).__name__
                raise ValueError(f"{block}.{name} is a {kind}; merge it into its linear first (merge_lora)")


def linear_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of every layer in `module` that multiplies by a weight, GPT-2's Conv1D too, by name.

    A shortcut, or a correction of low rank, stands with the shape of a matrix that takes as many products.
    """
    from transformers.pytorch_utils import Conv1D

    shapes = {name: (part.out_features, part.in_features) for name, part in linears(module).items()}
    beside = (Shortcut, Correction)
    shapes |= {name: part.products for name, part in module.named_modules() if isinstance(part, beside)}
    convs = {name: part for name, part in module.named_modules() if isinstance(part, Conv1D)}
    return shapes | {name: tuple(part.weight.shape[::-1]) for name, part in convs.items()}


def use_linear_everywhere(model: nn.Module) -> nn.Module:
    """Turn GPT-2's Conv1D layers, which store (in, out), into nn.Linear. In place; changes no output."""
    from transformers.pytorch_utils import Conv1D

    for name, part in list(model.named_modules()):
        if isinstance(part, Conv1D):
            model.set_submodule(name, as_linear(part))
    return model


def as_linear(part: nn.Module) -> nn.Module:
    """One of GPT-2's Conv1D layers as the nn.Linear that it stands for; any other layer as it is."""
    from transformers.pytorch_utils import Conv1D

    if not isinstance(part, Conv1D):
        return part
    n_in, n_out = part.weight.shape
    linear = nn.Linear(n_in, n_out, device="meta")
    linear.weight = nn.Parameter(part.weight.detach().T.contiguous(), part.weight.requires_grad)
    linear.bias = part.bias
    return linear


def check_table(model: nn.Module) -> None:
    """Raise ValueError where the embedding is no table of its own rows, to be cut or turned."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(
            f"{roles(model).embedding} is a {type(embedding).__name__}, and this method takes a whole table; "
            "apply it before the embedding is compressed"
        )


def untie_head(model: nn.Module) -> nn.Module:
    """Give the head a weight of its own where it shares the embedding's. In place; changes no output."""
    check_table(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), embedding.weight.requires_grad)
        model.config.tie_word_embeddings = False
    return model


@torch.no_grad()
def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with its parameters in `dtype`. In place; rotary frequencies and packed tensors keep theirs.

    `model.to(torch.bfloat16)` would round the rotary frequencies too, which harms long contexts.
    """
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    model.config.dtype = dtype
    return model


@torch.no_grad()
def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Number of weights in the embedding, attention, MLP, norms and head, and in shortcuts where there are
    any; tied ones counted once."""
    names = roles(model)
    parts = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head"), 0)
    shortcuts = {name for name, part in model.named_modules() if isinstance(part, Shortcut)}
    seen = set()
    for name, weight in model.named_parameters():
        if weight.data_ptr() in seen:
            continue
        seen.add(weight.data_ptr())
        inside = name.removeprefix(names.blocks + ".").partition(".")[2]
        if name.rpartition(".")[0] in shortcuts:
            parts["shortcuts"] = parts.get("shortcuts", 0) + weight.numel()
        elif name.startswith(names.blocks):
            if inside.startswith(names.attention):
                parts["attention"] += weight.numel()
            elif inside.startswith(names.mlp):
                parts["mlp"] += weight.numel()
            else:
                parts["norms"] += weight.numel()
        elif name.startswith("lm_head"):
            parts["head"] += weight.numel()
        elif name.startswith(names.final_norm):
            parts["norms"] += weight.numel()
        else:
            parts["embedding"] += weight.numel()
    return parts
