"""Train gates that prune the context of `tiny`, and compare them with policies that hold as many tokens.

    OMP_NUM_THREADS=1 python data/train_gates.py      # 12 minutes; writes context_gates.json, .safetensors

Each arm learns at another weight of sparsity, on the same windows of 256 tokens of `plays`. Then 64 held-out
pieces of the test split run one by one: 192 tokens as a prompt, after which the cache holds what the gates or
a policy keep, and 63 to predict in one call ("nll", in nats a token). Policies keep as many tokens as the
gates of an arm hold on average. Bytes are those of all storages of the cache after the prompt.

Gates also hide what they close from the rest of the prompt, and policies wait for its end. So in the arm KEPT
the first 16 pieces run again token by token, after a prompt of 64, and policies evict at each step
("nll_stepwise"). The gates of that arm come with lightlib. A run that was stopped goes on where it ended.
Lesson 15 draws it.
"""

import statistics
import time
from functools import partial
from pathlib import Path

import torch
from scan_kv_cache import POLICIES
from scanning import arguments, go_on, made_by, write
from torch import Tensor, nn

from lightlib.attention.context_gates import load_gates, save_gates
from lightlib.attention.context_pruning import prune_context, train_gates
from lightlib.attention.continuation import continuation_nll
from lightlib.attention.cost import allocated_bytes
from lightlib.attention.interface import attend
from lightlib.attention.open_cache import OpenCache, full
from lightlib.zoo import batches, load_model, load_text

SETTINGS = {
    "model": "tiny", "text": "plays", "length": 256, "prompt": 192, "pieces": 64, "rank": 32, "steps": 120,
    "batch": 4, "lr": 1e-2, "seed": 0, "stepwise": {"prompt": 64, "pieces": 16}, "few": 8,
}  # fmt: skip
WEIGHTS, KEPT = (0.2, 0.1, 0.05, 0.5), 0.2


def windows(tokenizer) -> list[Tensor]:
    """Batches to learn from, by lot."""
    every = batches(tokenizer, load_text(SETTINGS["text"]), n=None, length=SETTINGS["length"])
    lots = torch.Generator().manual_seed(SETTINGS["seed"])
    chosen = torch.randperm(sum(map(len, every)), generator=lots)[: SETTINGS["steps"] * SETTINGS["batch"]]
    return list(torch.cat(every)[chosen].split(SETTINGS["batch"]))


def held_out(tokenizer) -> list[Tensor]:
    """Pieces (1, 256) to measure on."""
    text, length = load_text(SETTINGS["text"], split="test"), SETTINGS["length"]
    return batches(tokenizer, text, n=SETTINGS["pieces"], length=length, batch_size=1)


@torch.no_grad()
def held(model: nn.Module, pieces: list[Tensor], open_cache: OpenCache) -> dict:
    """What the cache holds after the prompt, as means over the pieces: tokens of each block, and bytes."""
    tokens, held_bytes = [], []
    for piece in pieces:
        with open_cache(model) as cache:
            model(piece[:, : SETTINGS["prompt"]], past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens.append([layer.keys.shape[2] for layer in cache.layers])
            held_bytes.append(allocated_bytes(cache))
    of_block = [statistics.mean(counts) for counts in zip(*tokens, strict=True)]
    return {
        "tokens": round(statistics.mean(of_block), 1), "of_block": [round(n, 1) for n in of_block],
        "bytes": round(statistics.mean(held_bytes)),
    }  # fmt: skip


def measure(model: nn.Module, pieces: list[Tensor], open_cache: OpenCache, stepwise: bool = False) -> dict:
    """What the cache holds, and the nll of what follows."""
    nll = continuation_nll(model, pieces, open_cache, prompt=SETTINGS["prompt"])
    found = {"nll": round(nll, 4), **held(model, pieces, open_cache)}
    if stepwise:
        few, prompt = pieces[: SETTINGS["stepwise"]["pieces"]], SETTINGS["stepwise"]["prompt"]
        nll = continuation_nll(model, few, open_cache, prompt=prompt, step=1)
        found["nll_stepwise"] = round(nll, 4)
    return found


def learned(model: nn.Module, learn: list[Tensor], weight: float) -> tuple[nn.ModuleList, dict]:
    """Gates, and how they learnt: [step, loss, share of the past that is seen], at each tenth step."""
    curve, begin = [], time.perf_counter()

    def watch(step: int, loss: float, kept: float) -> None:
        if step == 0 or (step + 1) % 10 == 0:
            curve.append([step + 1, round(loss, 3), round(kept, 3)])

    knobs = {key: SETTINGS[key] for key in ("rank", "steps", "lr", "seed")}
    gates = train_gates(model, learn, sparsity_weight=weight, watch=watch, progress=False, **knobs)
    return gates, {"weight": weight, "seconds": round(time.perf_counter() - begin, 1), "curve": curve}


def points(model: nn.Module, pieces: list[Tensor], gates: nn.ModuleList, weight: float) -> list[dict]:
    """The gates of this weight, and each policy at the mean number of tokens that they hold."""
    measured = partial(measure, model, pieces, stepwise=weight == KEPT)
    found = measured(partial(prune_context, gates=gates))
    keep = round(found["tokens"])
    rows = {"gates": found}
    for name, score in POLICIES.items():
        rows[name] = measured(partial(attend, score=score(keep), keep=keep))
    return [{"weight": weight, "cache": name, **row} for name, row in rows.items()]


def main() -> None:
    flags = arguments(__doc__, Path(__file__).with_name("context_gates.json"))
    model, tokenizer = load_model(SETTINGS["model"])
    pieces, learn = held_out(tokenizer), windows(tokenizer)

    def begin() -> dict:
        head = made_by("OMP_NUM_THREADS=1 python data/train_gates.py", SETTINGS)
        whole = measure(model, pieces, full, stepwise=True)
        return {**head, "kept": KEPT, "full": whole, "arms": [], "points": []}

    found = go_on(flags.file, SETTINGS, begin)
    done = {arm["weight"] for arm in found["arms"]}
    for weight in [weight for weight in WEIGHTS if weight not in done][: flags.most]:
        gates, arm = learned(model, learn, weight)
        if weight == KEPT:
            gates = load_gates(save_gates(gates, flags.file.with_suffix(".safetensors")), model)
            cache = partial(prune_context, gates=gates)
            found["of_few"] = measure(model, pieces[: SETTINGS["few"]], cache)  # to be seen again in a moment
        found["arms"].append(arm)
        found["points"] += points(model, pieces, gates, weight)
        write(flags.file, found, "arms", "points")
        print(arm, *found["points"][-1 - len(POLICIES) :], sep="\n", flush=True)


if __name__ == "__main__":
    main()
