"""Where in a text the real model still finds a fact, after its cache was cut to a budget.

    OMP_NUM_THREADS=1 python data/scan_needles.py      # 15 minutes; writes data/needles.json

smollm2-135m in bfloat16 reads 512 tokens of the `prose` test split that hold a needle at a depth, and is
asked for its number: after the cache was compressed ("after"), or with the question in the prompt ("within").
Each line holds a policy's hit rates (budgets, depths), 0 to 1, and the answers' nll in nats a token; all have
the same needles. Caches that drop nothing have one row, with all tokens as its budget: whole, or in 4 and 2
bits but for the newest 32 tokens. SnapKV's window is 64 tokens, or half of the budget where that is less. A
scan that was stopped goes on where it ended. Lesson 15 draws it.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from scan_kv_cache import POLICIES
from scanning import arguments, go_on, made_by, write
from torch import Tensor, nn

from lightlib.attention.interface import attend
from lightlib.attention.kv_quantization import quantized
from lightlib.attention.open_cache import OpenCache, full
from lightlib.attention.retrieval import QUESTIONS, retrieval_map
from lightlib.zoo import load_model, load_text

SETTINGS = {
    "model": "smollm2-135m", "dtype": "bfloat16", "text": "prose", "split": "test", "length": 512,
    "budgets": [256, 128, 64, 32], "depths": [0.1, 0.3, 0.5, 0.7, 0.9], "trials": 5, "seed": 0,
}  # fmt: skip
WHOLE = {
    "full": full,
    "4 bits": partial(quantized, bits=4, residual=32),
    "2 bits": partial(quantized, bits=2, residual=32),
}
CUT = ("StreamingLLM", "H2O", "SnapKV", "TOVA")


def plan() -> list[dict]:
    """The maps, one for each policy and question."""
    return [{"policy": policy, "question": question} for policy in (*WHOLE, *CUT) for question in QUESTIONS]


def opener(policy: str) -> Callable[[int], OpenCache]:
    """The policy's cache at a budget."""
    if policy in WHOLE:
        return lambda keep: WHOLE[policy]
    return lambda keep: partial(attend, score=POLICIES[policy](keep), keep=keep)


def measure(model: nn.Module, tokenizer, policy: str, question: str, **other) -> dict:
    """One map; `other` settings than those of the scan, such as fewer depths."""
    begin, used = time.perf_counter(), SETTINGS | other
    budgets = [used["length"]] if policy in WHOLE else used["budgets"]
    knobs = {key: used[key] for key in ("length", "trials", "seed")}
    filler = load_text(used["text"], used["split"])
    found = retrieval_map(
        model, tokenizer, opener(policy), budgets, used["depths"], filler, question=question, **knobs
    )
    return {
        "policy": policy, "question": question, "budgets": budgets, "hits": rounded(found.hits),
        "nll": rounded(found.nll), "seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip


def rounded(rows: Tensor) -> list[list[float]]:
    return [[round(value, 3) for value in row] for row in rows.tolist()]


def main() -> None:
    flags = arguments(__doc__, Path(__file__).with_name("needles.json"))
    model, tokenizer = load_model(SETTINGS["model"], dtype=torch.bfloat16)
    head = made_by("OMP_NUM_THREADS=1 python data/scan_needles.py", SETTINGS)
    found = go_on(flags.file, SETTINGS, lambda: {**head, "maps": []})
    done = [{key: one[key] for key in ("policy", "question")} for one in found["maps"]]
    for one in [one for one in plan() if one not in done][: flags.most]:
        found["maps"].append(measure(model, tokenizer, **one))
        write(flags.file, found, "maps")
        print(found["maps"][-1], flush=True)


if __name__ == "__main__":
    main()
