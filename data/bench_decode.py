"""Time a whole model on the sparse kernels: a Llama-7B of random weights, dense and pruned, on this GPU.

    python data/bench_decode.py      # writes kernels/results/decode/<device>.json

Speed depends on shapes and zeros, not on what the weights say, so random ones serve. Every point decodes
greedily through the compiled step of `lightlib.decode`, which replays CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightlib.cost import latency, size
from lightlib.decoder import cast
from lightlib.kernels import results
from lightlib.kernels.attach import attach
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from lightlib.sparsity.magnitude import magnitude

SIZES = {  # the shape of LLaMA-2-7B; a small one to try the script
    "7B": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
    },
    "small": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512,
    },
}  # fmt: skip
BATCHES, SPARSITIES = (1, 16), (0.5, 0.6, 0.7, 0.8)


def random_model(kind: str, device: str) -> nn.Module:
    """A Llama of random weights in bfloat16."""
    with torch.device(device):
        model = LlamaForCausalLM._from_config(LlamaConfig(**SIZES[kind]), dtype=torch.bfloat16)
    return cast(model.eval(), torch.bfloat16)


def points() -> list[dict]:
    """What is measured: the dense model, pruned ones, and one of four bits, for each batch."""
    methods = [{"method": "dense"}, *({"method": "magnitude", "sparsity": s} for s in SPARSITIES)]
    return [{**m, "batch": batch} for batch in BATCHES for m in [*methods, {"method": "int4"}]]


def measure(kind: str, device: str, point: dict, new: int = 64) -> dict:
    """The point with its times and bytes."""
    model = random_model(kind, device)
    if point["method"] == "magnitude":
        model = magnitude(model, sparsity=point["sparsity"], inplace=True, progress=False).model
    elif point["method"] == "int4":
        model = rtn(model, grid=Int(4, group_size=128), inplace=True, progress=False).model
    layers = ""
    if point["method"] != "dense":
        model, report = attach(model, tokens=point["batch"], inplace=True)
        layers = ", ".join(sorted({row.notes for row in report}))
    taken = latency(model, prompt=32, new=new, batch=point["batch"], lean=True)
    return {**point, "layers": layers, "stored_bytes": size(model).stored_bytes, **asdict(taken)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="7B")
    parser.add_argument("--folder", type=Path, default=results.FOLDER / "decode")
    flags = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device is here: nothing is measured")
    device, rows = torch.cuda.get_device_name(), []
    flags.folder.mkdir(parents=True, exist_ok=True)
    for point in points():
        rows.append(measure(flags.size, "cuda", point))
        torch.cuda.empty_cache()
        print(
            f"{point}: {rows[-1]['tpot_ms']:.2f} ms a token, {rows[-1]['peak_bytes'] / 1e9:.1f} GB",
            flush=True,
        )
        found = {"device": device, "date": date.today().isoformat(), "torch": torch.__version__, "rows": rows}
        results.file_for(device, flags.folder).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
