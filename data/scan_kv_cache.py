"""What the real model's cache loses when it evicts tokens or rounds them, beside the bytes it then holds.

    OMP_NUM_THREADS=1 python data/scan_kv_cache.py      # 30 minutes; writes data/kv_cache.json

smollm2-135m reads 1024 tokens in one call, after which the cache is compressed, and then, in another, the
next 128 of the ten pieces of the `prose` test split. The nll, in nats a token, is that of 127 of these; the
first is given. Bytes are those of all storages of the cache after the prompt, a policy's own notes among
them, in float32, in which the nll was measured, and with the model in bfloat16. SnapKV's window is 64 tokens,
or half of the budget where that is less. Tokens by lot are drawn anew for each piece; "random and sinks"
keeps the first four as well. A scan that was stopped goes on where it ended. Lesson 15 draws it.
"""

import statistics
import time
from functools import partial
from pathlib import Path

import torch
from scanning import arguments, go_on, made_by, write
from torch import Tensor, nn
from transformers.cache_utils import Cache

from lightlib.attention.continuation import continuation_nll
from lightlib.attention.cost import allocated_bytes
from lightlib.attention.interface import Score, attend
from lightlib.attention.kv_quantization import quantized
from lightlib.attention.open_cache import OpenCache, full
from lightlib.attention.policies import H2O, TOVA, KeyNorm, Random, SnapKV, StreamingLLM, protect
from lightlib.zoo import batches, load_model, load_text

SETTINGS = {
    "model": "smollm2-135m", "dtype": "float32", "text": "prose", "split": "test", "pieces": 10,
    "prompt": 1024, "following": 128,
}  # fmt: skip
KNOBS = ("cache", "keep", "bits", "residual", "keys")
BUDGETS = (768, 512, 256, 128, 64)
POLICIES = {
    "StreamingLLM": lambda keep: StreamingLLM(),
    "H2O": lambda keep: H2O(),
    "SnapKV": lambda keep: SnapKV(window=min(64, keep // 2)),
    "TOVA": lambda keep: TOVA(),
    "key norm": lambda keep: KeyNorm(),
}


def plan() -> list[dict]:
    """The points: the whole cache, those of the policies at each budget, and those in few bits."""
    kept = [{"cache": name, "keep": keep} for keep in BUDGETS for name in (*POLICIES, *LOTS)]
    rounded = ((8, 128), (4, 128), (3, 128), (2, 128), (4, 32), (2, 32))
    settings = [{"bits": bits, "residual": residual} for bits, residual in rounded]
    settings.append({"bits": 2, "residual": 128, "keys": "token"})
    return [{"cache": "full"}, *kept, *({"cache": "quantized", **each} for each in settings)]


def open_caches(cache: str, **knobs) -> list[OpenCache]:
    """The point's cache for each piece. No two pieces share their lots."""
    pieces = range(SETTINGS["pieces"])
    if cache in LOTS:
        return [partial(attend, score=LOTS[cache](seed), **knobs) for seed in pieces]
    if cache in POLICIES:
        return [partial(attend, score=POLICIES[cache](knobs["keep"]), **knobs) for _ in pieces]
    return [full if cache == "full" else partial(quantized, **knobs) for _ in pieces]


def random_and_sinks(seed: int) -> Score:
    """Tokens by lot, but for the first: what is left of a policy's lead when they do not count."""
    by_lot = Random(seed)
    return lambda seen: protect(by_lot(seen), seen.positions < StreamingLLM().sinks)


LOTS = {"random": Random, "random and sinks": random_and_sinks}


@torch.no_grad()
def after_prompt(model: nn.Module, piece: Tensor, open_cache: OpenCache) -> tuple[int, int]:
    """The bytes that the cache holds after the prompt, and the tokens of which it has something."""
    with open_cache(model) as cache:
        prompt = piece[:, : SETTINGS["prompt"]]
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return allocated_bytes(cache), tokens(cache)


def tokens(cache: Cache) -> int:
    """The tokens held of each block, which are as many in all of them."""
    (held,) = {layer.keys.shape[2] + getattr(layer, "packed_tokens", 0) for layer in cache.layers}
    return held


def measure(model: nn.Module, halved: nn.Module, pieces: list[Tensor], point: dict) -> dict:
    """The point with its nll, also of each piece, and what the cache holds of the first."""
    begin, caches = time.perf_counter(), open_caches(**point)
    nlls = [
        continuation_nll(model, [piece], one, prompt=SETTINGS["prompt"])
        for piece, one in zip(pieces, caches, strict=True)
    ]
    (held, n), (half, _) = (after_prompt(one, pieces[0], caches[0]) for one in (model, halved))
    return {
        **point, "nll": round(statistics.mean(nlls), 4), "tokens": n, "bytes": held, "bytes_bfloat16": half,
        "nlls": [round(value, 3) for value in nlls], "seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip


def texts(tokenizer) -> list[Tensor]:
    """The pieces, (1, prompt + following) each."""
    text, length = load_text(SETTINGS["text"], SETTINGS["split"]), SETTINGS["prompt"] + SETTINGS["following"]
    return batches(tokenizer, text, n=SETTINGS["pieces"], length=length, batch_size=1)


def main() -> None:
    flags = arguments(__doc__, Path(__file__).with_name("kv_cache.json"))
    model, tokenizer = load_model(SETTINGS["model"])
    halved, _ = load_model(SETTINGS["model"], dtype=torch.bfloat16)
    head = made_by("OMP_NUM_THREADS=1 python data/scan_kv_cache.py", SETTINGS)
    found = go_on(flags.file, SETTINGS, lambda: {**head, "points": []})
    done = [{key: value for key, value in p.items() if key in KNOBS} for p in found["points"]]
    for point in [point for point in plan() if point not in done][: flags.most]:
        found["points"].append(measure(model, halved, texts(tokenizer), point))
        write(flags.file, found, "points")
        print(found["points"][-1], flush=True)


if __name__ == "__main__":
    main()
