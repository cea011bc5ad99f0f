"""Draw faces of 25 x 25 pixels with decoders of one size whose front ends differ: circuits, Fourier features.

    OMP_NUM_THREADS=1 python data/scan_faces.py  # 8 minutes; writes data/faces.json

Of 100 faces 80 are learnt, each with a code of its own, and 20 are held out. `tried`: how well a decoder that
learnt 64 of the 80 gives the other 16 (PSNR in dB, fitting their codes alone), for every knob, which is the
circuits' gain or the frequencies' sigma, and every rate; an arm takes what is best of its own. `rows`: an arm
with a seed, which draws its weights, first codes and pixels; the error (MSE) of the 80 faces, the PSNR of the
20, and the Frechet distance of 50 generated faces from 50 of the 100, mean over random halves, in the first
principal components of the 80; it is no FID. Its floor is the distance of one half from the other; as these
share no face, while a generator has learnt most of either, it may come below, as the decoder's copies of
faces that it has learnt do (`frechet_of_copies`). Beside them eigenfaces, with a Gaussian of their
coefficients: as many of them as a code has numbers, and as many as the decoders have parameters for. The
distance sees nothing but means and covariances of principal components, so it favours them, and is blind to
noise and to blur finer than these: `roughness` is not. Seconds are of the training alone, on one thread.
`pictures`: a few generated with the first seed, each its 625 gray values from 0 to 255, row by row, as bytes
in hexadecimal: list(bytes.fromhex(picture)). A scan that was stopped goes on where it ended. Lesson 20 draws
it.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from scanning import arguments, go_on, made_by, write
from torch import Tensor

from lightlib.quantum.baselines import count
from lightlib.quantum.eigenfaces import eigenfaces, frechet
from lightlib.quantum.generator import (
    Decoder,
    Trained,
    build,
    draw,
    gaussian,
    generate,
    reconstruct,
    train,
)
from lightlib.quantum.signals import faces, psnr

SETTINGS = {
    "faces": 100, "held_out": 20, "chosen_on": 16, "parameters": 4000, "length": 16, "steps": 1000,
    "points": 156, "rates": [0.003, 0.01, 0.03], "seeds": [0, 1, 2, 3, 4], "components": 16, "halves": 20,
    "kept": 6,
}  # fmt: skip
ARMS = {
    "quantum": ("quantum", [1.0, 0.5, 2.0, 4.0]),
    "fourier": ("fourier", [1.0]), "fourier, tuned": ("fourier", [0.125, 0.25, 0.5, 1.0, 2.0]),
    "coordinates": ("coordinates", [None]),
}  # fmt: skip
KNOB = {"quantum": "gain", "fourier": "sigma"}


class Faces:
    """The faces in a fixed random order, (n, 25, 25) each: all, those learnt, those held out."""

    def __init__(self):
        pictures, n = faces(), SETTINGS["faces"]
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        self.all, self.others = pictures[order], pictures[n:]
        self.held, self.learnt = self.all.split([SETTINGS["held_out"], n - SETTINGS["held_out"]])
        self.space = eigenfaces(self.learnt, SETTINGS["components"])

    def distance(self, instead: Callable[[Tensor], Tensor]) -> float:
        """Mean over halves of the distance of one half from the pictures `instead` of the other."""
        generator, found = torch.Generator().manual_seed(0), []
        for _ in range(SETTINGS["halves"]):
            order = torch.randperm(len(self.all), generator=generator)
            one, other = self.all[order].chunk(2)
            found.append(frechet(self.space.encode(one), self.space.encode(instead(other))))
        return short(statistics.mean(found))


def tries() -> list[dict]:
    """Every knob of every front end at every rate."""
    knobs = dict.fromkeys((front, knob) for front, knobs in ARMS.values() for knob in knobs)
    return [
        {"front": front, "knob": knob, "rate": rate} for front, knob in knobs for rate in SETTINGS["rates"]
    ]


def plan() -> list[dict]:
    """The rows, every arm with the first seed first."""
    return [{"arm": arm, "seed": seed} for seed in SETTINGS["seeds"] for arm in ARMS]


def learn(
    pictures: Tensor, front: str, knob: float | None, rate: float, generator: torch.Generator
) -> Trained:
    """A decoder, and the codes of the pictures."""
    knobs = {KNOB[front]: knob} if front in KNOB else {}
    sizes = {key: SETTINGS[key] for key in ("parameters", "length")}
    decoder = build(front, **sizes, **knobs, generator=generator)
    steps, points = SETTINGS["steps"], SETTINGS["points"]
    return train(decoder, pictures, steps=steps, lr=rate, points=points, generator=generator, progress=False)


def copied(decoder: Decoder, pictures: Tensor) -> float:
    """PSNR of pictures that the decoder has not seen, their codes fitted."""
    copy = draw(decoder, reconstruct(decoder, pictures), pictures.shape[-1])
    return short(psnr(pictures, copy.detach()))


def trial(those: Faces, front: str, knob: float | None, rate: float) -> dict:
    """A run to choose by, with a seed that no row has; it sees no face that is held out."""
    chosen_on, rest = those.learnt[: SETTINGS["chosen_on"]], those.learnt[SETTINGS["chosen_on"] :]
    made = learn(rest, front, knob, rate, torch.Generator().manual_seed(100))
    return {"front": front, "knob": knob, "rate": rate, "psnr": copied(made.decoder, chosen_on)}


def chosen(tried: list[dict], arm: str) -> dict:
    """The front end, knob and rate of an arm."""
    front, knobs = ARMS[arm]
    best = max((t for t in tried if t["front"] == front and t["knob"] in knobs), key=lambda t: t["psnr"])
    return {key: best[key] for key in ("front", "knob", "rate")}


def measure(those: Faces, run: dict, how: dict) -> tuple[dict, list[str]]:
    """A row, and a few faces that its decoder generates."""
    generator = torch.Generator().manual_seed(run["seed"])
    begin = time.process_time()  # the machine may have other work
    made = learn(those.learnt, **how, generator=generator)
    seconds = time.process_time() - begin
    with torch.no_grad():
        copies = draw(made.decoder, made.codes, those.learnt.shape[-1])

    def some(n: int) -> Tensor:
        return copies[torch.randperm(len(copies), generator=generator)[:n]]

    row = {
        **run, **how, "parameters": count(made.decoder),
        "mse": short((copies - those.learnt).square().mean().item()),
        "psnr": copied(made.decoder, those.held),
        "frechet": those.distance(lambda other: generate(made, len(other), generator)),
        "frechet_of_copies": those.distance(lambda other: some(len(other))),
        "roughness": roughness(generate(made, len(copies), generator)), "seconds": short(seconds),
    }  # fmt: skip
    return row, listed(generate(made, SETTINGS["kept"], generator))


def roughness(pictures: Tensor) -> float:
    """Mean square difference of neighbouring pixels: blur makes it small and noise large."""
    return short(statistics.mean(pictures.diff(dim=d).square().mean().item() for d in (1, 2)))


def listed(pictures: Tensor) -> list[str]:
    """Pictures as bytes in hexadecimal; values outside [-1, 1] become black or white."""
    gray = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [bytes(picture.flatten().tolist()).hex() for picture in gray]


def beside(those: Faces, k: int) -> tuple[dict, list[str]]:
    """Eigenfaces as a generator, and a few faces of it."""
    generator, space = torch.Generator().manual_seed(0), eigenfaces(those.learnt, k)

    def drawn(n: int) -> Tensor:
        return space.decode(gaussian(space.encode(those.learnt), n, generator))

    def copy(pictures: Tensor) -> Tensor:
        return space.decode(space.encode(pictures))

    row = {
        "components": k, "parameters": space.mean.numel() + space.directions.numel(),
        "mse": short((copy(those.learnt) - those.learnt).square().mean().item()),
        "psnr": short(psnr(those.held, copy(those.held))),
        "frechet": those.distance(lambda other: drawn(len(other))),
        "roughness": roughness(drawn(len(those.learnt))),
    }  # fmt: skip
    return row, listed(drawn(SETTINGS["kept"]))


def begun(those: Faces) -> dict:
    """The head of the file: what needs no training."""
    pixels = those.all[0].numel()
    fewer, as_many = SETTINGS["parameters"] // pixels - 1, SETTINGS["length"]
    rows = {k: beside(those, k) for k in (fewer, as_many)}
    mean = those.learnt.mean(0)
    return {
        **made_by("OMP_NUM_THREADS=1 python data/scan_faces.py", SETTINGS),
        "mean_face": {
            "mse": short((those.learnt - mean).square().mean().item()),
            "psnr": short(psnr(those.held, mean.expand_as(those.held))),
        },
        "frechet": {
            "floor": those.distance(lambda other: other),
            "other_pictures": those.distance(lambda other: those.others[: len(other)]),
            "mean_face": those.distance(lambda other: mean.expand_as(other)),
        },
        "roughness": roughness(those.learnt), "eigenfaces": [row for row, _ in rows.values()],
        "tried": [], "pictures": [{"arm": "eigenfaces", "pictures": rows[as_many][1]}], "rows": [],
    }  # fmt: skip


def short(value: float) -> float:
    return float(f"{value:.4g}")


def main() -> None:
    flags, those = arguments(__doc__, Path(__file__).with_name("faces.json")), Faces()
    found = go_on(flags.file, SETTINGS, lambda: begun(those))

    def left(name: str, points: list[dict]) -> list[dict]:
        done = [{key: row[key] for key in points[0]} for row in found[name]]
        return [point for point in points if point not in done]

    def keep(name: str, row: dict) -> None:
        found[name].append(row)
        write(flags.file, found, "eigenfaces", "tried", "pictures", "rows")
        print(row, flush=True)

    for point in left("tried", tries())[: flags.most]:
        keep("tried", trial(those, **point))
    if left("tried", tries()):
        return
    for run in left("rows", plan())[: flags.most]:
        row, pictures = measure(those, run, chosen(found["tried"], run["arm"]))
        if run["seed"] == SETTINGS["seeds"][0]:
            found["pictures"].append({"arm": run["arm"], "pictures": pictures})
        keep("rows", row)


if __name__ == "__main__":
    main()
