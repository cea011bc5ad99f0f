"""Distil the model "tiny" into half of its blocks: by which labels, and to write like it.

    OMP_NUM_THREADS=1 python data/scan_distillation.py    # 30 minutes; writes data/distillation.json

"labels": the cut student learns 300 batches of the plays by one kind of label; nll and forward KL (nats a
token) on windows that no training sees. Each kind has the best of four rates, by the nll on other windows
after a third of the steps. "writing": the student of hard labels goes on for 120 steps in several ways, at
one rate; then it writes 32 tokens after each of 256 prompts, and the teacher says how likely they are. The
seed draws the order of windows. A scan that was stopped goes on where it ended. Lesson 12 draws it.
"""

import copy
import math
import time
from functools import cache, partial
from pathlib import Path

import torch
from scanning import Texts, arguments, go_on, made_by, write
from torch import Tensor, nn

from lightlib.distillation.distill import distill
from lightlib.distillation.losses import jensen_shannon, reverse_kl
from lightlib.distillation.matching import Match
from lightlib.distillation.minillm import minillm
from lightlib.distillation.sampling import sample
from lightlib.distillation.students import fewer_layers
from lightlib.measure import divergence, perplexity
from lightlib.zoo import load_model

SETTINGS = {
    "model": "tiny", "text": "plays", "keep": 2, "seeds": [0, 1, 2], "length": 64, "batch": 16,
    "steps": 300, "rates": [5e-4, 1e-3, 2e-3, 4e-3], "test_windows": 256, "held_out": 64,
    "writing_steps": 120, "writing_rate": 5e-4, "prompt": 32, "prompts": 256, "new": 32,
}  # fmt: skip
GRAM = 3
LABELS = {
    "hard": {"hard": 1.0},
    "soft": {},
    "soft, T = 2": {"temperature": 2.0},
    "half and half": {"hard": 0.5},
    "reverse KL": {"loss": reverse_kl},
    "Jensen-Shannon": {"loss": jensen_shannon},
    "soft, and hidden states": {"match": Match(hidden=1.0)},
}
OWN = {"prompt": SETTINGS["prompt"]}
WAYS = {
    "hard labels": partial(distill, hard=1.0),
    "forward KL": distill,
    "reverse KL": partial(distill, loss=reverse_kl),
    "teacher's texts": partial(distill, sequence_level=True, **OWN),
    "own texts, forward KL": partial(distill, on_policy=1.0, **OWN),
    "own texts, reverse KL": partial(distill, on_policy=1.0, loss=reverse_kl, **OWN),
    "MiniLLM": partial(minillm, new=SETTINGS["new"], **OWN),
}


def plan() -> list[dict]:
    """The runs of both parts, all with the first seed first."""
    parts = [("labels", name) for name in LABELS] + [("writing", name) for name in WAYS]
    return [{"part": part, "name": name, "seed": s} for s in SETTINGS["seeds"] for part, name in parts]


def learnt(teacher: nn.Module, texts: Texts, name: str, rate: float, seed: int, steps: int) -> nn.Module:
    """The cut student after so many steps by one kind of label."""
    student = fewer_layers(teacher, keep=SETTINGS["keep"])
    settings = {"steps": steps, "lr": rate, "progress": False, "inplace": True} | LABELS[name]
    return distill(student, texts.order(seed, steps), teacher=teacher, **settings).model


def tried(teacher: nn.Module, texts: Texts, name: str) -> dict[str, float]:
    """{rate: nll on held-out windows of the training text} after a third of the steps with other draws."""
    found = {}
    for rate in SETTINGS["rates"]:
        student = learnt(teacher, texts, name, rate, seed=100, steps=SETTINGS["steps"] // 3)
        found[str(rate)] = round(math.log(perplexity(student, list(texts.held.split(32)))), 4)
    print(name, found, flush=True)
    return found


def fitted(student: nn.Module, teacher: nn.Module, texts: Texts) -> dict[str, float]:
    """How well a student foretells the test windows, and its teacher."""
    found = divergence(student, teacher, list(texts.test.split(32)))
    return {
        "nll": round(math.log(found.perplexity), 4),
        "kl": round(found.mean_kl, 4),
        "agreement": round(found.top1_agreement, 4),
    }


def written(student: nn.Module, teacher: nn.Module, texts: Texts) -> dict[str, float]:
    """What a student writes: its nll (nats a token) under the teacher, its variety, its own certainty."""
    prompts = texts.test[: SETTINGS["prompts"], : SETTINGS["prompt"]]
    drawn = sample(student, prompts, SETTINGS["new"], generator=torch.Generator().manual_seed(0))
    return judged(drawn.ids, teacher) | {"own_nll": round(-drawn.logp.mean().item(), 4)}


@torch.no_grad()
def judged(ids: Tensor, teacher: nn.Module) -> dict[str, float]:
    """What the teacher says of ids (n, prompt + new) behind the prompt."""
    new = SETTINGS["new"]
    logits = teacher(ids, use_cache=False, logits_to_keep=new + 1).logits[:, :-1].float()
    return judged_tokens(logits, ids[:, -new:], torch.ones_like(ids[:, -new:], dtype=torch.bool))


def judged_tokens(logits: Tensor, tokens: Tensor, mask: Tensor) -> dict[str, float]:
    """The teacher's nll of tokens (n, new), by its logits for them; which share of their trigrams is new."""
    log_p = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    grams = tokens.unfold(1, GRAM, 1)[mask.unfold(1, GRAM, 1).all(-1)]  # (pieces, 3)
    return {
        "teacher_nll": round(-log_p[mask].mean().item(), 4),
        "distinct": round(len(grams.unique(dim=0)) / len(grams), 4),
    }


def begun(teacher: nn.Module, texts: Texts) -> dict:
    """The head of the file: rates, and what needs no training."""
    cut = fewer_layers(teacher, keep=SETTINGS["keep"])
    ids = texts.test[: SETTINGS["prompts"], : SETTINGS["prompt"] + SETTINGS["new"]]
    return {
        **made_by("OMP_NUM_THREADS=1 python data/scan_distillation.py", SETTINGS),
        "parameters": {"teacher": teacher.num_parameters(), "student": cut.num_parameters()},
        "teacher": fitted(teacher, teacher, texts) | written(teacher, teacher, texts),
        "people": judged(ids, teacher),
        "cut": fitted(cut, teacher, texts) | written(cut, teacher, texts),
        "rates": {name: tried(teacher, texts, name) for name in LABELS},
        "runs": [],
    }  # fmt: skip


def main() -> None:
    flags = arguments(__doc__, Path(__file__).with_name("distillation.json"))
    teacher, tokenizer = load_model(SETTINGS["model"])
    texts = Texts(tokenizer, SETTINGS)
    found = go_on(flags.file, SETTINGS, lambda: begun(teacher, texts))
    rates = {name: float(min(tries, key=tries.get)) for name, tries in found["rates"].items()}

    @cache
    def by_hard_labels(seed: int) -> nn.Module:
        return learnt(teacher, texts, "hard", rates["hard"], seed, SETTINGS["steps"])

    def measure(part: str, name: str, seed: int) -> dict:
        start, begin = by_hard_labels(seed), time.perf_counter()
        torch.manual_seed(seed)  # what is drawn while it learns
        if part == "labels":
            student = learnt(teacher, texts, name, rates[name], seed, SETTINGS["steps"])
        else:
            steps, order = SETTINGS["writing_steps"], texts.order(seed + 10, SETTINGS["writing_steps"])
            settings = {"steps": steps, "lr": SETTINGS["writing_rate"], "progress": False, "inplace": True}
            student = WAYS[name](copy.deepcopy(start), order, teacher=teacher, **settings).model
        seconds = round(time.perf_counter() - begin, 1)
        found = fitted(student, teacher, texts) | written(student, teacher, texts)
        return {"part": part, "name": name, "seed": seed, **found, "seconds": seconds}

    done = [{key: run[key] for key in plan()[0]} for run in found["runs"]]
    for run in [run for run in plan() if run not in done][: flags.most]:
        found["runs"].append(measure(**run))
        write(flags.file, found, "runs")
        print(found["runs"][-1], flush=True)


if __name__ == "__main__":
    main()
