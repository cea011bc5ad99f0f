"""Slice the real model and train low-rank updates: what a few minutes bring back.

    python data/recover_sliced.py      # 5 minutes on two idle CPU cores; writes data/slicing_recovery.json

smollm2-135m loses a quarter of every width and then learns updates of rank 16 on `prose`; the perplexity is
that of the test split, which no training sees. Lesson 08 draws the curve.
"""

import json
from functools import partial
from pathlib import Path

import torch
from recovering import BATCH, LENGTH, curve, learning
from scanning import SETTINGS, windows

from lightlib.adapters.lora import lora
from lightlib.measure import perplexity
from lightlib.slicing.slicegpt import slicegpt
from lightlib.zoo import load_model

FRACTION, ROTATIONS, RANK, LR, STEPS = 0.25, "block", 16, 8e-4, 64


def main() -> None:
    model, tokenizer = load_model(SETTINGS["model"])
    calibration, tests = (windows(tokenizer, **SETTINGS[part]) for part in ("calibration", "test"))
    dense = perplexity(model, tests)
    light = slicegpt(model, calibration, slice_fraction=FRACTION, rotations=ROTATIONS, progress=False).model
    train = partial(
        lora, light, learning(tokenizer), rank=RANK, steps=STEPS, lr=LR, progress=False, inplace=True
    )
    points = curve(light, tests, lambda watch: train(watch=watch))
    found = {
        "command": "python data/recover_sliced.py", "settings": SETTINGS,
        "torch": torch.__version__.partition("+")[0], "threads": torch.get_num_threads(),
        "slice_fraction": FRACTION, "rotations": ROTATIONS, "rank": RANK, "lr": LR,
        "tokens_a_step": BATCH * LENGTH, "dense": dense, "points": points,
    }  # fmt: skip
    Path(__file__).with_name("slicing_recovery.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
