"""A decoder counted by hand: parameters by part, bytes, FLOPs. Exact for the families below."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Family:
    """Where families differ in what they count."""

    mlp_matrices: int = 3  # gate, up, down; GPT-2 has no gate
    qkv_biases: bool = False
    all_biases: bool = False  # GPT-2: every linear layer and every norm has one
    head_norms: bool = False  # Qwen3 normalises each head's queries and keys
    positions: int = 0  # learned position vectors


FAMILIES = {
    "Llama": Family(),
    "Qwen2": Family(qkv_biases=True),
    "Qwen3": Family(head_norms=True),
    "GPT-2": Family(mlp_matrices=2, all_biases=True, positions=1024),
}


@dataclass(frozen=True)
class Shape:
    """The numbers in a model's config.json that decide its size."""

    layers: int
    width: int  # C, hidden_size
    heads: int  # H
    kv_heads: int  # K
    head_dim: int  # D
    d_ff: int
    vocabulary: int
    tied: bool  # the head reads the embedding's matrix
    family: str = "Llama"

    def __post_init__(self):
        small = [f.name for f in fields(self)[:7] if getattr(self, f.name) < 1]
        if small:
            raise ValueError(f"{small[0]}={getattr(self, small[0])}: must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide the {self.heads} heads that share them")
        if self.family not in FAMILIES:
            raise ValueError(f"no family {self.family!r}; choose one of {', '.join(FAMILIES)}")

    @property
    def block_weights(self) -> dict[str, int]:
        """Weights of the linear layers of all blocks, without biases."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.width * (q + kv + kv) + q * self.width
        mlp = FAMILIES[self.family].mlp_matrices * self.width * self.d_ff
        return {"attention": self.layers * attention, "mlp": self.layers * mlp}

    @property
    def head_weights(self) -> int:
        return self.vocabulary * self.width


# from each model's config.json
MODELS = {
    "SmolLM2-135M": Shape(30, 576, 9, 3, 64, 1536, 49152, True),
    "Qwen2.5-0.5B": Shape(24, 896, 14, 2, 64, 4864, 151936, True, "Qwen2"),
    "Qwen3-0.6B": Shape(28, 1024, 16, 8, 128, 3072, 151936, True, "Qwen3"),
    "GPT-2": Shape(12, 768, 12, 12, 64, 3072, 50257, True, "GPT-2"),
    "Llama-2-7B": Shape(32, 4096, 32, 32, 128, 11008, 32000, False),
    "LLaMA-3-8B": Shape(32, 4096, 32, 8, 128, 14336, 128256, False),
    "LLaMA-3-70B": Shape(80, 8192, 64, 8, 128, 28672, 128256, False),
}


def parameters(shape: Shape) -> dict[str, int]:
    """Number of weights by part, as `lightlib.decoder.parameters_by_part` counts them; a tied head adds none.

    >>> sum(parameters(MODELS["LLaMA-3-8B"]).values())
    8030261248
    """
    family, weights = FAMILIES[shape.family], shape.block_weights
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    qkv_bias = (q + kv + kv) * (family.qkv_biases or family.all_biases)
    norm = shape.width * (1 + family.all_biases)
    return {
        "embedding": (shape.vocabulary + family.positions) * shape.width,
        "attention": weights["attention"] + shape.layers * (qkv_bias + shape.width * family.all_biases),
        "mlp": weights["mlp"] + shape.layers * (shape.d_ff + shape.width) * family.all_biases,
        "norms": (2 * shape.layers + 1) * norm + shape.layers * 2 * shape.head_dim * family.head_norms,
        "head": 0 if shape.tied else shape.head_weights,
    }


def kv_cache_bytes(shape: Shape, context: int, batch: int = 1, kv_bits: float = 16) -> float:
    """Bytes of the keys and the values of `context` tokens in every layer."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * context * batch * kv_bits / 8


def attention_flop(shape: Shape, context: int) -> int:
    """FLOPs of one query token against `context` keys, and of mixing as many values, in all layers."""
    return 4 * shape.layers * shape.heads * shape.head_dim * context


def flop_per_token(shape: Shape, context: int) -> tuple[int, int]:
    """(prefill, decode) FLOPs of one token, counted as `lightlib.measure.flops` does.

    Prefill multiplies the whole square of scores and needs the head for its last token only.
    """
    in_blocks = 2 * sum(shape.block_weights.values()) + attention_flop(shape, context)
    return in_blocks + 2 * shape.head_weights // context, in_blocks + 2 * shape.head_weights


def read_bytes(shape: Shape, bits: float) -> float:
    """Bytes of weights that one decode step reads: of an untied embedding it looks up only a row."""
    return (sum(shape.block_weights.values()) + shape.head_weights) * bits / 8
