"""Train a small student by MiniLLM with all of its tricks, and with each of them left out.

    OMP_NUM_THREADS=1 python data/ablate_minillm.py    # 25 minutes; writes data/minillm.json

The student is half of "tiny" after 150 steps of hard labels on the plays. Its prompts end where a line ends,
and what it writes ends where the next one does, or after 24 tokens. No loss of text is added, so that
nothing but the tricks holds it. Measured on prompts of the test split, along the training: tokens a line,
the reverse KL and the teacher's nll (nats a token), and the share of trigrams that are distinct. Stopped, it
goes on with the next run. Lesson 12 shows it.
"""

from functools import partial
from pathlib import Path

import torch
from scan_distillation import Texts, judged_tokens, learnt
from scanning import arguments, go_on, made_by, write
from torch import Tensor, nn

from lightlib.distillation.minillm import RELEASED, minillm, next_token_kl
from lightlib.distillation.sampling import sample, until_end
from lightlib.zoo import load_model, load_text

SETTINGS = {
    "model": "tiny", "text": "plays", "seeds": [0, 1, 2], "start_steps": 150, "start_rate": 2e-3,
    "prompt": 32, "new": 24, "batch": 16, "steps": 100, "rate": 5e-4, "prompts": 256,
    "watched": [20, 40, 60, 80, 100],
}  # fmt: skip
ARMS = {
    "all three": {},
    "single step sampled": {"single_step": False},
    "student draws alone": {"alpha": 0.0},
    "sums for means": {"normalise": False},
    "as released": {"variant": RELEASED},
}


def plan() -> list[dict]:
    return [{"name": name, "seed": seed} for seed in SETTINGS["seeds"] for name in ARMS]


def line_ends(tokenizer, split: str, n: int, seed: int) -> Tensor:
    """Prompts (n, prompt) of a split, each up to a line's end that no empty line follows."""
    ids = torch.tensor(tokenizer(load_text(SETTINGS["text"], split=split)).input_ids)
    is_end = ids == end_of_line(tokenizer)
    at = (is_end[:-1] & ~is_end[1:]).nonzero()[:, 0]
    at = at[at >= SETTINGS["prompt"] - 1]
    at = at[torch.randperm(len(at), generator=torch.Generator().manual_seed(seed))[:n]]
    return torch.stack([ids[i - SETTINGS["prompt"] + 1 : i + 1] for i in at.tolist()])


def end_of_line(tokenizer) -> int:
    (end,) = tokenizer("\n").input_ids
    return end


@torch.no_grad()
def measured(model: nn.Module, teacher: nn.Module, prompts: Tensor, end: int) -> dict[str, float]:
    """What the model writes behind the prompts, up to the end of a line."""
    first, new = SETTINGS["prompt"], SETTINGS["new"]
    ids = sample(model, prompts, new, generator=torch.Generator().manual_seed(0)).ids
    mask = until_end(ids, first, end)
    ours, theirs = (one(ids, logits_to_keep=new + 1).logits[:, :-1].float() for one in (model, teacher))
    return {
        "length": round(mask.sum(1).float().mean().item(), 2),
        "reverse_kl": round(next_token_kl(ours, theirs)[mask].mean().item(), 4),
        **judged_tokens(theirs, ids[:, first:], mask),
    }


def run(teacher: nn.Module, tokenizer, texts: Texts, tests: Tensor, name: str, seed: int) -> dict:
    """One arm: what it writes at the start and along the training."""
    torch.manual_seed(seed)
    student = learnt(teacher, texts, "hard", SETTINGS["start_rate"], seed, SETTINGS["start_steps"])
    end, steps, batch = end_of_line(tokenizer), SETTINGS["steps"], SETTINGS["batch"]
    student.generation_config.eos_token_id = end
    prompts = line_ends(tokenizer, "calibration", steps * batch, seed).split(batch)
    curve = [{"step": 0, **measured(student, teacher, tests, end)}]

    def watch(step: int, loss: float) -> None:
        if step + 1 in SETTINGS["watched"]:
            with torch.random.fork_rng():
                curve.append({"step": step + 1, **measured(student, teacher, tests, end)})

    minillm(
        student, list(prompts), teacher=teacher, prompt=SETTINGS["prompt"], new=SETTINGS["new"],
        lm_weight=0.0, steps=steps, lr=SETTINGS["rate"], watch=watch, progress=False, inplace=True,
        **ARMS[name],
    )  # fmt: skip
    return {"name": name, "seed": seed, "curve": curve}


def main() -> None:
    flags = arguments(__doc__, Path(__file__).with_name("minillm.json"))
    teacher, tokenizer = load_model(SETTINGS["model"])
    texts, tests = Texts(tokenizer), line_ends(tokenizer, "test", SETTINGS["prompts"], 0)
    measure = partial(run, teacher, tokenizer, texts, tests)

    def begin() -> dict:
        head = made_by("OMP_NUM_THREADS=1 python data/ablate_minillm.py", SETTINGS)
        return {**head, "teacher": measured(teacher, teacher, tests, end_of_line(tokenizer)), "runs": []}

    found = go_on(flags.file, SETTINGS, begin)
    done = [{key: each[key] for key in plan()[0]} for each in found["runs"]]
    for each in [each for each in plan() if each not in done][: flags.most]:
        found["runs"].append(measure(**each))
        write(flags.file, found, "runs")
        print(found["runs"][-1]["name"], found["runs"][-1]["curve"][-1], flush=True)


if __name__ == "__main__":
    main()
