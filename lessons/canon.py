"""Run a lesson and save it the way it is kept: the same bytes on every run of the same code.

`python lessons/canon.py lessons/00_start_here.ipynb` runs it and saves it;
with `--check` it only says whether the file is saved that way, and runs nothing.
"""

import argparse
import base64
import copy
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import nbclient
import nbformat
from PIL import Image
from traitlets.config import Config

WIDGET = "application/vnd.jupyter.widget-view+json"
CELL_KEYS = ("tags", "jupyter", "editable", "deletable", "slideshow")
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def canon(notebook):
    """A copy without what differs from run to run or from machine to machine, its pictures made small."""
    new = copy.deepcopy(notebook)
    new.metadata = nbformat.from_dict(METADATA)
    new.nbformat, new.nbformat_minor = 4, 5
    for cell in new.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in CELL_KEYS})
        for output in cell.get("outputs", []):
            if "data" in output:
                output.metadata = nbformat.from_dict({k: v for k, v in output.metadata.items() if v})
                tidy(output.data)
            if output.output_type == "error":
                # a traceback names the machine's folders; what went wrong is in its last line
                output.traceback = [f"{output.ename}: {output.evalue}"]
    return new


def tidy(data) -> None:
    """Drop a dead widget where a picture or text stands beside it; give pictures a palette."""
    if {"image/png", "image/svg+xml", "text/html"} & set(data):
        # its id is random, and without its kernel it shows nothing
        data.pop(WIDGET, None)
    if "image/png" in data:
        data["image/png"] = few_colours(data["image/png"])


def few_colours(png: str) -> str:
    """The base64 picture with a palette, a third of the bytes; one that has a palette is left alone."""
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    if picture.mode == "P" or (picture.mode == "RGBA" and picture.getextrema()[3][0] < 255):
        return png
    small = io.BytesIO()
    # an octree keeps rare colours, such as the few largest weights of a map, where the median cut loses them
    paletted = picture.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    paletted.save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def text(notebook) -> str:
    """The file's text: a line for each line of source and output, so that changes show as line diffs."""
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def is_canonical(path: Path) -> bool:
    return text(canon(nbformat.read(path, 4))) == path.read_text(encoding="utf-8")


def execute(notebook, folder: Path, timeout: int = 600):
    """`notebook`, run in `folder` by a fresh kernel; raises at the first cell that fails.

    A cell for a device that is not here, tagged `gpu` or `cpu-only`, keeps the output that it has.
    """
    with tempfile.TemporaryDirectory(prefix="nb") as private:
        # a private unix socket: no TCP port that another kernel could take first
        socket = Config(KernelManager={"transport": "ipc", "ip": f"{private}/k"})
        nbclient.NotebookClient(
            notebook, timeout=timeout, kernel_name="python3", coalesce_streams=True, record_timing=False,
            resources={"metadata": {"path": str(folder)}}, config=socket if os.name == "posix" else Config(),
            skip_cells_with_tag=absent_device(notebook),
        ).execute()  # fmt: skip
    for count, cell in enumerate((c for c in notebook.cells if c.get("execution_count")), start=1):
        for part in (cell, *cell.outputs):
            if "execution_count" in part:
                part.execution_count = count
    return notebook


def absent_device(notebook) -> str:
    """The tag of cells that cannot run here."""
    if not any({"gpu", "cpu-only"} & set(cell.metadata.get("tags", [])) for cell in notebook.cells):
        return "gpu"
    import torch

    return "cpu-only" if torch.cuda.is_available() else "gpu"


def run(path: Path) -> float:
    """Run the lesson in its folder and save it; the seconds it took. If a cell fails the file stays."""
    start = time.perf_counter()
    new = canon(execute(nbformat.read(path, 4), path.resolve().parent))
    nbformat.validate(new)
    path.write_text(text(new), encoding="utf-8")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lessons", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="only say which are not saved this way")
    options = parser.parse_args()
    if not options.check:
        for path in options.lessons:
            print(f"{path}: {run(path):.1f} s", flush=True)
    elif wrong := [str(path) for path in options.lessons if not is_canonical(path)]:
        sys.exit(f"not saved in the form that is kept; run: python lessons/canon.py {' '.join(wrong)}")


if __name__ == "__main__":
    main()
