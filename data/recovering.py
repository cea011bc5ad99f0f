"""What the recoveries share: the text they learn from, and the curve of what they bring back."""

import time
from collections.abc import Callable

from scanning import SETTINGS
from torch import Tensor, nn

from lightlib.measure import perplexity
from lightlib.zoo import batches, load_text

BATCH, LENGTH, EVERY = 4, 256, 8


def learning(tokenizer, name: str = SETTINGS["text"], most: int | None = None) -> list[Tensor]:
    """The calibration split of a text, or its first so many characters, in batches of 4 x 256 tokens."""
    text = load_text(name, split="calibration")[:most]
    n = len(tokenizer(text).input_ids) // LENGTH
    return batches(tokenizer, text, n=n, length=LENGTH, batch_size=BATCH)


def curve(light: nn.Module, tests: list[Tensor], train: Callable, every: int = EVERY) -> list[dict]:
    """Perplexity of `light` before and after each `every` steps of train(watch), which changes it in place.

    Seconds are those of the training alone.
    """
    points = [{"step": 0, "seconds": 0.0, "perplexity": perplexity(light, tests)}]
    begin, measuring = time.perf_counter(), 0.0

    def watch(step: int, loss: float) -> None:
        nonlocal measuring
        if (step + 1) % every == 0:
            now = time.perf_counter()
            seconds = now - begin - measuring
            points.append(
                {"step": step + 1, "seconds": seconds, "loss": loss, "perplexity": perplexity(light, tests)}
            )
            print(points[-1], flush=True)
            measuring += time.perf_counter() - now

    train(watch)
    return points
