"""Train the model "tiny": a Llama with grouped-query attention on the plays, in full precision.

    python data/make_tiny.py      # 40 minutes on two idle CPU cores, with a C++ compiler; writes data/tiny/

Own byte-level BPE tokenizer; the fourth acts of eleven plays are held out. The model card states the held-out
perplexity beside that of a Kneser-Ney 3-gram model on the same predicted tokens.
"""

import argparse
import json
import math
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightlib.texts import HELD_OUT, load_text

FOLDER = Path(__file__).parent / "tiny"
CONTEXT = 256
MADE = ("steps", "batch", "lr", "seed", "device", "minutes")
CONFIG = dict(
    vocab_size=2048,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text], trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, pad_token=end)


def train(
    ids: torch.Tensor, steps: int, batch: int, peak: float, seed: int, device: str, config: dict = CONFIG
) -> LlamaForCausalLM:
    """AdamW, warm-up and cosine decay over random windows of `ids`, in float32."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**config)).to(device)
    forward = torch.compile(model)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.95),
        fused=True,
    )
    warm = steps // 50
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warm,
            0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / (steps - warm))),
        ),
    )
    bar = tqdm(range(steps), desc="training", mininterval=20)
    for step in bar:
        start = torch.randint(len(ids) - CONTEXT - 1, (batch, 1))
        window = ids[start + torch.arange(CONTEXT + 1)].to(device)  # (batch, CONTEXT + 1)
        logits = forward(window[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(nll=f"{loss.item():.3f}", refresh=False)
    return model.eval().cpu()


@torch.no_grad()
def model_nll(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Mean nll of the predicted tokens of non-overlapping windows of CONTEXT tokens."""
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    logits = torch.cat([model(w).logits[:, :-1] for w in windows.split(32)])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()


def trigram_nll(train_ids: list[int], test_ids: list[int], discount: float = 0.75) -> float:
    """Interpolated Kneser-Ney 3-gram (Ney et al. 1994) on the same predicted tokens, unbroken context."""
    c3 = Counter(zip(train_ids, train_ids[1:], train_ids[2:], strict=False))
    context, followers = Counter(), Counter()  # c(u, v), and the number of distinct w after (u, v)
    left2, left1 = defaultdict(set), defaultdict(set)  # distinct words to the left of (v, w), and of w
    for (u, v, w), n in c3.items():
        context[u, v] += n
        followers[u, v] += 1
        left2[v, w].add(u)
        left1[w].add(v)
    pairs, after = Counter(), Counter()  # left contexts of (v, any), distinct w after v
    for (v, _), left in left2.items():
        pairs[v] += len(left)
        after[v] += 1
    total = sum(map(len, left1.values()))
    vocabulary = CONFIG["vocab_size"]

    def unigram(w):
        unseen = discount * len(left1) / total / vocabulary
        return max(len(left1.get(w, ())) - discount, 0) / total + unseen

    def bigram(v, w):
        if v not in pairs:
            return unigram(w)
        return (max(len(left2.get((v, w), ())) - discount, 0) + discount * after[v] * unigram(w)) / pairs[v]

    def trigram(u, v, w):
        if (u, v) not in context:
            return bigram(v, w)
        return (max(c3[u, v, w] - discount, 0) + discount * followers[u, v] * bigram(v, w)) / context[u, v]

    usable = len(test_ids) // CONTEXT * CONTEXT
    places = [i for i in range(2, usable) if i % CONTEXT]
    return -sum(math.log(trigram(*test_ids[i - 2 : i + 1])) for i in places) / len(places)


def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, new: int = 90) -> str:
    torch.manual_seed(1)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=new, do_sample=True, temperature=0.7, top_k=40, pad_token_id=0)
    return tokenizer.decode(out[0])


CARD = """# tiny

A Llama-shaped model with grouped-query attention, in full precision, trained on the plays of Shakespeare (the
public domain text "plays" of lightlib). For widgets, tests and lessons that train. Licence: Apache-2.0.
Made by `python data/make_tiny.py --steps {steps} --batch {batch} --lr {lr} --seed {seed}`.

| | |
|---|---|
| parameters | {parameters:,} (tied embeddings) |
| layers, d_model, heads, kv heads, d_ff | 4, 192, 6, 2, 512 |
| vocabulary | 2048, byte-level BPE |
| training | {steps} steps of {batch} windows of 256 tokens: {epochs:.1f} epochs of {train_tokens:,} tokens |
| time | {minutes} minutes on {device} |
| **held-out perplexity** | **{perplexity:.2f}** on {test_tokens:,} tokens: the fourth acts of {plays} |
| 3-gram (Kneser-Ney, discount 0.75) on the same predicted tokens | {trigram_perplexity:.2f} |
| perplexity on as many training tokens | {train_perplexity:.2f} |

Sampled at temperature 0.7, top 40, seed 1, from the first line on:

```
{sample}
```
"""


def describe(folder: Path, made: dict, page: str = CARD) -> None:
    """Measure the model that lies in `folder` and write its card: card.json, and README.md for readers."""
    model, tokenizer = (c.from_pretrained(folder) for c in (AutoModelForCausalLM, PreTrainedTokenizerFast))
    model.eval()
    ids, test = (torch.tensor(tokenizer(load_text("plays", s)).input_ids) for s in ("calibration", "test"))
    card = {
        **made,
        "parameters": model.num_parameters(),
        "epochs": made["steps"] * made["batch"] * CONTEXT / len(ids),
        "train_tokens": len(ids),
        "test_tokens": len(test),
        "perplexity": math.exp(model_nll(model, test)),
        "train_perplexity": math.exp(model_nll(model, ids[: len(test)])),
        "trigram_perplexity": math.exp(trigram_nll(ids.tolist(), test.tolist())),
        "sample": sample(model, tokenizer, "MACBETH.\n"),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    (folder / "README.md").write_text(
        page.format(**card, plays=", ".join(p.replace("_", " ") for p in HELD_OUT))
    )
    print((folder / "README.md").read_text(), sum(f.stat().st_size for f in folder.iterdir()), "bytes in all")


def flags_of(about: str, steps: int, device: str, folder: Path) -> argparse.ArgumentParser:
    """What a training of this kind can be told, with what it takes unless told."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=device)
    parser.add_argument("--folder", type=Path, default=folder)
    return parser


def main() -> None:
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    parser = flags_of(__doc__, steps=7000, device=gpu, folder=FOLDER)
    parser.add_argument(
        "--describe", action="store_true", help="write the card of what lies there; do not train"
    )
    flags = parser.parse_args()
    if flags.describe:
        kept = json.loads((flags.folder / "card.json").read_text())
        return describe(flags.folder, {key: kept[key] for key in MADE})

    text = load_text("plays", "calibration")
    tokenizer = make_tokenizer(text)
    ids = torch.tensor(tokenizer(text).input_ids)
    begin = time.time()
    model = train(ids, flags.steps, flags.batch, flags.lr, flags.seed, flags.device)
    model.save_pretrained(flags.folder)
    tokenizer.save_pretrained(flags.folder)
    spacious = flags.folder / "tokenizer.json"
    spacious.write_text(
        json.dumps(json.loads(spacious.read_text()), ensure_ascii=False, separators=(",", ":"))
    )
    made = {key: getattr(flags, key) for key in MADE if key != "minutes"}
    return describe(flags.folder, {**made, "minutes": round((time.time() - begin) / 60, 1)})


if __name__ == "__main__":
    main()
