"""A tokenizer inside a GGUF: byte-level BPE, the kind of GPT-2, SmolLM, Llama 3 and Qwen."""

from __future__ import annotations

import json

from gguf import GGUFWriter, TokenType

# What a tokenizer splits text by before it merges; llama.cpp has its own code for each and knows it by name.
SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "qwen2",
}
WAY_OUT = "write the model with to_huggingface and convert that folder with llama.cpp's own script"


def add_tokenizer(writer: GGUFWriter, tokenizer, vocab_size: int) -> None:
    """Write the vocabulary (filled to `vocab_size`), merges, special tokens and chat template.

    Raises ValueError for a tokenizer that is not byte-level BPE, or splits text in a way without a name here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no tokenizer.json to read its merges from; {WAY_OUT}"
        )
    written = json.loads(backend.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(written))
    tokens, types = vocabulary(tokenizer, written, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = written["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for special in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{special}_token_id")
        if number is not None:
            getattr(writer, f"add_{special}_token_id")(number)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def split_name(written: dict) -> str:
    """llama.cpp's name for how the tokenizer, given as tokenizer.json holds it, splits text."""
    steps = written["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if written["model"]["type"] != "BPE" or kinds[-1] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        raise ValueError(
            f"the tokenizer is {written['model']['type']} of {kinds}, not byte-level BPE; {WAY_OUT}"
        )
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    pattern = steps[0].get("pattern", {}).get("Regex")
    if len(steps) == 2 and pattern in SPLITS:
        return SPLITS[pattern]
    raise ValueError(f"no name is known here for the tokenizer's split {pattern or kinds}; {WAY_OUT}")


def vocabulary(tokenizer, written: dict, size: int) -> tuple[list[str], list[int]]:
    """(tokens, their types) by id; ids that no token has are filled with unused ones."""
    vocab = tokenizer.get_vocab()
    if max(vocab.values()) >= size:
        raise ValueError(f"the tokenizer has ids up to {max(vocab.values())}, the model {size} embeddings")
    tokens, types = [f"[PAD{i}]" for i in range(size)], [TokenType.UNUSED] * size
    for token, i in vocab.items():
        tokens[i], types[i] = token, TokenType.NORMAL
    for token in written["added_tokens"]:
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    return tokens, types
