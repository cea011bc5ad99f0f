"""The rules of the house, read from the source: imports go one way, nothing happens at import."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = sorted(p for p in (ROOT / "lightlib").rglob("*.py") if "widgets" not in p.parts)
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
FOLDERS = {p.name for p in (ROOT / "lightlib").iterdir() if p.is_dir() and p.name != "__pycache__"}
METHODS = FOLDERS - {"widgets", "exercise_data", "export"}


def imports(path: Path) -> set[str]:
    """Every module that the file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            pytest.fail(f"{path}: relative imports hide where a name comes from")
    return found


def within(modules: set[str], *packages: str) -> set[str]:
    return {m for m in modules if any(m == p or m.startswith(p + ".") for p in packages)}


@pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_core_needs_no_picture_no_widget_no_kernel(path):
    wrong = within(
        imports(path),
        "matplotlib",
        "IPython",
        "ipywidgets",
        "triton",
        "lightlib.widgets",
        "lightlib.kernels",
        "kernels",
    )
    if "quantum" not in path.parts:
        wrong |= within(imports(path), "pennylane")
    assert not wrong


@pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(ROOT)))
def test_methods_do_not_import_each_other(path):
    mine = path.relative_to(ROOT / "lightlib").parts[0]
    others = [f"lightlib.{folder}" for folder in METHODS - {mine}]
    if mine in METHODS:
        assert not within(imports(path), *others, "lightlib.catalog", "lightlib.recipe")
    elif mine not in ("catalog.py", "export"):
        assert not within(imports(path), *(f"lightlib.{folder}" for folder in METHODS))


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_attach_ties_kernels_to_lightlib(path):
    if path.name != "attach.py":
        assert not within(imports(path), "lightlib") - within(imports(path), "lightlib.kernels")


@pytest.mark.parametrize("path", CORE + KERNELS, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_called_at_import(path):
    calls = [
        ast.unparse(node)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]
    assert not calls


def test_only_calibration_hooks_and_only_decoder_names_architectures():
    for path in CORE:
        source = path.read_text()
        if path.name not in ("calibration.py",):
            assert "register_forward" not in source, path
        if path.name not in ("decoder.py",):
            assert "self_attn." not in source and "mlp." not in source, path


@pytest.mark.alone
def test_import_lightlib_is_quick_and_brings_nothing_heavy():
    heavy = {"torch", "transformers", "numpy", "matplotlib"}
    probe = f"import sys, lightlib; print(sorted({heavy} & set(sys.modules)))"
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
        seconds.append(time.perf_counter() - begin)
        assert out.strip() == "[]"
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", ""], check=True)
    empty = time.perf_counter() - begin
    print(f"import lightlib: {min(seconds) - empty:.3f} s")
    assert min(seconds) - empty < 0.2


def test_kernels_are_installed_as_lightlib_kernels():
    import lightlib.kernels

    assert Path(lightlib.kernels.__file__) == ROOT / "kernels" / "__init__.py"
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""
