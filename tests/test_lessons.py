"""What a lesson may hold, so that comparing it means something, and that its exercises can be solved."""

import ast
import copy
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).parents[1] / "lessons"
LESSONS = sorted(ROOT.glob("[0-9]*.ipynb"))
MOST_BYTES = 1_500_000
BANNED = {
    r"\binteract(ive|ive_output)?\(": "use Explorer",
    r"\bOutput\(": "nbval takes what it shows for the cell's own output; use Explorer",
    r"\bclear_output\(": "nbval does not clear; update a widget in place",
    r"\bdisplay_id\s*=": "nbval does not update; update a widget in place",
    r"\btqdm\b": "its rate differs each run; progress=False",
    r"%%?time(it)?\b": "it differs each run; lightlib.measure.latency",
    r"#\s*NBVAL_\w+\s*\S": "nbval wants the marker alone on its line; use a tag",
}
WIDGET = "application/vnd.jupyter.widget-view+json"
NOT_FOR_OTHERS = re.compile(r"\b0x[0-9a-f]{8,}|/home/|/root/|/tmp/|/Users/|/work/")


def module(name: str):
    """lessons/<name>.py, which lies in no package."""
    spec = importlib.util.spec_from_file_location(f"lessons_{name}", ROOT / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


canon, rules = module("canon"), module("conftest")


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def faults(cell) -> list[str]:
    """What is wrong with a cell that was run and saved."""
    found = [f"{pattern}: {why}" for pattern, why in BANNED.items() if re.search(pattern, cell.source)]
    for output in cell.outputs:
        data = output.get("data", {})
        if output.output_type == "error" and "raises-exception" not in cell.metadata.get("tags", []):
            found.append(f"an error: {output.ename}")
        if output.get("name") == "stderr":
            found.append(f"stderr: {output.text[:60]!r}")
        if WIDGET in data:
            found.append("a widget with nothing to show without a kernel")
        texts = [output.get("text"), *(value for mime, value in data.items() if "image" not in mime)]
        if hit := NOT_FOR_OTHERS.search(" ".join(map(str, texts))):
            found.append(f"an address or a path of a machine: {hit[0]}")
    return found


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_is_saved_as_lessons_are(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code(notebook)]
    assert counts == list(range(1, len(counts) + 1)), (
        "not run once from top to bottom: python lessons/canon.py"
    )
    assert path.stat().st_size <= MOST_BYTES
    assert canon.is_canonical(path), "python lessons/canon.py saves it as lessons are kept"


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_holds_only_what_can_be_compared(path):
    cells = enumerate(nbformat.read(path, 4).cells)
    assert [
        f"cell {i}: {fault}" for i, cell in cells if cell.cell_type == "code" for fault in faults(cell)
    ] == []


def exercises(notebook) -> list:
    """The cells that a learner fills in: tagged `exercise` and `exercise:<name>`."""
    return [
        c for c in notebook.cells if any(tag.startswith("exercise") for tag in c.metadata.get("tags", []))
    ]


def solutions(path: Path) -> dict[str, str]:
    """{tag: source} of lessons/solutions/<lesson>.py, whose blocks begin with `# %% exercise:<name>`."""
    blocks = re.split(r"(?m)^# %% (exercise:\S+)\n", (ROOT / "solutions" / f"{path.stem}.py").read_text())
    return {tag: source.strip() for tag, source in zip(blocks[1::2], blocks[2::2], strict=True)}


def imports(notebook) -> str:
    """What the lesson imports: all that an exercise, or its solution, may count on."""
    found = [node for cell in code(notebook) for node in ast.parse(cell.source).body]
    return "\n".join(ast.unparse(node) for node in found if isinstance(node, (ast.Import, ast.ImportFrom)))


@pytest.mark.lessons
@pytest.mark.parametrize(
    "path", [p for p in LESSONS if '"exercise' in p.read_text()], ids=lambda path: path.stem
)
def test_an_exercise_is_open_when_saved_and_its_solution_is_right(path):
    notebook, answers = nbformat.read(path, 4), solutions(path)
    cells = exercises(notebook)
    assert [c.source for c in cells if "[to do]" not in str(c.outputs)] == [], (
        "the saved lesson gives it away"
    )
    for cell in cells:
        for tag in cell.metadata.tags:
            if tag.startswith("exercise:"):
                cell.source = answers.pop(tag)
    assert not answers, "solutions of no exercise"
    canon.execute(new_notebook(cells=[new_code_cell(imports(notebook)), *cells]), ROOT)
    assert [str(c.outputs) for c in cells if "[ok]" not in str(c.outputs)] == []


@pytest.mark.parametrize(
    ("saved", "new", "rtol", "agree"),
    [
        ("loss 2.3456", "loss 2.3457", 1e-6, True),  # one unit in the last place
        ("loss 2.3456", "loss 2.3468", 1e-3, True),
        ("loss 2.3456", "loss 2.3756", 1e-3, False),
        ("1.2e-05", "1.3e-05", 1e-3, True),
        ("1.2e-05", "1.2e-04", 1e-3, False),
        ("64 weights", "65 weights", 0.5, False),  # whole numbers are exact
        ("tensor([1., 2.])", "tensor([1., 3.])", 0.5, False),
        ("-0.001", "0.000", 1e-3, True),
        ("nan", "0.5", 0.5, False),
        ("v2.13.0", "v2.14.0", 0.5, False),
        (" 9.999", "10.001", 1e-3, True),  # another padding
        ("<img src='data:image/png;base64,AAAA'> 1.5", "<img src='data:image/png;base64,BBBB'> 1.5", 0, True),
        ("int4 1.5", "int8 1.5", 0.5, False),
    ],
)
def test_numbers_agree_within_tolerance_and_words_exactly(saved, new, rtol, agree):
    assert (rules.settle(saved, new, rtol) == saved) is agree


def small_lesson(folder: Path):
    """A notebook that has been run here, with a cell that was run on a GPU."""
    cells = {
        "x = [1 / 3, 2 / 3]; print(f'sum {sum(x):.4f} of {len(x)}')": [],
        "x[0]": [],
        "x[0];": [],
        "[1.0 * v for v in x]": ["exact"],
        "1 / 0": ["raises-exception"],
    }
    notebook = new_notebook(cells=[new_code_cell(s, metadata={"tags": tags}) for s, tags in cells.items()])
    gpu = new_code_cell(
        "import torch; torch.zeros(1, device='cuda');", metadata={"tags": ["gpu"]}, execution_count=9
    )
    notebook.cells.insert(2, gpu)
    return canon.execute(notebook, folder)


def scaled(notebook, factor: float):
    """A copy whose first two cells say other numbers than those they print."""
    new = copy.deepcopy(notebook)
    for output in new.cells[0].outputs + new.cells[1].outputs:
        holder, key = (output, "text") if "text" in output else (output.data, "text/plain")
        holder[key] = re.sub(r"\d+\.\d+", lambda m: f"{float(m[0]) * factor:.4f}", holder[key])
    return new


def stripped(notebook):
    """A copy without outputs and counts, as some tools save it."""
    new = copy.deepcopy(notebook)
    for cell in new.cells:
        cell.outputs, cell.execution_count = [], None
    return new


def test_nbval_sees_what_it_should_and_no_more(tmp_path):
    same = small_lesson(tmp_path)
    assert [cell.execution_count for cell in same.cells] == [1, 2, 3, 4, 5, 6]
    near, far = scaled(same, 1.0005), scaled(same, 1.01)
    for name, notebook in {"same": same, "near": near, "far": far, "stripped": stripped(same)}.items():
        (tmp_path / f"{name}.ipynb").write_text(canon.text(canon.canon(notebook)))
    (tmp_path / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = unrun\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval",
        "--nbval-current-env",
        "-rA",
        "-p",
        "no:cacheprovider",
    ]
    words = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120).stdout
    outcomes = re.findall(r"(?m)^(PASSED|FAILED|ERROR) (\w+)\.ipynb", words)
    assert {name for outcome, name in outcomes if outcome == "PASSED"} == {"same", "near", "far"}
    assert [name for outcome, name in outcomes if outcome != "PASSED"].count("far") == 2
    assert {name for outcome, name in outcomes if outcome != "PASSED"} == {"far", "stripped"}
