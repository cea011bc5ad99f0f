"""Factorize the real model and train what is left: the factors themselves, or updates of low rank of them.

    python data/recover_low_rank.py      # 7 minutes on two CPU cores; writes data/low_rank_recovery.json

smollm2-135m loses 30 % of its blocks' weights and then learns on `prose`; the perplexity is that of the test
split, which no training sees. Lesson 09 draws the curves.
"""

import json
from functools import partial
from pathlib import Path

import torch
from recovering import BATCH, LENGTH, curve, learning
from scanning import SETTINGS, windows

from lightlib.adapters.lora import lora
from lightlib.adapters.recover import recover
from lightlib.lowrank.svd import svd
from lightlib.measure import perplexity
from lightlib.zoo import load_model

FRACTION, STEPS = 0.3, 32
ARMS = {
    "the factors": partial(recover, lr=1e-4),
    "updates of rank 16": partial(lora, rank=16, lr=8e-4),
}


def main() -> None:
    model, tokenizer = load_model(SETTINGS["model"])
    calibration, tests = (windows(tokenizer, **SETTINGS[part]) for part in ("calibration", "test"))
    text, arms = learning(tokenizer), {}
    for name, method in ARMS.items():
        light = svd(model, calibration, fraction=FRACTION, progress=False).model
        train = partial(method, light, text, steps=STEPS, progress=False, inplace=True)
        arms[name] = curve(light, tests, lambda watch, train=train: train(watch=watch))
    found = {
        "command": "python data/recover_low_rank.py", "settings": SETTINGS,
        "torch": torch.__version__.partition("+")[0], "threads": torch.get_num_threads(),
        "fraction": FRACTION, "tokens_a_step": BATCH * LENGTH, "dense": perplexity(model, tests),
        "arms": arms,
    }  # fmt: skip
    Path(__file__).with_name("low_rank_recovery.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
