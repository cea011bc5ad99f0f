"""nbval, made to mean something: numbers agree within a tolerance, tags pick the device, cells must have run.

Tags of a cell: `exact` (every character), `rtol=0.02` (its own tolerance), `gpu` and `cpu-only` (skipped
elsewhere), and nbval's `nbval-ignore-output`, `nbval-skip`, `raises-exception`.
Pictures are never compared: a cell that draws also prints the numbers that it draws.
"""

import atexit
import math
import os
import re
import shutil
import tempfile
from collections import defaultdict

import pytest
from jupyter_client.manager import KernelManager
from nbval import kernel, plugin

RTOL = float(os.environ.get("NBVAL_RTOL", "1e-3"))
# a number that is not part of a name, a version or a hex address
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?(?!\w|\.\d)")
PICTURE = re.compile(r"data:image/[\w+]+;base64,[\w+/=\s]+")


def last_place(number: str) -> float:
    """The worth of one unit in the last printed place of `number`; 0 for a whole number."""
    mantissa, _, exponent = number.lower().partition("e")
    decimals = len(mantissa.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - decimals) if decimals or exponent else 0.0


def close(a: str, b: str, rtol: float) -> bool:
    """Whether two printed numbers agree: whole ones exactly, others within rtol or one last place."""
    unit = max(last_place(a), last_place(b))
    return a == b or (unit > 0 and math.isclose(float(a), float(b), rel_tol=rtol, abs_tol=1.01 * unit))


def settle(saved: str, new: str, rtol: float) -> str:
    """`new`, or `saved` where they differ only by close numbers, padding and embedded pictures."""
    a, b = PICTURE.sub("picture", saved), PICTURE.sub("picture", new)
    words = [[" ".join(part.split()) for part in NUMBER.split(text)] for text in (a, b)]
    pairs = zip(NUMBER.findall(a), NUMBER.findall(b), strict=False)
    return saved if words[0] == words[1] and all(close(x, y, rtol) for x, y in pairs) else new


def tolerance(cell) -> float | None:
    """The cell's relative tolerance, or None if it is tagged `exact`."""
    tags = cell.metadata.get("tags", [])
    own = [float(tag.removeprefix("rtol=")) for tag in tags if tag.startswith("rtol=")]
    return None if "exact" in tags else (own or [RTOL])[0]


def texts(outputs) -> dict[str, list]:
    """Where the texts of a cell's outputs lie, by stream or mime type: (holder, key) pairs in order."""
    places = defaultdict(list)
    for output in outputs:
        if "text" in output:
            places[output.get("name")].append((output, "text"))
        for mime, value in output.get("data", {}).items():
            if isinstance(value, str):
                places[mime].append((output["data"], mime))
    return places


def compare_outputs(cell, new, saved, skip_compare=None):
    rtol = tolerance(cell.cell)
    if rtol is not None:
        there = texts(saved)
        for kind, places in texts(new).items():
            for (holder, key), (reference, _) in zip(places, there.get(kind, []), strict=False):
                holder[key] = settle(reference[key], holder[key], rtol)
    return nbval_compare_outputs(cell, new, saved, skip_compare)


def execute_cell_input(running, source, allow_stdin=None):
    # history on, as in JupyterLab, so that a trailing ';' mutes the cell's value
    return running.kc.execute(source, store_history=True, allow_stdin=allow_stdin, stop_on_error=False)


def start_new_kernel(startup_timeout=60, kernel_name="python3", tries=3, **options):
    """nbval's, over a private unix socket: no TCP port that another kernel could take. Tried thrice."""
    for left in reversed(range(tries)):
        folder = tempfile.mkdtemp(prefix="nb")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        specs = kernel.NbvalKernelspecManager()
        manager = KernelManager(
            kernel_name=kernel_name, kernel_spec_manager=specs, transport="ipc", ip=f"{folder}/k"
        )
        manager.start_kernel(**options)
        client = manager.client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=startup_timeout)
            return manager, client
        except RuntimeError:
            client.stop_channels()
            manager.shutdown_kernel(now=True)
            if not left:
                raise


nbval_compare_outputs = plugin.IPyNbCell.compare_outputs
plugin.IPyNbCell.compare_outputs = compare_outputs
kernel.RunningKernel.execute_cell_input = execute_cell_input
if os.name == "posix":
    kernel.start_new_kernel = start_new_kernel


def absent_device() -> str:
    """The tag of cells that this machine cannot run."""
    import torch

    return "cpu-only" if torch.cuda.is_available() else "gpu"


def pytest_collection_modifyitems(items):
    cells = [item for item in items if isinstance(item, plugin.IPyNbCell)]
    tagged = any({"gpu", "cpu-only"} & set(item.cell.metadata.get("tags", [])) for item in cells)
    absent = absent_device() if tagged else None
    for item in cells:
        item.options["skip"] |= absent in item.cell.metadata.get("tags", [])
        if item.cell.execution_count is None and item.cell.source.strip() and not item.options["skip"]:
            item.add_marker(pytest.mark.unrun)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if item.get_closest_marker("unrun"):
        pytest.fail("this cell was saved without being run, so nbval would compare nothing", pytrace=False)
