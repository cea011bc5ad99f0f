"""Fit three pictures, two signals and three matrices with QIREN and classical networks of as many parameters.

    OMP_NUM_THREADS=1 python data/scan_quantum.py  # 45 minutes; writes data/quantum.json

A row is one kind of network on one task: 300 full-batch Adam steps at each of four rates with each of three
seeds, which draw the initial weights. `rates` holds the mean over the seeds of each run's least error; the
best of them is the rate of the row, and `best` and `last` are the errors (MSE) of its three runs. For signals
they are of values in [-1, 1], for matrices over the mean square, so that the relative error is their root.
Of pictures also how well the fit to 32 x 32 gives 64 x 64 (PSNR in dB, SSIM), as bicubic interpolation does.
A few rows are of eight qubits, as QIREN's authors have them. Beside the matrices: the truncated SVD with at
most as many numbers, and plain rounding (RTN) in at most as many bits as the parameters take in float32. A
scan that was stopped goes on where it ended. Lesson 20 draws it.
"""

import statistics
from pathlib import Path

import torch
from scanning import arguments, go_on, made_by, write
from torch import Tensor, nn

from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn_weight
from lightlib.quantum import matrix
from lightlib.quantum.baselines import count, sized
from lightlib.quantum.fitting import fit, predict
from lightlib.quantum.layer import QIREN
from lightlib.quantum.signals import (
    PICTURES,
    Signal,
    as_signal,
    bicubic,
    chirp,
    grid,
    picture,
    psnr,
    sound,
    ssim,
)
from lightlib.report import relative_error
from lightlib.zoo import load_model

SETTINGS = {
    "steps": 300, "rates": [0.003, 0.01, 0.03, 0.1], "seeds": [0, 1, 2], "side": 32, "finer": 64,
    "block": 48, "model": "tiny", "layer": "model.layers.1.self_attn.o_proj", "waves": 8,
}  # fmt: skip
SIGNALS, MATRICES = (*PICTURES, "sound", "chirp"), ("weights", "shuffled", "smooth")
QUBITS = 6
# kind and its knob: QIREN's first gain, SIREN's omega, the random features' sigma
SIREN_ARMS = [("siren", omega) for omega in (1.0, 10.0, 30.0)]
ARMS = [
    *(("qiren", gain) for gain in (1.0, 3.0, 10.0)), *SIREN_ARMS,
    *(("rff", sigma) for sigma in (0.5, 1.0, 2.0, 4.0, 8.0)), ("relu", None), ("tanh", None),
]  # fmt: skip
FOR_MATRICES = [
    *(("qiren", gain) for gain in (1.0, 10.0)), *(("siren", omega) for omega in (10.0, 30.0)),
    ("rff", 1.0), ("relu", None),
]  # fmt: skip
# with as many qubits as QIREN's authors take
LARGER = 8
FOR_LARGER = [(task, arm) for task in ("camera", "sound") for arm in (("qiren", 1.0), *SIREN_ARMS)]
KNOB = {"siren": "omega", "rff": "sigma"}


def plan() -> list[dict]:
    """The rows."""
    pairs = [(QUBITS, task, arm) for task in SIGNALS for arm in ARMS]
    pairs += [(QUBITS, task, arm) for task in MATRICES for arm in FOR_MATRICES]
    pairs += [(LARGER, task, arm) for task, arm in FOR_LARGER]
    return [
        {"task": task, "kind": kind, "knob": knob, "qubits": qubits} for qubits, task, (kind, knob) in pairs
    ]


def matrices() -> dict[str, Tensor]:
    """A block of a layer of the model, the same with its weights in random places, and a smooth matrix."""
    model, _ = load_model(SETTINGS["model"])
    n, generator = SETTINGS["block"], torch.Generator().manual_seed(0)
    block = model.get_submodule(SETTINGS["layer"]).weight.detach()[:n, :n].clone()
    slow = matrix.smooth(n, n, SETTINGS["waves"], generator)
    return {"weights": block, "shuffled": matrix.shuffled(block, generator), "smooth": slow}


def tasks() -> dict[str, Signal]:
    signals = {name: as_signal(picture(name, SETTINGS["side"])) for name in PICTURES}
    signals |= {"sound": sound(), "chirp": chirp()}
    return signals | {name: matrix.as_function(W) for name, W in matrices().items()}


def network(inputs: int, kind: str, knob: float | None, qubits: int, seed: int) -> nn.Module:
    """QIREN of so many qubits, or the classical network with the number of parameters nearest to its."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "qiren":
        return QIREN(inputs, 1, qubits=qubits, gain=knob, generator=generator)
    size = count(QIREN(inputs, 1, qubits=qubits, generator=generator))
    generator.manual_seed(seed)
    knobs = {KNOB[kind]: knob} if kind in KNOB else {}
    return sized(kind, inputs, 1, size, generator=generator, **knobs)


def run(
    signal: Signal, task: str, kind: str, knob: float | None, qubits: int, seed: int, rate: float
) -> dict:
    """One fit."""
    model = network(signal.x.shape[1], kind, knob, qubits, seed)
    made = fit(model, signal.x, signal.y, steps=SETTINGS["steps"], lr=rate, progress=False)
    found = {"parameters": count(model), "best": made.best, "last": made.last, "seconds": made.seconds}
    if task in PICTURES:
        n = SETTINGS["finer"]
        found |= compared(picture(task, n), predict(model, grid(n, n)).view(n, n))
    return found


def compared(image: Tensor, copy: Tensor) -> dict:
    return {"psnr": round(psnr(image, copy), 2), "ssim": round(ssim(image, copy), 4)}


def measure(signal: Signal, row: dict) -> dict:
    """All runs of a row, and what those of the best rate have given, a seed each."""
    runs = {
        rate: [run(signal, **row, seed=seed, rate=rate) for seed in SETTINGS["seeds"]]
        for rate in SETTINGS["rates"]
    }
    rates = {str(rate): short(statistics.mean(one["best"] for one in made)) for rate, made in runs.items()}
    best = min(runs, key=lambda rate: rates[str(rate)])
    listed = [key for key in runs[best][0] if key not in ("parameters", "seconds")]
    return {
        **row, "parameters": runs[best][0]["parameters"], "rates": rates, "rate": best,
        **{key: [short(one[key]) for one in runs[best]] for key in listed},
        "seconds": short(statistics.median(one["seconds"] for made in runs.values() for one in made)),
    }  # fmt: skip


def short(value: float) -> float:
    return float(f"{value:.4g}")


def beside(name: str, W: Tensor, size: int) -> dict:
    """What needs no training: the truncated SVD, and rounding to whole rows' grids of so many bits."""
    n = SETTINGS["block"]
    svd = matrix.truncated(W, size)
    bits = max(b for b in range(2, 9) if Int(b).stored_bits(n, n) <= 32 * size)
    rounded = relative_error(W, rtn_weight(W, Int(bits)).dense())
    return {
        "task": name, "svd_parameters": svd.parameters, "svd": short(svd.error), "bits": bits,
        "stored_bits": Int(bits).stored_bits(n, n), "rounded": short(rounded),
    }  # fmt: skip


def begun() -> dict:
    """The head of the file: what needs no training."""
    size = count(network(2, "qiren", 1.0, QUBITS, 0))
    side, finer = SETTINGS["side"], SETTINGS["finer"]
    return {
        **made_by("OMP_NUM_THREADS=1 python data/scan_quantum.py", SETTINGS),
        "bicubic": {
            name: compared(picture(name, finer), bicubic(picture(name, side), finer)) for name in PICTURES
        },
        "variance": {name: short(s.y.var(correction=0).item()) for name, s in tasks().items()},
        "beside": [beside(name, W, size) for name, W in matrices().items()],
        "rows": [],
    }  # fmt: skip


def main() -> None:
    flags = arguments(__doc__, Path(__file__).with_name("quantum.json"))
    found, signals = go_on(flags.file, SETTINGS, begun), tasks()
    done = [{key: row[key] for key in plan()[0]} for row in found["rows"]]
    for row in [row for row in plan() if row not in done][: flags.most]:
        found["rows"].append(measure(signals[row["task"]], row))
        write(flags.file, found, "beside", "rows")
        print(found["rows"][-1], flush=True)


if __name__ == "__main__":
    main()
