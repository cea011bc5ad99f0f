"""Let the heads of the model "mha" share keys and values, and train on for 5 % of the steps that it took.

    OMP_NUM_THREADS=1 python data/scan_shared_attention.py  # 25 minutes; writes data/shared_attention.json

Held-out nll (nats a token, 64 windows of 256 tokens of the plays' test split) at once, along the training
and after it. All arms see the same tokens; the seed draws the order of windows, and the heads of "random".
The control is the model with all of its heads, trained on just as long. All arms learn at one rate, of three
the best for "mean" with 2 heads after a quarter of the steps, on windows of the training text that no arm
sees. A scan that was stopped goes on where it ended. Lesson 14 draws it.
"""

import math
import time
from pathlib import Path

import torch
from scanning import Texts, arguments, go_on, made_by, write
from torch import Tensor, nn
from transformers import DynamicCache

from lightlib.adapters.recover import recover
from lightlib.attention.gqa import share_heads
from lightlib.measure import perplexity
from lightlib.zoo import load_model

SETTINGS = {
    "model": "mha", "text": "plays", "length": 256, "batch": 12, "steps": 160, "test_windows": 64,
    "calibration_windows": 32, "held_out": 64, "rates": [1e-3, 2e-3, 4e-3], "seeds": [0, 1, 2],
    "watched": [20, 40, 80],
}  # fmt: skip
HOWS, KV_HEADS = ("mean", "first", "random", "aligned"), (4, 2, 1)
CONTROL = ("control", 8)
TRAINED = (CONTROL, *(("mean", g) for g in KV_HEADS), *((how, 2) for how in HOWS[1:]))


def plan() -> list[dict]:
    """The runs, every arm with the first seed first."""
    return [{"how": how, "kv_heads": g, "seed": s} for s in SETTINGS["seeds"] for how, g in TRAINED]


def nll(model: nn.Module, windows: Tensor) -> float:
    return round(math.log(perplexity(model, list(windows.split(32)))), 4)


def shared(model: nn.Module, texts: Texts, how: str, kv_heads: int, seed: int = 0) -> nn.Module:
    """The model with so many heads; the control keeps its own."""
    how = "mean" if how == CONTROL[0] else how
    calibration = list(texts.learn[: SETTINGS["calibration_windows"]].split(8))
    return share_heads(model, calibration, kv_heads=kv_heads, how=how, seed=seed, progress=False).model


@torch.no_grad()
def at_once(model: nn.Module, texts: Texts, how: str, kv_heads: int) -> dict:
    """What sharing costs before any training, and what it saves."""
    light, cache = shared(model, texts, how, kv_heads), DynamicCache()
    light(texts.test[:32], past_key_values=cache, use_cache=True)
    held = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    return {
        "how": how, "kv_heads": kv_heads, "nll": nll(light, texts.test),
        "parameters": light.num_parameters(), "kv_bytes_per_token": held // texts.test[:32].numel(),
    }  # fmt: skip


def measure(model: nn.Module, texts: Texts, run: dict, rate: float) -> dict:
    """One run: nll before, along and after the training; seconds are those of the training alone."""
    light, steps = shared(model, texts, run["how"], run["kv_heads"], run["seed"]), SETTINGS["steps"]
    curve, begin, measuring = [[0, nll(light, texts.test)]], time.perf_counter(), 0.0

    def watch(step: int, loss: float) -> None:
        nonlocal measuring
        if step + 1 in (*SETTINGS["watched"], steps):
            now = time.perf_counter()
            curve.append([step + 1, nll(light, texts.test)])
            measuring += time.perf_counter() - now

    order = texts.order(run["seed"], steps)
    recover(light, order, steps=steps, lr=rate, watch=watch, progress=False, inplace=True)
    seconds = round(time.perf_counter() - begin - measuring, 1)
    return {**run, "before": curve[0][1], "after": curve[-1][1], "curve": curve, "seconds": seconds}


def tried(model: nn.Module, texts: Texts) -> dict[str, float]:
    """{rate: nll on held-out windows of the training text} after a quarter of the steps with other draws."""
    found, steps = {}, SETTINGS["steps"] // 4
    for rate in SETTINGS["rates"]:
        light = shared(model, texts, "mean", 2)
        order = texts.order(100, steps)
        recover(light, order, steps=steps, lr=rate, progress=False, inplace=True)
        found[str(rate)] = nll(light, texts.held)
        print(rate, found[str(rate)], flush=True)
    return found


def begun(model: nn.Module, texts: Texts) -> dict:
    """The head of the file: what needs no training, and the rate."""
    rates = tried(model, texts)
    return {
        **made_by("OMP_NUM_THREADS=1 python data/scan_shared_attention.py", SETTINGS),
        "tokens_a_step": SETTINGS["batch"] * SETTINGS["length"], "dense": nll(model, texts.test),
        "rates": rates, "rate": float(min(rates, key=rates.get)),
        "at_once": [at_once(model, texts, how, g) for how in HOWS for g in (CONTROL[1], *KV_HEADS)],
        "runs": [],
    }  # fmt: skip


def main() -> None:
    flags = arguments(__doc__, Path(__file__).with_name("shared_attention.json"))
    model, tokenizer = load_model(SETTINGS["model"])
    texts = Texts(tokenizer, SETTINGS)
    found = go_on(flags.file, SETTINGS, lambda: begun(model, texts))
    done = [{key: run[key] for key in plan()[0]} for run in found["runs"]]
    for run in [run for run in plan() if run not in done][: flags.most]:
        found["runs"].append(measure(model, texts, run, found["rate"]))
        write(flags.file, found, "at_once", "runs")
        print(found["runs"][-1], flush=True)


if __name__ == "__main__":
    main()
