"""Learn the same small language model with embeddings of several kinds, at about equal stored numbers.

    python data/embeddings_lm.py      # 20 minutes on one CPU core; writes data/embeddings_lm.json

Three words of `plays` predict the fourth: their rows pass one hidden layer, and the scores are products
with all rows of the same table. All arms but the full table store about a twentieth of its numbers. Those of
MorphTE differ in nothing but the table of indices: morphemes of the words, the same handed to other words,
random codes, and morphemes with hashed pads. Words are numbered by how often they occur, so word2ketXS shares
among words of like frequency; one arm numbers them by lot. Each arm learns at the rate, of three, that is
best for it after a fifth of the steps with other draws, on held-out windows of the training text. Lesson 10
draws it.
"""

import argparse
import json
import re
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from lightlib.lowrank.embeddings import LowRankEmbedding, TTEmbedding, digits, root_up
from lightlib.lowrank.kets import MorphTE, Word2Ket, Word2KetXS
from lightlib.lowrank.morphemes import Morphemes, hash_pads, random_codes, segment, shuffled
from lightlib.zoo import load_text

SETTINGS = {
    "text": "plays", "vocabulary": 6000, "width": 64, "hidden": 128, "context": 3, "order": 3, "batch": 512,
    "steps": 700, "held_out": 20_000, "test": 40_000, "rates": [0.03, 0.1, 0.3], "seeds": [0, 1, 2],
}  # fmt: skip
V, D = SETTINGS["vocabulary"], SETTINGS["width"]
RANKS = {"low rank": 3, "word2ketXS": 14, "tensor train": (14, 15), "MorphTE": 2}
INDICES = ("MorphTE", "MorphTE, other words' rows", "MorphTE, random codes", "MorphTE, hashed pads")
ARMS = ("full table", "low rank", "word2ketXS", "word2ketXS, numbered by lot", "tensor train", *INDICES)


class NextWord(nn.Module):
    """Scores (batch, vocabulary) of the word after `context` others; both ends share the embedding."""

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.embedding = embedding
        self.read = nn.Linear(SETTINGS["context"] * D, SETTINGS["hidden"])
        self.write = nn.Linear(SETTINGS["hidden"], D)
        self.bias = nn.Parameter(torch.zeros(V))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        table = self.embedding.table()  # once a step, not once a word
        found = F.embedding(words, table).flatten(1)  # (batch, context * width)
        return self.write(F.gelu(self.read(found))) @ table.T + self.bias


def texts() -> tuple[list[str], torch.Tensor, torch.Tensor, torch.Tensor]:
    """The vocabulary, and windows (n, context + 1) to learn from, held out of them, and of the test split."""
    learn, test = (
        re.findall(r"[a-z]+|[^\sa-z]", load_text(SETTINGS["text"], split=split).lower())
        for split in ("calibration", "test")
    )
    vocabulary = ["<unk>", *(word for word, _ in Counter(learn).most_common(V - 1))]
    place = {word: i for i, word in enumerate(vocabulary)}
    learn, test = (
        torch.tensor([place.get(word, 0) for word in words]).unfold(0, SETTINGS["context"] + 1, 1)
        for words in (learn, test)
    )
    held = SETTINGS["held_out"]
    return vocabulary, learn[:-held], learn[-held:], test[: SETTINGS["test"]]


def digits_as_morphemes() -> Morphemes:
    """word2ketXS as MorphTE: the morphemes of a word are the two digits of its number, each at its place."""
    base = root_up(V, 2)
    index = torch.stack(digits(torch.arange(V), (base, base), V), dim=1) + torch.tensor([0, base])
    return Morphemes(tuple(map(str, range(2 * base))), index, 1.0)


def build(arm: str, indices: dict, seed: int) -> nn.Module:
    settings = {"std": D**-0.5, "generator": torch.Generator().manual_seed(seed)}
    if arm == "full table":
        return Word2Ket(V, D, 1, 1, **settings)
    if arm == "low rank":
        return LowRankEmbedding(V, D, RANKS[arm], **settings)
    if arm == "word2ketXS":
        return Word2KetXS(V, D, RANKS[arm], 2, **settings)
    if arm == "tensor train":
        return TTEmbedding(V, D, RANKS[arm], 3, **settings)
    return MorphTE.of(indices[arm], D, RANKS[arm.partition(",")[0]], **settings)


def learned(arm: str, indices: dict, learn: torch.Tensor, rate: float, seed: int, steps: int) -> NextWord:
    torch.manual_seed(seed)
    model = NextWord(build(arm, indices, seed))
    optimizer = torch.optim.Adam(model.parameters())
    order = torch.randperm(len(learn))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * (1 - step / steps)
        windows = learn[order[step * SETTINGS["batch"] :][: SETTINGS["batch"]]]
        loss = F.cross_entropy(model(windows[:, :-1]), windows[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def perplexity(model: NextWord, windows: torch.Tensor) -> float:
    losses = [
        F.cross_entropy(model(part[:, :-1]), part[:, -1], reduction="sum") for part in windows.split(4096)
    ]
    return (sum(losses) / len(windows)).exp().item()


def measure(arm: str, indices: dict, learn, held, test) -> list[dict]:
    """A run for each seed, at the rate that is best for this arm."""
    short = SETTINGS["steps"] // 5
    tried = {
        rate: perplexity(learned(arm, indices, learn, rate, 100, short), held) for rate in SETTINGS["rates"]
    }
    rate, runs = min(tried, key=tried.get), []
    for seed in SETTINGS["seeds"]:
        begin = time.perf_counter()
        model = learned(arm, indices, learn, rate, seed, SETTINGS["steps"])
        seconds = round(time.perf_counter() - begin, 1)
        stored = model.embedding.stored
        run = {"arm": arm, "seed": seed, "rate": rate, "perplexity": round(perplexity(model, test), 2)}
        runs.append(run | {"numbers": stored.numbers, "index_bytes": stored.index_bytes, "seconds": seconds})
        print(runs[-1], flush=True)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, default=Path(__file__).with_name("embeddings_lm.json"))
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    flags = parser.parse_args()
    SETTINGS["steps"] = flags.steps
    vocabulary, learn, held, test = texts()
    words = segment(vocabulary, SETTINGS["order"])
    tables = (words, shuffled(words), random_codes(V, SETTINGS["order"], len(words.names)), hash_pads(words))
    indices = dict(zip(INDICES, tables, strict=True))
    indices["word2ketXS, numbered by lot"] = shuffled(digits_as_morphemes())
    found = {
        "command": "python data/embeddings_lm.py", "settings": SETTINGS,
        "torch": torch.__version__.partition("+")[0], "threads": torch.get_num_threads(),
        "morphemes": len(words.names), "fits": round(words.fits, 4),
        "pads": round((words.index == 0).double().mean().item(), 4),
        "test_windows": len(test), "unknown": round((test[:, -1] == 0).double().mean().item(), 4), "runs": [],
    }  # fmt: skip
    for arm in ARMS:
        found["runs"] += measure(arm, indices, learn, held, test)
        lines = ",\n".join(f"  {json.dumps(run)}" for run in found["runs"])
        head = json.dumps({key: part for key, part in found.items() if key != "runs"}, indent=1)[:-2]
        flags.file.write_text(f'{head},\n "runs": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
