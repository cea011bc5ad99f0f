"""Distil compressed models from their dense parent for 20 minutes each.

    python data/recover_distilled.py    # 45 minutes on two CPU cores; writes data/distilled_recovery.json

smollm2-135m loses half of its weights to SparseGPT, or a quarter of every width to SliceGPT, and then learns
in bfloat16 what its parent says of the next token: of `prose` and `plays` in turns, since the 33 batches of
prose alone would soon be learnt by heart. The sparse model's blocks learn. Of the sliced one updates of rank
32 and the head do: its weights are a fourth as large, as the gains of the norms went into them, and full
updates shake it. Perplexities are of the test splits, which no training sees; those along the way of prose.
Stopped, it goes on with the next run. Lesson 12 draws the curves.
"""

from functools import partial
from itertools import cycle
from pathlib import Path

from recovering import BATCH, LENGTH, curve, learning
from scanning import SETTINGS, arguments, go_on, made_by, windows, write
from torch import Tensor, nn

from lightlib.adapters.lora import add_lora, merge_lora
from lightlib.distillation.recover import recover
from lightlib.measure import perplexity
from lightlib.slicing.slicegpt import slicegpt
from lightlib.sparsity.sparsegpt import sparsegpt
from lightlib.zoo import load_model

RECOVERY = {
    "minutes": 20, "precision": "bf16", "tokens_a_step": BATCH * LENGTH, "learn": ["prose", "plays"],
    "rank": 32,
}  # fmt: skip
SMALLER = {
    "sliced": partial(slicegpt, slice_fraction=0.25, rotations="block"),
    "sparse": partial(sparsegpt, sparsity=0.5),
}
RATES = {"sliced": 5e-4, "sparse": 3e-4}
WEIGHTS = {"sliced": (".A", ".B", "lm_head"), "sparse": "blocks"}
EVERY = 24  # steps
MOST = 1_500_000  # characters of the plays: more than is read


def in_turns(tokenizer) -> list[Tensor]:
    """A batch of prose, a batch of plays, and so on; prose begins anew when it is through."""
    prose, plays = learning(tokenizer, "prose"), learning(tokenizer, "plays", MOST)
    return [ids for pair in zip(cycle(prose), plays) for ids in pair]


def measured(model: nn.Module, tokenizer) -> dict[str, float]:
    """Perplexity on the test split of either text."""
    return {
        name: perplexity(model, windows(tokenizer, **SETTINGS["test"], text=name))
        for name in RECOVERY["learn"]
    }


def plan() -> list[dict]:
    return [{"light": name} for name in SMALLER]


def measure(model: nn.Module, tokenizer, light: str) -> dict:
    """One recovery: its rate, and the curve of its perplexity."""
    calibration, tests = (windows(tokenizer, **SETTINGS[part]) for part in ("calibration", "test"))
    student = SMALLER[light](model, calibration, progress=False).model
    before = measured(student, tokenizer)
    if ".A" in WEIGHTS[light]:
        add_lora(student, rank=RECOVERY["rank"], alpha=RECOVERY["rank"])
    train = partial(
        recover, student, model, in_turns(tokenizer), minutes=RECOVERY["minutes"], lr=RATES[light],
        weights=WEIGHTS[light], precision=RECOVERY["precision"], progress=False, inplace=True,
    )  # fmt: skip
    points = curve(student, tests, lambda watch: train(watch=watch), EVERY)
    if ".A" in WEIGHTS[light]:
        merge_lora(student)
    after = measured(student, tokenizer)
    return {"light": light, "lr": RATES[light], "before": before, "after": after, "points": points}


def main() -> None:
    flags = arguments(__doc__, Path(__file__).with_name("distilled_recovery.json"))
    settings, (model, tokenizer) = SETTINGS | RECOVERY, load_model(SETTINGS["model"])

    def begin() -> dict:
        dense = measured(model, tokenizer)
        return {**made_by("python data/recover_distilled.py", settings), "dense": dense, "runs": []}

    found = go_on(flags.file, settings, begin)
    done = [{key: run[key] for key in plan()[0]} for run in found["runs"]]
    for run in [run for run in plan() if run not in done][: flags.most]:
        found["runs"].append(measure(model, tokenizer, **run))
        write(flags.file, found, "runs")


if __name__ == "__main__":
    main()
