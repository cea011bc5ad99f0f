"""Slice the real model and train low-rank updates: what a few minutes bring back.

    python data/recover_sliced.py      # 5 minutes on two idle CPU cores; writes data/slicing_recovery.json

smollm2-135m loses a quarter of every width and then learns updates of rank 16 on `prose`; the perplexity is
that of the test split, which no training sees. Lesson 08 draws the curve.
"""

import json
import time
from pathlib import Path

import torch
from scanning import SETTINGS, windows

from lightlib.adapters.lora import lora
from lightlib.measure import perplexity
from lightlib.slicing.slicegpt import slicegpt
from lightlib.zoo import batches, load_model, load_text

FRACTION, ROTATIONS, RANK, LR = 0.25, "block", 16, 8e-4
STEPS, BATCH, LENGTH, EVERY = 64, 4, 256, 8


def main() -> None:
    model, tokenizer = load_model(SETTINGS["model"])
    calibration, tests = (windows(tokenizer, **SETTINGS[part]) for part in ("calibration", "test"))
    dense = perplexity(model, tests)
    light = slicegpt(model, calibration, slice_fraction=FRACTION, rotations=ROTATIONS, progress=False).model
    text = load_text(SETTINGS["text"], split="calibration")
    learning = batches(
        tokenizer, text, n=len(tokenizer(text).input_ids) // LENGTH, length=LENGTH, batch_size=BATCH
    )
    points = [{"step": 0, "seconds": 0.0, "perplexity": perplexity(light, tests)}]
    begin, measuring = time.perf_counter(), 0.0

    def watch(step: int, loss: float) -> None:
        nonlocal measuring
        if (step + 1) % EVERY == 0:
            now = time.perf_counter()
            points.append(
                {
                    "step": step + 1,
                    "seconds": now - begin - measuring,
                    "loss": loss,
                    "perplexity": perplexity(light, tests),
                }
            )
            print(points[-1], flush=True)
            measuring += time.perf_counter() - now

    lora(light, learning, rank=RANK, steps=STEPS, lr=LR, watch=watch, progress=False, inplace=True)
    found = {
        "command": "python data/recover_sliced.py", "settings": SETTINGS,
        "torch": torch.__version__.partition("+")[0], "threads": torch.get_num_threads(),
        "slice_fraction": FRACTION, "rotations": ROTATIONS, "rank": RANK, "lr": LR,
        "tokens_a_step": BATCH * LENGTH, "dense": dense, "points": points,
    }  # fmt: skip
    Path(__file__).with_name("slicing_recovery.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
