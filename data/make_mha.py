"""Train the model "mha": a small Llama with a key and a value head for each query head, on the plays.

    OMP_NUM_THREADS=1 python data/make_mha.py  # 17 minutes on one core, with a C++ compiler; writes data/mha/

The recipe, the tokenizer and the held-out acts are those of "tiny" (data/make_tiny.py).
"""

import time
from pathlib import Path

import make_tiny
import torch
from transformers import PreTrainedTokenizerFast

from lightlib.texts import load_text

FOLDER = Path(__file__).parent / "mha"
CONFIG = make_tiny.CONFIG | dict(
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
)
CARD = """# mha

A Llama-shaped model with full multi-head attention, in full precision, trained on the plays of Shakespeare
(the public domain text "plays" of lightlib). For lessons that let heads share keys and values. Licence:
Apache-2.0.
Made by `OMP_NUM_THREADS=1 python data/make_mha.py --steps {steps} --batch {batch} --lr {lr} --seed {seed}`.

| | |
|---|---|
| parameters | {parameters:,} (tied embeddings) |
| layers, d_model, heads, kv heads, d_ff | 4, 128, 8, 8, 352 |
| vocabulary | 2048, byte-level BPE: the tokenizer of "tiny" |
| training | {steps} steps of {batch} windows of 256 tokens: {epochs:.1f} epochs of {train_tokens:,} tokens |
| time | {minutes} minutes on {device}, one thread |
| **held-out perplexity** | **{perplexity:.2f}** on {test_tokens:,} tokens: the fourth acts of {plays} |
| 3-gram (Kneser-Ney, discount 0.75) on the same predicted tokens | {trigram_perplexity:.2f} |
| perplexity on as many training tokens | {train_perplexity:.2f} |

Sampled at temperature 0.7, top 40, seed 1, from the first line on:

```
{sample}
```
"""


def main() -> None:
    flags = make_tiny.flags_of(__doc__, steps=3200, device="cpu", folder=FOLDER).parse_args()

    tokenizer = PreTrainedTokenizerFast.from_pretrained(make_tiny.FOLDER)
    ids = torch.tensor(tokenizer(load_text("plays", "calibration")).input_ids)
    begin = time.time()
    model = make_tiny.train(ids, flags.steps, flags.batch, flags.lr, flags.seed, flags.device, CONFIG)
    model.save_pretrained(flags.folder)
    for file in make_tiny.FOLDER.glob("tokenizer*.json"):
        (flags.folder / file.name).write_bytes(file.read_bytes())
    made = {key: getattr(flags, key) for key in make_tiny.MADE if key != "minutes"}
    make_tiny.describe(flags.folder, {**made, "minutes": round((time.time() - begin) / 60, 1)}, CARD)


if __name__ == "__main__":
    main()
