"""Prune the real model with CFSP and train low-rank updates: ranks by importance against equal ranks.

    python data/recover_pruned.py      # 40 minutes on one CPU core; writes data/pruned_recovery.json

smollm2-135m loses a share of its neurons and then learns updates on `prose`, as many weights in both arms:
every block has the same rank, or one in proportion to how far the block turns the stream. Each arm runs with
several orders of the text. The perplexity is that of the test split, which no training sees. Lesson 07 draws
it.
"""

import argparse
import json
from pathlib import Path

import torch
from recovering import BATCH, LENGTH, learning
from scanning import SETTINGS, windows

from lightlib.adapters.lora import lora, ranks_by_importance
from lightlib.decoder import find_blocks
from lightlib.measure import perplexity
from lightlib.structured.angular import block_importance
from lightlib.structured.cfsp import cfsp
from lightlib.units import unit_counts
from lightlib.zoo import load_model

FRACTION, RANK, LR, SEEDS = 0.3, 16, 8e-4, (0, 1, 2)
STEPS = 48


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, default=Path(__file__).with_name("pruned_recovery.json"))
    file = parser.parse_args().file
    model, tokenizer = load_model(SETTINGS["model"])
    calibration, tests = (windows(tokenizer, **SETTINGS[part]) for part in ("calibration", "test"))
    light = cfsp(model, calibration, fraction=FRACTION, progress=False).model
    text = learning(tokenizer)
    arms = {
        "equal": dict.fromkeys(find_blocks(light), RANK),
        "by importance": ranks_by_importance(
            light, block_importance(model, calibration, progress=False), RANK
        ),
    }
    found = {
        "command": "python data/recover_pruned.py", "settings": SETTINGS,
        "torch": torch.__version__.partition("+")[0], "threads": torch.get_num_threads(),
        "fraction": FRACTION, "rank": RANK, "lr": LR, "steps": STEPS, "tokens_a_step": BATCH * LENGTH,
        "neurons": [each["neurons"] for each in unit_counts(light).values()],
        "ranks": {name: list(ranks.values()) for name, ranks in arms.items()},
        "dense": perplexity(model, tests), "pruned": perplexity(light, tests), "runs": [],
    }  # fmt: skip
    for seed in SEEDS:
        order = torch.randperm(len(text), generator=torch.Generator().manual_seed(seed)).tolist()
        for name, ranks in arms.items():
            trained = lora(
                light, [text[i] for i in order], rank=ranks, steps=STEPS, lr=LR, progress=False
            ).model
            found["runs"].append({"ranks": name, "seed": seed, "perplexity": perplexity(trained, tests)})
            print(found["runs"][-1], flush=True)
            file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
